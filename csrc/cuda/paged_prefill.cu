// launch_prefill: from the arguments of the op to an instantiation of paged_prefill.cuh.
#include "attention_plan.cuh"
#include "paged_prefill.cuh"

namespace pagedkv {
namespace {

constexpr int64_t kCachedBytes = 20 << 20;  // of keys and values that the L2 cache keeps

prefill::Params prepare(const AttentionParams& a, KVType kv) {
  prefill::Params p{};
  p.a = a;
  const int64_t bytes = kv == KVType::kSame ? 2 : 1;
  p.k_block = a.k_stride_block * bytes, p.k_token = a.k_stride_t * bytes, p.k_head = a.k_stride_h * bytes;
  p.v_block = a.v_stride_block * bytes, p.v_token = a.v_stride_t * bytes, p.v_head = a.v_stride_h * bytes;
  p.page_shift = a.block_shift, p.pages = a.num_blocks, p.table_width = a.max_blocks;
  if (!a.block_tables) {
    p.k_block = p.k_token, p.v_block = p.v_token;
    p.page_shift = 0, p.table_width = INT32_MAX;
  }
  p.group = a.num_heads / a.num_kv_heads;
  p.group_magic = uint32_t(((1u << 31) + p.group - 1) / p.group);
  p.row_tiles = int((int64_t(a.max_query_len) * p.group + prefill::kRows - 1) / prefill::kRows);
  const int64_t pairs = int64_t(a.num_seqs) * a.num_kv_heads, pair_bytes = 2 * bytes * a.head_dim * a.max_query_len;
  p.side = int(std::clamp<int64_t>(kCachedBytes / pair_bytes, 1, pairs));
  p.q_vectors =
      (reinterpret_cast<uintptr_t>(a.q) | uintptr_t(2 * a.q_stride_t) | uintptr_t(2 * a.q_stride_h)) % 16 == 0;
  p.fp8 = kv == KVType::kFp8;
  // The scale goes into the exponent, unless something comes between the two, or it would turn the order round
  const bool direct = a.softcap <= 0.f && !a.alibi_slopes && a.scale > 0.f;
  p.exp2_scale = direct ? a.scale * kLog2e : kLog2e;
  p.logit_scale = direct || a.softcap > 0.f ? 1.f : a.scale;
  p.plain = direct;
  p.tanh_scale = a.softcap > 0.f ? a.scale / a.softcap : 0.f;
  return p;
}

}  // namespace

void launch_prefill(const AttentionParams& a, ScalarType dtype, KVType kv, cudaStream_t stream) {
  if (a.num_heads == 0 || a.num_tokens == 0) return;
  auto fill = [&] {
    if (!a.filled) launch_fill(a, 2, stream);
  };
  if (a.num_seqs == 0 || a.max_query_len == 0) return fill();
  const prefill::Params p = prepare(a, kv);
  const int64_t grid = int64_t(p.row_tiles) * a.num_kv_heads * a.num_seqs;
  if (int64_t(a.max_query_len) * p.group > INT32_MAX - prefill::kRows || grid > INT32_MAX || p.group >= 1 << 15)
    fail("attention: got max_query_len ", a.max_query_len, " for ", a.num_seqs, " sequences of ", a.num_heads,
         " heads, needs fewer than 2^31 rows and tiles");
  if (prefill::launch_sm90(p, dtype, kv, stream)) return;
  fill();
  auto launch = [&]<class T>(T) {
    const bool quantized = kv != KVType::kSame;
    const int d = a.head_dim;
    const auto bucket = d <= 32    ? prefill::launch_bucket<T, 32>
                        : d <= 64  ? prefill::launch_bucket<T, 64>
                        : d <= 96  ? prefill::launch_bucket<T, 96>
                        : d <= 128 ? prefill::launch_bucket<T, 128>
                        : d <= 192 ? prefill::launch_bucket<T, 192>
                                   : prefill::launch_bucket<T, 256>;
    bucket(p, quantized, unsigned(grid), stream);
  };
  switch (dtype) {
    case ScalarType::Half:
      launch(__half{});
      return;
    case ScalarType::BFloat16:
      launch(__nv_bfloat16{});
      return;
    default:
      fail("launch_prefill: got dtype ", name_of(dtype), ", needs float16 or bfloat16");
  }
}

}  // namespace pagedkv
