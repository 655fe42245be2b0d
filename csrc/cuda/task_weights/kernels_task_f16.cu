#define FASTMTL_IN __half
#include "cuda/task_weights/kernels_task.inc"
