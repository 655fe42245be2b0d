#define FASTMTL_IN __half
#include "cuda/gradients/kernels_groups.inc"
