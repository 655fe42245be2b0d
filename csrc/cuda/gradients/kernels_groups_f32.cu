#define FASTMTL_IN float
#include "cuda/gradients/kernels_groups.inc"
