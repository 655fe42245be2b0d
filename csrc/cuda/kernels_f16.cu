#define FASTMTL_IN __half
#include "kernels.inc"
