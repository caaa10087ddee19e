// Attention of many query rows over a paged or dense KV cache on tensor cores (mma.sync m16n8k16, float32 sums). On
// Hopper paged_prefill_sm90.cuh takes most calls.
//
// Algorithm: FlashAttention-2 (Dao, 2023, arXiv:2307.08691) over the pages of PagedAttention (Kwon et al., 2023,
// arXiv:2309.06180). A CTA owns kRows query rows of one sequence and one KV head and walks over the keys that any of
// them sees, kKeys at a time, with an online softmax. The query heads that share a KV head are packed as rows
// (row = token * group + head in group), so the group reads K and V once and the causal edge cuts finer. Tiles outside
// the causal edge or the sliding window are never visited; only tiles that an edge crosses pay for masking.
//
// A row's result does not depend on its neighbours: tiles start at multiples of kKeys from key 0, and the running
// maximum is kept per row. Hence chunked prefill over a cached prefix adds up the same terms as prefill in one go.
//
// Pipeline, one iteration of the loop (16-bit cache):
//     wait for tile j | barrier | cp.async tile j + 1 | page ids of j + 2 -> register | S = QK, softmax, O += PV |
//     row offsets of j + 2 -> shared
// Two stages of K and V, one barrier a tile. An 8-bit cache has one stage of raw bytes and one of 16-bit values: each
// thread converts the bytes it fetched itself, with a second barrier. K exactly: its scales multiply the float32
// logits, which so carry no rounding of K. V to value * scale (float32, rounded once).
//
// Shared memory: Q [kRows][kDim], K and V [kKeys][kDim], 16 bytes as the unit ("chunk"); a row's chunks are permuted by
// xor with its row number so that the eight rows of an ldmatrix and the stores of cp.async hit all banks. From head_dim
// 192 on Q moves into registers, and K and V use its space. Beside them, for each key of the next tiles, the byte
// offsets of its rows of K and V and a bit "may be read": pages are resolved once per key, not per thread.
//
// Registers: a warp owns 16 or 32 whole rows. Lane l holds of a 16 x 8 accumulator the rows l / 4 and l / 4 + 8,
// columns 2 (l % 4) and the next, which packed to 16 bit is the A operand of PV as it stands.
//
// Floor: 4 * rows * keys * head_dim flops (half of it when causal). On an H200 mma.sync comes to 651 TFLOP/s from
// registers and to 632 with an ldmatrix.x4 to 3.2 products, as here (wgmma to about 790). Measured there, causal, 32/8
// heads of 128, pages of 16, in TFLOP/s of 2k, 8k and 32k tokens:
//   178, 311, 329  with fragments read where they are needed
//   198, 345, 363  one ahead of the products that take them. Without that, and as soon as registers spill, ptxas gives
//                  all fragments of an operand the same four registers, and each ldmatrix waits for the products of the
//                  one before.
//   291, 358, 373  the longest rows of all heads first; head after head the last one's longest rows came last
// FlashAttention-2 (PyTorch's, contiguous keys): 212, 321, 346. Of the warps' time 44 % goes to the products, 19 % to
// the copies of the next tile, which wait for the rows' offsets one after the other (a barrier included). A soft cap of
// 50 at 8k: 219, 248, 307 (with tanh.approx where no lse is asked for, as on Hopper). Tried without gain: two fragments
// ahead, the next tile's copies behind Q K, the exponentials of 16 keys under the products of the 16 before, and
// softmax and products in turns by two halves of a CTA's warps (290 at 8k).
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_math.cuh"

namespace pagedkv::prefill {

// Four stored bytes, times scale.
template <KVType kKV>
__device__ __forceinline__ void dequantize(uint32_t bytes, float scale, float (&x)[4]) {
  if constexpr (kKV == KVType::kFp8) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __nv_fp8x2_storage_t two = __nv_fp8x2_storage_t(bytes >> (16 * i));
      const float2 f = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(two, __NV_E4M3)));
      x[2 * i] = f.x * scale;
      x[2 * i + 1] = f.y * scale;
    }
  } else {
    // 0x4B0000uu is the float 2^23 + uu, so that int8 + 128 needs a byte permute and a subtraction, both exact
    const uint32_t shifted = bytes ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = (__uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7440 + i)) - 8388736.f) * scale;
  }
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

