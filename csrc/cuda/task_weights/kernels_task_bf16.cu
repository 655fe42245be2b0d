#define FASTMTL_IN __nv_bfloat16
#include "cuda/task_weights/kernels_task.inc"
