#define FASTMTL_IN double
#include "kernels.inc"