// Everything the kernel needs, worked out on the host. Strides are in bytes; each row of a dense tensor is a page.
struct Params {
  AttentionParams a;
  int64_t k_block, k_token, k_head, v_block, v_token, v_head;
  int page_shift, pages, table_width;
  int group;             // query heads of one KV head
  uint32_t group_magic;  // ceil(2^31 / group): floor(x / group) = (2 x magic) >> 32 for small x
  int row_tiles;         // CTAs of one sequence and KV head
  int side;              // pairs of a sequence and a KV head whose CTAs run side by side
  bool q_vectors;        // rows of the query are aligned to 16 bytes
  bool fp8;
  bool plain;         // logits are scaled dot products, whose scale is in exp2_scale
  float tanh_scale;   // softcap: scale / softcap
  float logit_scale;  // what a raw dot product is multiplied by before ALiBi; 1 when exp2_scale does it
  float exp2_scale;   // from the masked logits to powers of two; positive
};

constexpr int kRows = 128;  // of the query in a CTA

template <int kDim_, bool kQuantized>
struct Shape {
  static constexpr int kDim = kDim_;
  static constexpr bool kWide = kDim > 128;  // 32 rows of accumulators would not fit a warp's registers
  static constexpr int kWarps = kWide ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kWide ? 1 : 2;  // blocks of 16 rows in a warp
  static constexpr int kWarpRows = 16 * kBlocks;
  static_assert(kWarps * kWarpRows == kRows);
  static constexpr int kKeys = kDim > 192 ? 32 : 64;
  static constexpr int kMinCtas = kWide ? 1 : kDim > 64 ? 2 : 3;

  static constexpr int kChunks = kDim / 8;            // 16-byte chunks in a row
  static constexpr int kSwizzle = kDim % 64 ? 4 : 8;  // chunks that change places with each other
  static constexpr int kRowBytes = 2 * kDim;
  // threads side by side on a row, each with kColumns chunks, kLanes apart; rows kStep apart
  static constexpr int kLanes = kChunks & -kChunks;
  static constexpr int kColumns = kChunks / kLanes;
  static constexpr int kStep = kThreads / kLanes;
  static_assert(kStep % 8 == 0 && 32 % kStep == 0 && kKeys % kStep == 0, "a thread keeps its swizzle down the rows");

  static constexpr int kQBytes = kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * kRowBytes;  // K or V of one stage
  static constexpr int kStages = kQuantized ? 1 : 2;
  static constexpr int kRawBytes = kQuantized ? kKeys * kDim : 0;
  static constexpr int kKvBytes = kStages * 2 * kTileBytes + 2 * kRawBytes;
  static constexpr int kKvStart = kWide ? 0 : kQBytes;
  static constexpr int kTablesStart = std::max(kQBytes, kKvStart + kKvBytes);
};

// The rows of K and V of one key: byte offsets, and the index of its scales.
template <bool kQuantized>
struct KeyRow {
  int64_t k, v;
};
template <>
struct KeyRow<true> {
  int64_t k, v, scale, padding;  // k and v are read as one 16-byte word
};

template <class S, bool kQuantized>
struct Tables {
  KeyRow<kQuantized> rows[2][S::kKeys];          // of tiles j and j + 1
  float k_scales[2][kQuantized ? S::kKeys : 2];  // of tiles j and j + 1
  float v_scales[kQuantized ? S::kKeys : 1];
  uint32_t readable[4][S::kKeys / 32];  // of tiles j .. j + 2: key is needed and its page exists
};

template <int kDim, bool kQuantized>
constexpr int kSharedBytes =
    Shape<kDim, kQuantized>::kTablesStart + int(sizeof(Tables<Shape<kDim, kQuantized>, kQuantized>));

