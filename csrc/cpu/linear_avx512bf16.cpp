#define PAGEDKV_LINEAR_TABLE linear_avx512bf16
#include "linear_kernel.inl"
