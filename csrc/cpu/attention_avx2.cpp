#define PAGEDKV_ATTENTION_TABLE attention_avx2
#include "attention_kernel.inl"