// The address of a lane's chunk `column` further right (even), where `base` is its chunk in column 0 or 1.
template <class S>
__device__ __forceinline__ uint32_t at_column(uint32_t base, int column) {
  return (base ^ ((column & (S::kSwizzle - 1)) << 4)) + (column / S::kSwizzle) * (S::kSwizzle * 16);
}

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class T, int kDim, bool kQuantized>
__global__ void __launch_bounds__(Shape<kDim, kQuantized>::kThreads, Shape<kDim, kQuantized>::kMinCtas)
    paged_prefill_kernel(const __grid_constant__ Params p) {
  using S = Shape<kDim, kQuantized>;
  constexpr int kKeys = S::kKeys, kBlocks = S::kBlocks;
  extern __shared__ __align__(128) unsigned char shared[];
  auto& tables = *reinterpret_cast<Tables<S, kQuantized>*>(shared + S::kTablesStart);
  const AttentionParams& a = p.a;

  // Which rows. Pairs of a sequence and a KV head go in sections whose keys and values the L2 cache keeps. In a section
  // the last tiles of all come first: under a causal mask they are the longest.
  const int pairs = a.num_seqs * a.num_kv_heads, section = int(blockIdx.x / (p.side * p.row_tiles)) * p.side;
  const int nth = int(blockIdx.x) - section * p.row_tiles, width = min(p.side, pairs - section);
  const int row_tile = p.row_tiles - 1 - nth / width, pair = section + nth % width;
  const int sequence = pair / a.num_kv_heads, kv_head = pair - sequence * a.num_kv_heads;
  const int query_len = a.query_len[sequence], seq_len = a.seq_lens[sequence];
  const int first_row = row_tile * kRows;
  if (query_len <= 0 || seq_len <= 0 || first_row / p.group >= query_len) return;
  const int first_token = first_row / p.group;
  const int first_head = first_row - first_token * p.group;
  const int rows = int(min(int64_t(kRows), int64_t(query_len) * p.group - first_row));
  const int query_start = a.query_start[sequence];
  const int shift = seq_len - query_len;  // from a query's token number to its position

  // Row r of the tile is (token, head): its token counted from the sequence's first
  auto token_of = [&](int r) { return first_token + int(__umulhi(2u * uint32_t(first_head + r), p.group_magic)); };
  auto head_of = [&](int r, int token) { return first_head + r - (token - first_token) * p.group; };
  const int keys = readable_keys(a, seq_len);
  const int last_token = token_of(rows - 1);
  const auto [begin, end] = visible_keys(a, shift + first_token, shift + last_token, keys);  // seen by some row
  if (begin >= end) return;
  // Seen by every row: from where the last row's keys begin to where the first row's end
  const int all_begin = visible_keys(a, shift + last_token, keys).lo;
  const int all_end = visible_keys(a, shift + first_token, keys).hi;
  const int first_tile = begin / kKeys, last_tile = (end - 1) / kKeys;

  const int thread = threadIdx.x, lane = thread & 31;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);  // tells the compiler that it is uniform
  // Keys from here on are invisible to all rows of this warp
  const int warp_row = warp * S::kWarpRows;
  const int warp_token = token_of(min(rows, warp_row + S::kWarpRows) - 1);
  const int warp_end = warp_row < rows ? visible_keys(a, shift + warp_token, keys).hi : 0;

  // Pages: thread t looks after key t of each tile. Keys that no row needs, pages that do not exist and rows outside of
  // a dense tensor are not readable: they come in as zeros and are masked, whatever lies there.
  const int* table = a.block_tables ? a.block_tables + sequence * a.table_stride : a.key_start + sequence;
  auto page_of = [&](int tile) {
    const int key = tile * kKeys + thread, index = key >> p.page_shift;
    if (key < begin || key >= end || index >= p.table_width) return -1;
    return a.block_tables ? table[index] : int(uint32_t(*table) + uint32_t(key));
  };
  auto write_rows = [&](int tile, int page) {
    const bool ok = uint32_t(page) < uint32_t(p.pages);
    const int64_t block = ok ? page : 0;
    const int64_t token = ok ? (tile * kKeys + thread) & int((1u << p.page_shift) - 1) : 0;
    KeyRow<kQuantized>& row = tables.rows[tile & 1][thread];
    row.k = block * p.k_block + token * p.k_token;
    row.v = block * p.v_block + token * p.v_token;
    if constexpr (kQuantized) row.scale = ((block << p.page_shift) + token) * a.num_kv_heads + kv_head;
    const uint32_t bits = __ballot_sync(~0u, ok);
    if (lane == 0) tables.readable[tile & 3][thread / 32] = bits;
  };

  // Loads: this thread's place in a tile
  const int column = thread % S::kLanes, row0 = thread / S::kLanes;
  const int columns = a.head_dim / 8;  // chunks of 8 elements that exist; the rest of the tile is zero
  const uint32_t q_shared = smem_address(shared), kv_shared = smem_address(shared + S::kKvStart);
  const uint32_t place = swizzle<S::kChunks>(row0, column) * 16;
  constexpr int kChunkBytes = kQuantized ? 8 : 16;  // of the cache, in global memory
  const int64_t column_bytes = (column < columns ? column : 0) * kChunkBytes;
  const char* const k_base = static_cast<const char*>(a.k) + kv_head * p.k_head + column_bytes;
  const char* const v_base = static_cast<const char*>(a.v) + kv_head * p.v_head + column_bytes;
  constexpr int kRaw = S::kStages * 2 * S::kTileBytes;  // raw bytes of an 8-bit cache, behind the 16-bit tiles

  auto load_tile = [&](int tile) {
    const auto* key_rows = tables.rows[tile & 1];
#pragma unroll
    for (int i = 0; i < kKeys; i += S::kStep) {
      const KeyRow<kQuantized>& row = key_rows[row0 + i];
      const bool ok = (tables.readable[tile & 3][i / 32] >> (row0 + i % 32)) & 1;
      const char *k = k_base + row.k, *v = v_base + row.v;
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c) {
        const bool exists = ok && column + c * S::kLanes < columns;
        if constexpr (kQuantized) {
          const uint32_t dst = kv_shared + kRaw + (row0 + i) * kDim + (column + c * S::kLanes) * 8;
          cp_async<8>(dst, k + c * S::kLanes * 8, exists);
          cp_async<8>(dst + S::kRawBytes, v + c * S::kLanes * 8, exists);
        } else {
          const uint32_t stage = kv_shared + (tile & 1) * 2 * S::kTileBytes;
          const uint32_t dst = stage + place + i * S::kRowBytes + c * S::kLanes * 16;
          cp_async<16>(dst, k + c * S::kLanes * 16, exists);
          cp_async<16>(dst + S::kTileBytes, v + c * S::kLanes * 16, exists);
        }
      }
    }
    if constexpr (kQuantized)
      if (thread < kKeys) {
        const bool ok = (tables.readable[tile & 3][thread / 32] >> lane) & 1;
        const int64_t scale = key_rows[thread].scale;
        cp_async<4>(smem_address(&tables.k_scales[tile & 1][thread]), a.k_scale + scale, ok);
        cp_async<4>(smem_address(&tables.v_scales[thread]), a.v_scale + scale, ok);
      }
  };
  // 8-bit cache: the bytes that this thread fetched -> 16-bit values in the tile
  auto dequantize_tile = [&]<KVType kKV>() {
#pragma unroll
    for (int i = 0; i < kKeys; i += S::kStep) {
      const float v_scale = tables.v_scales[kQuantized ? row0 + i : 0];
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c) {
        const unsigned char* const raw = shared + S::kKvStart + kRaw + (row0 + i) * kDim + (column + c * S::kLanes) * 8;
        unsigned char* const values = shared + S::kKvStart + place + i * S::kRowBytes + c * S::kLanes * 16;
        const uint2 k = *reinterpret_cast<const uint2*>(raw), v = *reinterpret_cast<const uint2*>(raw + S::kRawBytes);
        uint4 k_values;
        dequantize4<T, kKV, true>(k.x, k_values.x, k_values.y);
        dequantize4<T, kKV, true>(k.y, k_values.z, k_values.w);
        *reinterpret_cast<uint4*>(values) = k_values;
        float low[4], high[4];
        dequantize<kKV>(v.x, v_scale, low);
        dequantize<kKV>(v.y, v_scale, high);
        *reinterpret_cast<uint4*>(values + S::kTileBytes) = make_uint4(
            pack2<T>(low[0], low[1]), pack2<T>(low[2], low[3]), pack2<T>(high[0], high[1]), pack2<T>(high[2], high[3]));
      }
    }
  };

  // Queries -> shared memory
  if (thread < kKeys) {
    write_rows(first_tile, page_of(first_tile));
    write_rows(first_tile + 1, page_of(first_tile + 1));
  }
