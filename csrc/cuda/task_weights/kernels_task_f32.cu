#define FASTMTL_IN float
#include "cuda/task_weights/kernels_task.inc"
