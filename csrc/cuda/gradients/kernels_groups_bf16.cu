#define FASTMTL_IN __nv_bfloat16
#include "cuda/gradients/kernels_groups.inc"
