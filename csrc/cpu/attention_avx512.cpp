#define PAGEDKV_ATTENTION_TABLE attention_avx512
#include "attention_kernel.inl"
