#define FASTMTL_IN double
#include "cuda/gradients/kernels_groups.inc"
