#define PAGEDKV_LINEAR_TABLE linear_avx2
#include "linear_kernel.inl"
