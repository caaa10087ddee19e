// The C++ signature of every op, on one page. The schemas (with mutations) are in torch_pagedkv/ops/*.py. Both backends
// check themselves against this page at compile time through PAGEDKV_IMPL: TORCH_BOX checks the number of arguments
// only when an op is called, which a machine without a GPU never does for the CUDA kernels.
#pragma once

#include "checks.h"
#include "common.h"

namespace pagedkv {

using Pair = std::tuple<Tensor, Tensor>;

// attention ----------------------------------------------------------------------------------------------------------
using paged_attention_fn = Pair(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables,
                                Tensor seq_lens, Tensor query_start, Tensor query_len, int64_t max_query_len,
                                double scale, bool causal, OptTensor alibi_slopes, int64_t sliding_window,
                                double softcap, OptTensor sinks, OptTensor k_scale, OptTensor v_scale, bool return_lse,
                                bool batch_invariant);
using paged_attention_v1_fn = Pair(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables,
                                   Tensor seq_lens, Tensor query_start, Tensor query_len, int64_t max_query_len,
                                   double scale, bool causal, OptTensor alibi_slopes, int64_t sliding_window,
                                   double softcap, OptTensor sinks, OptTensor k_scale, OptTensor v_scale,
                                   bool return_lse);
using paged_attention_v2_fn = Pair(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables,
                                   Tensor seq_lens, Tensor query_start, Tensor query_len, int64_t max_query_len,
                                   double scale, bool causal, OptTensor alibi_slopes, int64_t sliding_window,
                                   double softcap, OptTensor sinks, OptTensor k_scale, OptTensor v_scale,
                                   bool return_lse, int64_t num_splits);
using flash_attention_fn = Pair(Tensor query, Tensor key, Tensor value, Tensor query_start, Tensor query_len,
                                Tensor key_start, Tensor key_len, int64_t max_query_len, int64_t max_key_len,
                                double scale, bool causal, OptTensor alibi_slopes, int64_t sliding_window,
                                double softcap, OptTensor sinks, bool return_lse);
using merge_attention_states_fn = Pair(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b);

// cascade ------------------------------------------------------------------------------------------------------------
using paged_attention_cascade_fn = Pair(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables,
                                        Tensor seq_lens, Tensor group_start, Tensor group_len, Tensor prefix_lens,
                                        int64_t max_group_len, double scale, OptTensor alibi_slopes,
                                        int64_t sliding_window, double softcap, OptTensor sinks, OptTensor k_scale,
                                        OptTensor v_scale, bool return_lse);

// cache --------------------------------------------------------------------------------------------------------------
using reshape_and_cache_fn = void(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
                                  OptTensor k_scale, OptTensor v_scale);
using copy_blocks_fn = void(std::vector<Tensor> caches, Tensor block_mapping);
using swap_blocks_fn = void(Tensor src, Tensor dst, Tensor block_mapping);
using gather_cache_fn = Pair(Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                             Tensor out_start, int64_t total_tokens, ScalarType dtype, OptTensor k_scale,
                             OptTensor v_scale);

// norm ---------------------------------------------------------------------------------------------------------------
using rms_norm_fn = Tensor(Tensor x, OptTensor weight, double eps, double weight_offset, bool round_before_weight);
using add_rms_norm_fn = Pair(Tensor x, Tensor residual, OptTensor weight, double eps, double weight_offset,
                             bool round_before_weight);
using layer_norm_fn = Tensor(Tensor x, OptTensor weight, OptTensor bias, double eps);

// linear -------------------------------------------------------------------------------------------------------------
using linear_fn = Tensor(Tensor x, Tensor weight, OptTensor bias);

// int4 ---------------------------------------------------------------------------------------------------------------
using int4_repack_fn = Tensor(Tensor q);
using int4_dequantize_fn = Tensor(Tensor packed, Tensor scales, OptTensor zeros, OptTensor offsets, OptTensor perm,
                                  int64_t group_size, int64_t in_features, ScalarType dtype);
using int4_linear_fn = Tensor(Tensor x, Tensor packed, Tensor scales, OptTensor zeros, OptTensor offsets,
                              OptTensor perm, OptTensor bias, OptTensor residual, int64_t group_size,
                              int64_t in_features, std::string activation);

// q4k ----------------------------------------------------------------------------------------------------------------
using Q4KTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // packed, scales, mins, d, dmin
using q4k_repack_fn = Q4KTensors(Tensor blocks);
using q4k_dequantize_fn = Tensor(Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, ScalarType dtype);
using q4k_linear_fn = Tensor(Tensor x, Tensor packed, Tensor scales, Tensor mins, Tensor d, Tensor dmin, OptTensor bias,
                             OptTensor residual, std::string activation);

// int8 ---------------------------------------------------------------------------------------------------------------
using int8_repack_fn = Tensor(Tensor q);
using int8_dequantize_fn = Tensor(Tensor packed, Tensor scales, int64_t group_size, int64_t in_features,
                                  ScalarType dtype);
using int8_linear_fn = Tensor(Tensor x, Tensor packed, Tensor scales, OptTensor bias, OptTensor residual,
                              int64_t group_size, int64_t in_features, std::string activation);

// quantize -----------------------------------------------------------------------------------------------------------
using quantize_per_token_fn = Pair(Tensor x, OptTensor factor, int64_t rotation, ScalarType dtype);
using dequantize_sums_fn = Tensor(Tensor sums, Tensor row_scale, Tensor column_scale, OptTensor bias, ScalarType dtype);
using scaled_linear_fn = Tensor(Tensor x, Tensor row_scale, Tensor weight, Tensor column_scale, OptTensor bias,
                                ScalarType dtype);

// rotary -------------------------------------------------------------------------------------------------------------
using rotary_embedding_fn = void(Tensor query, OptTensor key, Tensor cos, Tensor sin, bool interleaved);
using rotary_and_cache_fn = void(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor key_cache,
                                 Tensor value_cache, Tensor slot_mapping, bool interleaved, OptTensor k_scale,
                                 OptTensor v_scale);

// activation ---------------------------------------------------------------------------------------------------------
using silu_and_mul_fn = Tensor(Tensor gate, Tensor up);
using gelu_and_mul_fn = Tensor(Tensor gate, Tensor up, std::string approximate);
using bias_act_fn = Tensor(Tensor x, OptTensor bias, std::string activation);

// sampling -----------------------------------------------------------------------------------------------------------
using sample_fn = Tensor(Tensor logits, Tensor seeds, Tensor offsets, OptTensor temperature, OptTensor top_k,
                         OptTensor top_p, OptTensor min_p);
using argmax_fn = Tensor(Tensor logits);

}  // namespace pagedkv

#define PAGEDKV_IMPL(m, op, fn)                                                       \
  static_assert(std::is_same_v<decltype(fn), pagedkv::op##_fn>, "signature of " #op); \
  m.impl(#op, TORCH_BOX(&fn))