#pragma unroll 1
  for (int r = row0; r < kRows; r += S::kStep) {
    const int token = token_of(r);
    const int64_t q_row = int64_t(query_start) + token;
    const bool ok = r < rows && q_row >= 0 && q_row < a.num_tokens;
    const int64_t offset =
        ok ? q_row * a.q_stride_t + (kv_head * int64_t(p.group) + head_of(r, token)) * a.q_stride_h : 0;
#pragma unroll
    for (int c = 0; c < S::kColumns; ++c) {
      const int q_column = column + c * S::kLanes;
      const bool exists = ok && q_column < columns;
      const uint32_t dst = (r - row0) * S::kRowBytes + place + c * S::kLanes * 16;
      const T* src = static_cast<const T*>(a.q) + offset + (exists ? q_column * 8 : 0);
      if (p.q_vectors) {
        cp_async<16>(q_shared + dst, src, exists);
      } else {
        Vec<T, 8> x;
#pragma unroll
        for (int i = 0; i < 8; ++i) x.v[i] = exists ? src[i] : T(0.f);
        *reinterpret_cast<Vec<T, 8>*>(shared + dst) = x;
      }
    }
  }

  // Fragments: the chunk that this lane addresses for an ldmatrix of Q, K or V, in column 0 or 1 of its first row
  auto fragment = [&](uint32_t base, int row, int half) { return base + swizzle<S::kChunks>(row, half) * 16; };
  const uint32_t q_fragment = fragment(q_shared + warp_row * S::kRowBytes, lane & 15, lane >> 4);
  const uint32_t k_fragment = fragment(kv_shared, (lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  const uint32_t v_fragment = fragment(kv_shared + S::kTileBytes, lane & 15, lane >> 4);

  uint32_t q_registers[S::kWide ? kDim / 16 : 1][4];
  if constexpr (S::kWide) {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) ldmatrix_x4(q_registers[d], at_column<S>(q_fragment, 2 * d));
  }
  __syncthreads();
  load_tile(first_tile);
  cp_async_commit();

  float out[kBlocks][kDim / 8][4];  // unnormalised
  float top[kBlocks][2];            // a row's maximum, in powers of two
  float sum[kBlocks][2];            // this lane's part of the sum of exponentials
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[b][d][i] = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) top[b][h] = kNegInf, sum[b][h] = 0.f;
  }
  // Row (b, h) of this lane, counted from the CTA's first
  auto row_of = [&](int b, int h) { return warp_row + b * 16 + h * 8 + (lane >> 2); };

