#define PAGEDKV_INT4_TABLE int4_generic
#include "int4_kernel.inl"
