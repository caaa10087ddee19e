#define PAGEDKV_LINEAR_TABLE linear_avx512
#include "linear_kernel.inl"
