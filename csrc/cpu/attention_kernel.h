// What the attention kernels are given and give: plain C structs, so that the units compiled for one instruction set
// need no C++ library header (see simd.h).
#pragma once

#include <stdint.h>

namespace pagedkv {

enum AttentionType { kF32, kF16, kBF16, kI8, kF8E4M3 };

// One call. Strides are in elements.
struct AttentionArgs {
  const void* q;  // [T, Hq, D], unit stride in D
  const void* k;  // paged: [num_blocks, block_size, Hkv, D]; dense: [K, Hkv, D], unit stride in D
  const void* v;
  const float* k_scale;  // [num_blocks, block_size, Hkv] contiguous, or null
  const float* v_scale;
  void* out;                  // [T, Hq, D] contiguous
  float* lse;                 // [T, Hq], or null
  bool states;                // out is float32 whatever the query, lse [T, Hq, 2]: maximum, sum of exponentials
  const float* alibi_slopes;  // [Hq], or null
  const float* sinks;         // [Hq], or null
  int64_t q_stride_t, q_stride_h;
  int64_t k_stride_block, k_stride_t, k_stride_h;
  int64_t v_stride_block, v_stride_t, v_stride_h;
  const int32_t* block_tables;  // paged: [S, max_blocks]; null: dense
  int64_t table_stride;
  int block_shift;                       // block_size = 1 << block_shift
  const int32_t* key_start;              // dense: [S], first row of each sequence in k and v
  const int32_t* key_len;                // [S]
  const int32_t* query_start;            // [S]
  const int32_t* query_len;              // [S]
  int heads, kv_heads, group, head_dim;  // group = heads / kv_heads
  float scale, softcap;                  // softcap 0: off
  int64_t window;                        // 0: off
  bool causal;
  AttentionType q_type, kv_type;
};

// Unnormalised results over some of a row's keys: sum of exp(l - max) v, max of l, and sum of exp(l - max).
struct AttentionPartials {
  float* out;  // [splits, rows, D rounded up to 32]
  float* max;  // [splits, rows]
  float* sum;  // [splits, rows]
};

// One piece of work. The rows of a KV head are its group's query heads for each query token: row m is token m / group
// and head kv_head * group + m % group.
struct AttentionItem {
  int32_t sequence;
  int32_t head_begin, head_end;  // KV heads; one if `tiled`
  int32_t row_begin, row_end;
  int32_t key_begin, key_end;
  int32_t split;      // -1: the whole of the keys, written to `out`; else into the partials
  int32_t part_base;  // row 0 of KV head 0 of this sequence in the partials
  bool tiled;         // many rows: K and V are packed once a tile and multiplied as matrices
};

constexpr int kDirectRows = 16;  // the most rows of an item that is not tiled
constexpr int kTiledRows = 192;  // and of one that is; a multiple of 6, the rows of the matrix kernel

struct AttentionKernels {
  // Bytes of scratch that `run` needs for this item, 64-byte aligned.
  int64_t (*scratch)(const AttentionArgs*, const AttentionItem*);
  void (*run)(const AttentionArgs*, const AttentionItem*, const AttentionPartials*, int64_t part_rows, char* scratch);
  // Rows of one KV head whose partials are complete -> out and lse. `splits` of them, `part_rows` rows apart.
  void (*combine)(const AttentionArgs*, const AttentionItem*, const AttentionPartials*, int64_t part_rows, int splits);
  // out = weight_a a + weight_b b, rows [D]; what has no weight is not read. `from` is kF32 or `to`.
  void (*merge)(AttentionType from, AttentionType to, int64_t head_dim, const void* a, float weight_a, const void* b,
                float weight_b, void* out);
};

const AttentionKernels* attention_generic();
const AttentionKernels* attention_avx2();
const AttentionKernels* attention_avx512();
const AttentionKernels* attention_avx512bf16();

}  // namespace pagedkv
