#define PAGEDKV_INT4_TABLE int4_avx2
#include "int4_kernel.inl"
