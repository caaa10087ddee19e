// What attention.cpp lends to ops that are made of it.
#pragma once

#include <cmath>
#include <limits>

#include "../ops.h"
#include "attention_kernel.h"

namespace pagedkv {

// The kernels for this CPU.
const AttentionKernels& attention_kernels();
AttentionType attention_type(const Tensor& t);

// Part of the keys of a row: the maximum of the logits and the sum of exponentials relative to it; none: -inf and 0.
struct AttentionState {
  float top, sum;
};
// The shares of two parts in the result, and the LSE of both. (An LSE of each, rounded where it is large, would make
// the shares worse than float32.)
struct MergedStates {
  float weight_a = 0, weight_b = 0, lse = -std::numeric_limits<float>::infinity();

  MergedStates(AttentionState a, AttentionState b) {
    const float top = a.top > b.top ? a.top : b.top;
    if (a.top == lse && b.top == lse) return;
    const float in_a = a.sum * std::exp(a.top - top), in_b = b.sum * std::exp(b.top - top);
    weight_a = in_a / (in_a + in_b);
    weight_b = in_b / (in_a + in_b);
    lse = top + std::log(in_a + in_b);
  }
};

// paged_attention, whose errors name `op`. With `states` out is float32 and lse [T, Hq, 2],
// AttentionStates.
Pair attend_pages(const char* op, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                  const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start,
                  const Tensor& query_len, int64_t max_query_len, double scale, bool causal,
                  const OptTensor& alibi_slopes, int64_t sliding_window, double softcap, const OptTensor& sinks,
                  const OptTensor& k_scale, const OptTensor& v_scale, bool return_lse, bool states = false);

}  // namespace pagedkv
