#define PAGEDKV_LINEAR_TABLE linear_generic
#include "linear_kernel.inl"