#pragma unroll 1
  for (int tile = first_tile; tile <= last_tile; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (kQuantized) {
      if (p.fp8) {
        dequantize_tile.template operator()<KVType::kFp8>();
      } else {
        dequantize_tile.template operator()<KVType::kInt8>();
      }
      __syncthreads();
    }
    if (tile < last_tile) load_tile(tile + 1);
    cp_async_commit();
    const bool look_ahead = thread < kKeys && tile + 2 <= last_tile;
    const int page = look_ahead ? page_of(tile + 2) : -1;

    const int key0 = tile * kKeys;
    if (key0 < warp_end) {
      const uint32_t stage = S::kStages == 2 ? (tile & 1) * 2 * S::kTileBytes : 0;
      // S = Q K
      float s[kBlocks][kKeys / 8][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[b][n][i] = 0.f;
      constexpr int kTiles = kKeys / 16;
      uint32_t q[2][kBlocks][4], k[2][4];
      auto load_q = [&](int d) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
          if constexpr (S::kWide) {
#pragma unroll
            for (int i = 0; i < 4; ++i) q[d & 1][b][i] = q_registers[d][i];
          } else {
            ldmatrix_x4(q[d & 1][b], at_column<S>(q_fragment, 2 * d) + b * 16 * S::kRowBytes);
          }
      };
      auto load_k = [&](int d, int n) {
        ldmatrix_x4(k[(d * kTiles + n) & 1], at_column<S>(k_fragment + stage, 2 * d) + n * 16 * S::kRowBytes);
      };
      load_q(0);
      load_k(0, 0);
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          if (n == 0 && d + 1 < kDim / 16) load_q(d + 1);
          if (n + 1 < kTiles)
            load_k(d, n + 1);
          else if (d + 1 < kDim / 16)
            load_k(d + 1, 0);
          const auto& f = k[(d * kTiles + n) & 1];
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            mma_16816<T>(s[b][2 * n], q[d & 1][b], f[0], f[1]);
            mma_16816<T>(s[b][2 * n + 1], q[d & 1][b], f[2], f[3]);
          }
        }

      if constexpr (kQuantized) {
        const float* scales = tables.k_scales[tile & 1] + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * n);
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h) s[b][n][2 * h] *= scale.x, s[b][n][2 * h + 1] *= scale.y;
        }
      }

      // Whatever the plain case lacks, behind one branch
      uint32_t all_readable = tables.readable[tile & 3][0];
