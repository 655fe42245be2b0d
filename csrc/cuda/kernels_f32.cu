#define FASTMTL_IN float
#include "kernels.inc"
