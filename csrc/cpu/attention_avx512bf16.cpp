#define PAGEDKV_ATTENTION_TABLE attention_avx512bf16
#include "attention_kernel.inl"
