// The attention ops: arguments -> AttentionParams, and the choice of kernel.
#include <torch/csrc/stable/accelerator.h>

#include "attention_plan.cuh"
#include "paged_decode.cuh"

namespace pagedkv {
namespace {

// Lengths stay far below this, so that position arithmetic fits in 32 bits; a longer window is no window.
constexpr int64_t kNoWindow = int64_t(1) << 30;

template <class T>
const T* data_or_null(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

// A stride is free where the size is 1; 0 there keeps alignment tests honest.
int64_t stride_of(const Tensor& t, int64_t i) { return t.size(i) <= 1 ? 0 : t.stride(i); }

}  // namespace

Pair begin_call(const char* op, AttentionParams& p, const Tensor& query, const Tensor& query_start,
                const Tensor& query_len, int64_t max_query_len, double scale, bool causal,
                const OptTensor& alibi_slopes, int64_t window, double softcap, const OptTensor& sinks,
                bool return_lse) {
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  Tensor out = torch::stable::new_empty(query, {tokens, heads, dim});
  Tensor lse = torch::stable::new_empty(query, {return_lse ? tokens : 0, heads}, ScalarType::Float);
  PAGEDKV_CHECK(tokens * heads / std::max<int64_t>(1, p.num_kv_heads) < (int64_t(1) << 31), op, "query",
                tokens << " tokens of " << heads << " heads", "fewer than 2^31 rows for each KV head");
  p.q = query.const_data_ptr();
  p.q_stride_t = stride_of(query, 0);
  p.q_stride_h = stride_of(query, 1);
  p.query_start = query_start.const_data_ptr<int>();
  p.query_len = query_len.const_data_ptr<int>();
  p.max_query_len = int(std::min<int64_t>(max_query_len, tokens));
  p.alibi_slopes = data_or_null<float>(alibi_slopes);
  p.sinks = data_or_null<float>(sinks);
  p.scale = float(scale);
  p.softcap = float(softcap);
  p.window = window >= kNoWindow ? 0 : int(window);
  p.causal = causal;
  p.out = out.mutable_data_ptr();
  p.lse = return_lse ? lse.mutable_data_ptr<float>() : nullptr;
  p.num_seqs = int(query_start.size(0));
  p.num_heads = int(heads);
  p.head_dim = int(dim);
  p.num_tokens = int(tokens);
  return {std::move(out), std::move(lse)};
}

KVType kv_type(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Char:
      return KVType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return KVType::kFp8;
    default:
      return KVType::kSame;
  }
}

void set_cache(AttentionParams& p, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
               const Tensor& seq_lens, const OptTensor& k_scale, const OptTensor& v_scale) {
  p.k = key_cache.const_data_ptr();
  p.v = value_cache.const_data_ptr();
  p.k_stride_block = stride_of(key_cache, 0), p.v_stride_block = stride_of(value_cache, 0);
  p.k_stride_t = stride_of(key_cache, 1), p.v_stride_t = stride_of(value_cache, 1);
  p.k_stride_h = stride_of(key_cache, 2), p.v_stride_h = stride_of(value_cache, 2);
  p.k_scale = data_or_null<float>(k_scale);
  p.v_scale = data_or_null<float>(v_scale);
  p.block_tables = block_tables.const_data_ptr<int>();
  p.table_stride = stride_of(block_tables, 0);
  p.max_blocks = int(block_tables.size(1));
  p.num_blocks = int(key_cache.size(0));
  p.block_size = int(key_cache.size(1));
  while ((1 << p.block_shift) < p.block_size) ++p.block_shift;
  p.max_key_len = int(std::min<int64_t>(block_tables.size(1) * p.block_size, kNoWindow));
  p.seq_lens = seq_lens.const_data_ptr<int>();
  p.num_kv_heads = int(key_cache.size(2));
}

namespace {

enum class Version { kPick, kInvariant, kOnePass, kSplit };

// Few rows a KV head: one tile of the decode kernel holds them, or they are too few for the prefill kernel, which does
// not split the keys, to fill the device with.
bool suits_decode(const AttentionParams& p) {
  const int64_t rows = int64_t(p.max_query_len) * (p.num_heads / p.num_kv_heads);
  if (rows <= kRowTile) return true;
  return rows <= 4 * kRowTile && 2 * int64_t(p.num_seqs) * p.num_kv_heads <= current_device().sms;
}

// A batch-invariant call with long and short sequences: each by the kernel that it would have alone.
__global__ void few_rows_kernel(const int* query_len, int* few, int* many, int sequences, int most) {
  const int s = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (s >= sequences) return;
  const int n = query_len[s];
  few[s] = n <= most ? n : 0;
  many[s] = n <= most ? 0 : n;
}
void mixed(AttentionParams p, const Tensor& query, KVType kv, cudaStream_t stream) {
  const int most = kRowTile / (p.num_heads / p.num_kv_heads);
  const Tensor lens = torch::stable::new_empty(query, {2, p.num_seqs}, ScalarType::Int);
  int* const few = lens.mutable_data_ptr<int>();
  few_rows_kernel<<<(p.num_seqs + 255) / 256, 256, 0, stream>>>(p.query_len, few, few + p.num_seqs, p.num_seqs, most);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  p.query_len = few + p.num_seqs;
  launch_prefill(p, query.scalar_type(), kv, stream);  // fills all other rows, too
  if (most == 0) return;
  p.query_len = few, p.max_query_len = most, p.filled = true;
  launch_decode(p, query.scalar_type(), kv, kInvariant, query, stream);
}

Pair paged(const char* op, Version version, int64_t num_splits, const Tensor& query, const Tensor& key_cache,
           const Tensor& value_cache, const Tensor& block_tables, const Tensor& seq_lens, const Tensor& query_start,
           const Tensor& query_len, int64_t max_query_len, double scale, bool causal, const OptTensor& alibi_slopes,
           int64_t window, double softcap, const OptTensor& sinks, const OptTensor& k_scale, const OptTensor& v_scale,
           bool return_lse) {
  check_paged_attention(op, query, key_cache, value_cache, block_tables, seq_lens, query_start, query_len,
                        max_query_len, alibi_slopes, window, softcap, sinks, k_scale, v_scale);
  PAGEDKV_CHECK(num_splits >= 0 && num_splits <= 1024, op, "num_splits", num_splits, "0 (planned) to 1024");
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  AttentionParams p{};
  set_cache(p, key_cache, value_cache, block_tables, seq_lens, k_scale, v_scale);
  Pair result = begin_call(op, p, query, query_start, query_len, max_query_len, scale, causal, alibi_slopes, window,
                           softcap, sinks, return_lse);
  if (query.numel() == 0) return result;
  const cudaStream_t stream = current_stream(query);
  const KVType kv = kv_type(key_cache);
  const int splits = version == Version::kOnePass ? 1 : version == Version::kInvariant ? kInvariant : int(num_splits);
  const int64_t rows = int64_t(p.max_query_len) * (p.num_heads / p.num_kv_heads);
  if (query.scalar_type() == ScalarType::Float) {
    launch_simt(p, kv, splits, query, stream);
  } else if (version == Version::kInvariant && rows > kRowTile && p.num_seqs > 0) {
    mixed(p, query, kv, stream);
  } else if (version == Version::kSplit || version == Version::kInvariant || suits_decode(p)) {
    launch_decode(p, query.scalar_type(), kv, splits, query, stream);
  } else {
    launch_prefill(p, query.scalar_type(), kv, stream);
  }
  return result;
}

Pair paged_attention_cuda(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                          Tensor query_start, Tensor query_len, int64_t max_query_len, double scale, bool causal,
                          OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks,
                          OptTensor k_scale, OptTensor v_scale, bool return_lse, bool batch_invariant) {
  const Version version = batch_invariant ? Version::kInvariant : Version::kPick;
  return paged("paged_attention", version, 0, query, key_cache, value_cache, block_tables, seq_lens, query_start,
               query_len, max_query_len, scale, causal, alibi_slopes, sliding_window, softcap, sinks, k_scale, v_scale,
               return_lse);
}

Pair paged_attention_v1_cuda(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                             Tensor query_start, Tensor query_len, int64_t max_query_len, double scale, bool causal,
                             OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks,
                             OptTensor k_scale, OptTensor v_scale, bool return_lse) {
  return paged("paged_attention_v1", Version::kOnePass, 1, query, key_cache, value_cache, block_tables, seq_lens,
               query_start, query_len, max_query_len, scale, causal, alibi_slopes, sliding_window, softcap, sinks,
               k_scale, v_scale, return_lse);
}

Pair paged_attention_v2_cuda(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor seq_lens,
                             Tensor query_start, Tensor query_len, int64_t max_query_len, double scale, bool causal,
                             OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks,
                             OptTensor k_scale, OptTensor v_scale, bool return_lse, int64_t num_splits) {
  return paged("paged_attention_v2", Version::kSplit, num_splits, query, key_cache, value_cache, block_tables, seq_lens,
               query_start, query_len, max_query_len, scale, causal, alibi_slopes, sliding_window, softcap, sinks,
               k_scale, v_scale, return_lse);
}

Pair flash_attention_cuda(Tensor query, Tensor key, Tensor value, Tensor query_start, Tensor query_len,
                          Tensor key_start, Tensor key_len, int64_t max_query_len, int64_t max_key_len, double scale,
                          bool causal, OptTensor alibi_slopes, int64_t sliding_window, double softcap, OptTensor sinks,
                          bool return_lse) {
  check_flash_attention(query, key, value, query_start, query_len, key_start, key_len, max_query_len, max_key_len,
                        alibi_slopes, sliding_window, softcap, sinks);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  AttentionParams p{};
  p.k = key.const_data_ptr();
  p.v = value.const_data_ptr();
  p.k_stride_t = stride_of(key, 0), p.v_stride_t = stride_of(value, 0);
  p.k_stride_h = stride_of(key, 1), p.v_stride_h = stride_of(value, 1);
  p.key_start = key_start.const_data_ptr<int>();
  p.seq_lens = key_len.const_data_ptr<int>();
  p.num_blocks = int(key.size(0));  // rows that key_start + position must stay below
  p.block_size = 1;
  p.max_key_len = int(std::min({max_key_len, key.size(0), kNoWindow}));
  p.num_kv_heads = int(key.size(1));
  Pair result = begin_call("flash_attention", p, query, query_start, query_len, max_query_len, scale, causal,
                           alibi_slopes, sliding_window, softcap, sinks, return_lse);
  if (query.numel() == 0) return result;
  const cudaStream_t stream = current_stream(query);
  if (query.scalar_type() == ScalarType::Float) {
    launch_simt(p, KVType::kSame, 0, query, stream);
  } else {
    launch_prefill(p, query.scalar_type(), KVType::kSame, stream);
  }
  return result;
}

template <class T>
void launch_decode_bucket(const AttentionParams& p, KVType kv, int num_splits, const Tensor& like,
                          cudaStream_t stream) {
  const auto launch = p.head_dim <= 32    ? launch_decode_dim<T, 32>
                      : p.head_dim <= 64  ? launch_decode_dim<T, 64>
                      : p.head_dim <= 96  ? launch_decode_dim<T, 96>
                      : p.head_dim <= 128 ? launch_decode_dim<T, 128>
                      : p.head_dim <= 192 ? launch_decode_dim<T, 192>
                                          : launch_decode_dim<T, 256>;
  launch(p, kv, num_splits, like, stream);
}

}  // namespace

void launch_decode(const AttentionParams& p, ScalarType dtype, KVType kv, int num_splits, const Tensor& like,
                   cudaStream_t stream) {
  if (dtype == ScalarType::Half)
    launch_decode_bucket<__half>(p, kv, num_splits, like, stream);
  else
    launch_decode_bucket<__nv_bfloat16>(p, kv, num_splits, like, stream);
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, paged_attention, pagedkv::paged_attention_cuda);
  PAGEDKV_IMPL(m, paged_attention_v1, pagedkv::paged_attention_v1_cuda);
  PAGEDKV_IMPL(m, paged_attention_v2, pagedkv::paged_attention_v2_cuda);
  PAGEDKV_IMPL(m, flash_attention, pagedkv::flash_attention_cuda);
}