#pragma unroll
      for (int w = 1; w < kKeys / 32; ++w) all_readable &= tables.readable[tile & 3][w];
      const bool edge = key0 < all_begin || key0 + kKeys > all_end;
      if (edge || !p.plain || all_readable != ~0u) {
        // Logits that are more than a scaled dot product
        if (a.softcap > 0.f && !a.lse) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) s[b][n][i] = a.softcap * tanh_approximate(s[b][n][i] * p.tanh_scale);
        } else if (a.softcap > 0.f) {  // an lse is float32: the logits have to be as well
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) s[b][n][i] = a.softcap * tanh_fast(s[b][n][i] * p.tanh_scale);
        } else if (p.logit_scale != 1.f) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) s[b][n][i] *= p.logit_scale;
        }
        const int lane_key = key0 + 2 * (lane & 3);  // of s[.][0][0]
        if (a.alibi_slopes) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int row = min(row_of(b, h), rows - 1), token = token_of(row);
              const float slope = a.alibi_slopes[kv_head * p.group + head_of(row, token)];
              const int distance = lane_key - (shift + token);
#pragma unroll
              for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) s[b][n][2 * h + i] += slope * float(distance + 8 * n + i);
            }
        }

        // Masks
        if (edge) {
#pragma unroll
          for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const KeyRange seen = visible_keys(a, shift + token_of(row_of(b, h)), keys);
              const int low = seen.lo - lane_key, high = seen.hi - lane_key;
#pragma unroll
              for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                  if (8 * n + i < low || 8 * n + i >= high) s[b][n][2 * h + i] = kNegInf;
            }
        }
#pragma unroll
        for (int w = 0; w < kKeys / 32; ++w) {
          const uint32_t readable = tables.readable[tile & 3][w];
          if (readable != ~0u) {
            const uint32_t bits = readable >> (2 * (lane & 3));
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
#pragma unroll
              for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                  if (!(bits >> (8 * n + (i & 1)) & 1)) s[b][4 * w + n][i] = kNegInf;
          }
        }
      }

      // Online softmax; tiles that move no maximum leave the accumulators alone. `top` is the maximum itself, not one
      // of some tiles ago: the largest term is then 1, which rounding leaves alone, and where it outweighs the others
      // that is half of the error.
      float peak[kBlocks][2];
      bool grown = false;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float x = fmaxf(s[b][0][2 * h], s[b][0][2 * h + 1]);
#pragma unroll
          for (int n = 1; n < kKeys / 8; ++n) x = fmaxf(x, fmaxf(s[b][n][2 * h], s[b][n][2 * h + 1]));
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
          x = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * p.exp2_scale;
          peak[b][h] = fmaxf(x, top[b][h]);
          grown |= peak[b][h] > top[b][h];
        }
      if (__any_sync(~0u, grown)) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float factor = peak[b][h] > top[b][h] ? exp2_fast(top[b][h] - peak[b][h]) : 1.f;
            top[b][h] = peak[b][h];
            sum[b][h] *= factor;
#pragma unroll
            for (int d = 0; d < kDim / 8; ++d) out[b][d][2 * h] *= factor, out[b][d][2 * h + 1] *= factor;
          }
      }
      float base[kBlocks][2], part[kBlocks][2];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          base[b][h] = top[b][h] == kNegInf ? 0.f : top[b][h];  // nothing seen yet: every term is 0
          part[b][h] = 0.f;
        }

      uint32_t weights[kKeys / 16][kBlocks][4];
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n)
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* const x = &s[b][2 * n + i / 2][2 * (i & 1)];
            const float low = exp2_fast(fmaf(x[0], p.exp2_scale, -base[b][i & 1]));
            const float high = exp2_fast(fmaf(x[1], p.exp2_scale, -base[b][i & 1]));
            part[b][i & 1] += low + high;
            weights[n][b][i] = pack2<T>(low, high);
          }

      // O += P V
      constexpr int kPairs = kDim / 16;
      uint32_t v[2][4];
      auto load_v = [&](int n, int d) {
        ldmatrix_x4_trans(v[(n * kPairs + d) & 1], at_column<S>(v_fragment + stage, 2 * d) + n * 16 * S::kRowBytes);
      };
      load_v(0, 0);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n)
