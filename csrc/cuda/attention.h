// What every attention kernel is given: one struct, and the launchers that attention.cu chooses between.
#pragma once

#include "cuda_common.h"

namespace pagedkv {

enum class KVType { kSame, kInt8, kFp8 };  // storage of the cache; kSame is the query's dtype

struct AttentionParams {
  const void* q;  // [T, Hq, D], unit stride in D
  int64_t q_stride_t, q_stride_h;
  const void* k;  // paged: [num_blocks, block_size, Hkv, D]; dense: [K, Hkv, D] (k_stride_block unused)
  const void* v;
  int64_t k_stride_block, k_stride_t, k_stride_h;  // elements; t: one token inside its block (or dense row)
  int64_t v_stride_block, v_stride_t, v_stride_h;
  const float* k_scale;  // [num_blocks, block_size, Hkv] contiguous, or null
  const float* v_scale;

  const int* block_tables;  // paged: [S, max_blocks]; null: dense
  int64_t table_stride;
  int max_blocks, num_blocks, block_size, block_shift;  // block_size = 1 << block_shift; dense: num_blocks = K rows
  const int* key_start;    // dense: [S], first row of each sequence in k and v; null when paged
  const int* seq_lens;     // [S], keys of each sequence
  const int* query_start;  // [S]
  const int* query_len;    // [S]
  int max_query_len;       // upper bound known on the host
  int max_key_len;         // likewise: max_blocks * block_size, or the dense argument

  const float* alibi_slopes;  // [Hq] or null
  const float* sinks;         // [Hq] or null
  float scale, softcap;       // softcap 0: off
  int window;                 // 0: off
  bool causal;

  void* out;    // [T, Hq, D] contiguous
  bool states;  // out is float32, whatever the queries are: results that are still to be merged with others
  float* lse;   // [T, Hq] natural log, or null

  // Rows that no sequence owns or that see no key become 0 and -inf. filled: somebody else sees to them.
  bool filled;

  int num_seqs, num_heads, num_kv_heads, head_dim, num_tokens;
};

// attention.cu. The tensors of a paged call into p, but for the query's.
void set_cache(AttentionParams& p, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
               const Tensor& seq_lens, const OptTensor& k_scale, const OptTensor& v_scale);
KVType kv_type(const Tensor& cache);
// What all calls share, once the cache's part of p is set. Allocates the outputs.
Pair begin_call(const char* op, AttentionParams& p, const Tensor& query, const Tensor& query_start,
                const Tensor& query_len, int64_t max_query_len, double scale, bool causal,
                const OptTensor& alibi_slopes, int64_t window, double softcap, const OptTensor& sinks, bool return_lse);

// paged_prefill.cu: 16-bit queries, one pass over the keys for each tile of query rows (mma.sync, cp.async).
// Paged (kSame, int8, fp8) and dense (kSame).
void launch_prefill(const AttentionParams& p, ScalarType dtype, KVType kv, cudaStream_t stream);

// paged_decode.cu: 16-bit queries, split-KV partitions with the GQA group packed as rows, combined afterwards.
// num_splits 0: planned on the device; kInvariant: by the length of each sequence alone. `like` allocates the workspace
// through torch's caching allocator. p.filled: rows that see no key are 0 already.
void launch_decode(const AttentionParams& p, ScalarType dtype, KVType kv, int num_splits, const Tensor& like,
                   cudaStream_t stream);

// paged_simt.cu: float32 queries (tensor cores would round to tf32), paged or dense, one pass or split.
void launch_simt(const AttentionParams& p, KVType kv, int num_splits, const Tensor& like, cudaStream_t stream);

}  // namespace pagedkv
