#define PAGEDKV_ATTENTION_TABLE attention_generic
#include "attention_kernel.inl"
