#define PAGEDKV_INT4_TABLE int4_avx512bf16
#include "int4_kernel.inl"