#pragma unroll
        for (int d = 0; d < kPairs; ++d) {
          if (d + 1 < kPairs)
            load_v(n, d + 1);
          else if (n + 1 < kKeys / 16)
            load_v(n + 1, 0);
          const auto& f = v[(n * kPairs + d) & 1];
#pragma unroll
          for (int b = 0; b < kBlocks; ++b) {
            mma_16816<T>(out[b][2 * d], weights[n][b], f[0], f[1]);
            mma_16816<T>(out[b][2 * d + 1], weights[n][b], f[2], f[3]);
          }
        }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[b][h] += part[b][h];
    }
    if (look_ahead) write_rows(tile + 2, page);
  }

  // Normalise. The sink is one more term of the sum; a row that saw nothing, since no page exists, becomes 0 and -inf.
  // The output is staged over the warp's own queries, or, where wide heads need the room, over K and V.
  if constexpr (S::kWide)
    __syncthreads();
  else
    __syncwarp();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[b][h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int row = row_of(b, h), token = token_of(row);
      const int head = kv_head * p.group + head_of(row, token);
      const int64_t q_row = int64_t(query_start) + token;
      const bool seen = total != 0.f;
      float factor = seen ? 1.f : 0.f, base = top[b][h];
      if (row < rows) {
        if (seen && a.sinks) {
          const float sink = a.sinks[head] * kLog2e;
          base = fmaxf(base, sink);
          factor = exp2_fast(top[b][h] - base);
          total = total * factor + exp2_fast(sink - base);
        }
        if (seen) factor /= total;
        if (a.lse && (lane & 3) == 0 && q_row >= 0 && q_row < a.num_tokens)
          a.lse[q_row * a.num_heads + head] = seen ? base * kLn2 + logf(total) : kNegInf;
      }
      if (a.states) {
        const int first = 2 * (lane & 3);
        const bool exists = row < rows && q_row >= 0 && q_row < a.num_tokens;
        float* const target = static_cast<float*>(a.out) + (q_row * a.num_heads + head) * a.head_dim + first;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d)
          if (exists && 8 * d + first < a.head_dim)
            *reinterpret_cast<float2*>(target + 8 * d) =
                make_float2(out[b][d][2 * h] * factor, out[b][d][2 * h + 1] * factor);
        continue;
      }
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        *reinterpret_cast<uint32_t*>(shared + swizzle<S::kChunks>(row, d) * 16 + 4 * (lane & 3)) =
            pack2<T>(out[b][d][2 * h] * factor, out[b][d][2 * h + 1] * factor);
    }
  if (a.states) return;
  __syncwarp();
  // The warp's own rows, now in whole chunks
#pragma unroll 1
  for (int i = lane; i < S::kWarpRows * S::kChunks; i += 32) {
    const int row = warp_row + i / S::kChunks, chunk = i % S::kChunks;
    const int token = token_of(row);
    const int64_t q_row = int64_t(query_start) + token;
    if (row >= rows || chunk >= columns || q_row < 0 || q_row >= a.num_tokens) continue;
    const int64_t out_row = q_row * a.num_heads + kv_head * p.group + head_of(row, token);
    *reinterpret_cast<uint4*>(static_cast<T*>(a.out) + out_row * a.head_dim + chunk * 8) =
        *reinterpret_cast<const uint4*>(shared + swizzle<S::kChunks>(row, chunk) * 16);
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T, int kDim, bool kQuantized>
void launch(const Params& p, unsigned grid, cudaStream_t stream) {
  const auto kernel = paged_prefill_kernel<T, kDim, kQuantized>;
  constexpr int kBytes = kSharedBytes<kDim, kQuantized>;
  static_assert(kBytes <= 99 * 1024, "sm_86 and sm_89 give a CTA no more");
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<grid, Shape<kDim, kQuantized>::kThreads, kBytes, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// head_dim up to kDim, either kind of cache; one unit of paged_prefill_units.cu for each kDim.
template <class T, int kDim>
void launch_bucket(const Params& p, bool quantized, unsigned grid, cudaStream_t stream);

// paged_prefill_sm90.cu: launches the kernel of paged_prefill_sm90.cuh, if this device, the binary that it runs and the
// call are for it; otherwise returns false.
bool launch_sm90(const Params& p, ScalarType dtype, KVType kv, cudaStream_t stream);

}  // namespace pagedkv::prefill
