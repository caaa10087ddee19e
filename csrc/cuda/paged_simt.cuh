// Attention with float32 queries on CUDA cores (tensor cores would round to tf32), over a paged cache (float32, int8,
// fp8) or dense tensors (float32), for any number of query rows.
//
// A CTA of 128 threads works through its pieces of the plan (attention_plan.cuh), 16 query rows at a time, in tiles of
// 64 keys: K is dequantised into shared memory; S = Q K^T with one key and 8 rows a thread; an online softmax with 4
// rows a warp; V replaces K; O += P V with 4 rows and 4 columns a thread (float4 of V times four broadcast weights).
// The softmax runs on natural logits here (attention_plan.cuh, Logits).
//
// Shared memory, floats: K or V [64, kDim + 4] (the 4 put the rows' float4 on different banks; it also hands the result
// to finish_piece), Q [16, kDim], weights [64 keys, 20] for 16 rows, row states. 88 KB at kDim 256.
//
// Floor: max(KV bytes / memory bandwidth, 4 * rows * keys * head_dim flops / 67 TFLOP/s on an H200). Sources:
// FlashAttention-2 (arXiv:2307.08691), Flash-Decoding (2023).
#pragma once

#include "attention_plan.cuh"

namespace pagedkv {

constexpr int kSimtThreads = 128;
constexpr int kKeyTile = 64;

template <int kDim>
struct SimtLayout {
  static constexpr int kStride = kDim + 4;  // floats of a K or V row
  static_assert(kKeyTile * kStride >= kRowTile * part_row<kDim>);
  static constexpr int kWeights = kRowTile + 4;
  float rows[kKeyTile * kStride];
  float query[kRowTile * kDim];
  float weights[kKeyTile * kWeights];
  int64_t k_at[kKeyTile], v_at[kKeyTile];  // element offsets, -1: not to be read
  float k_scale[kKeyTile], v_scale[kKeyTile];
  float shrink[kRowTile];
  Part part;
  PlanScratch plan;
};

template <KVType kKV, int kDim>
__global__ void __launch_bounds__(kSimtThreads)
    attention_simt_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan,
                          bool query_vectors) {
  using L = SimtLayout<kDim>;
  constexpr bool kQuantized = kKV != KVType::kSame;
  constexpr int kRowsEach = 8;                                      // rows of S a thread
  constexpr int kCells = (kDim + kSimtThreads - 1) / kSimtThreads;  // 4 x 4 cells of O a thread, kDim in all
  constexpr int kColumns = kDim / 4;
  static_assert(kSimtThreads / kKeyTile * kRowsEach == kRowTile && kSimtThreads / 32 * 4 == kRowTile);

  begin_planned(p, plan);
  extern __shared__ __align__(128) uint8_t shared[];
  L& s = *reinterpret_cast<L*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool paged = p.block_tables != nullptr;

  Stretch stretch = plan_stretch<false>(p, plan, s.plan);
  int pending = 0;
#pragma unroll 1
  while (stretch.left > 0) {
    const Run run = next_run(p, plan, stretch);
    for (int i = threadIdx.x; i < kRowTile * kColumns; i += kSimtThreads) {
      const int r = i / kColumns, col = i % kColumns * 4;
      float4 value = make_float4(0.f, 0.f, 0.f, 0.f);
      const int64_t row = r < run.rows ? run.query_row(p, plan, r) : -1;
      if (row >= 0 && col < p.head_dim) {
        const float* q = static_cast<const float*>(p.q) + row * p.q_stride_t + run.head(plan, r) * p.q_stride_h + col;
        value = query_vectors ? *reinterpret_cast<const float4*>(q) : make_float4(q[0], q[1], q[2], q[3]);
      }
      *reinterpret_cast<float4*>(s.query + r * kDim + col) = value;
    }

    // S: this thread's key in a tile and its first row; softmax: rows 4 * warp .. + 3
    const int my_key = threadIdx.x % kKeyTile, my_row = threadIdx.x / kKeyTile * kRowsEach;
    float top[4] = {kNegInf, kNegInf, kNegInf, kNegInf}, sum[4] = {};
    float4 o[kCells][4] = {};

    // K or V of the tile -> s.rows, zeros where nothing may be read
    auto load_rows = [&](const void* base, const int64_t* at, const float* scale) {
      for (int i = threadIdx.x; i < kKeyTile * (kDim / 8); i += kSimtThreads) {
        const int r = i / (kDim / 8), col = i % (kDim / 8) * 8;
        float x[8] = {};
        if (at[r] >= 0 && col < p.head_dim) {
          if constexpr (kQuantized) {
            const uint2 bytes = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(base) + at[r] + col);
#pragma unroll
            for (int b = 0; b < 8; ++b)
              x[b] = dequantize1<kKV>(uint8_t((b < 4 ? bytes.x : bytes.y) >> (8 * (b % 4)))) * scale[r];
          } else {
            const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(base) + at[r] + col);
            const float4 a = from[0], b = from[1];
            x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
          }
        }
        float4* to = reinterpret_cast<float4*>(s.rows + r * L::kStride + col);
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
      }
    };

    for (int key = run.key_begin; key < run.key_end; key += kKeyTile) {
      if (threadIdx.x < kKeyTile) {
        const int pos = key + int(threadIdx.x);
        int64_t k_at = -1, v_at = -1;
        if (pos >= run.seen.lo && pos < run.key_end) {
          if (paged) {
            const int block = block_of(p, run.seq, pos);
            if (block >= 0) {
              k_at = k_offset(p, block, pos, run.kv_head), v_at = v_offset(p, block, pos, run.kv_head);
              if constexpr (kQuantized) {
                const int64_t at = scale_offset(p, block, pos, run.kv_head);
                s.k_scale[threadIdx.x] = p.k_scale[at], s.v_scale[threadIdx.x] = p.v_scale[at];
              }
            }
          } else {
            const int64_t row = int64_t(p.key_start[run.seq]) + pos;
            if (row >= 0 && row < p.num_blocks) {
              k_at = row * p.k_stride_t + run.kv_head * p.k_stride_h;
              v_at = row * p.v_stride_t + run.kv_head * p.v_stride_h;
            }
          }
        }
        s.k_at[threadIdx.x] = k_at, s.v_at[threadIdx.x] = v_at;
      }
      __syncthreads();
      load_rows(p.k, s.k_at, s.k_scale);
      __syncthreads();

      float4 parts[kRowsEach] = {};  // four sums a dot product: less rounding than one long chain
#pragma unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const float4 k = *reinterpret_cast<const float4*>(s.rows + my_key * L::kStride + 4 * c);
#pragma unroll
        for (int r = 0; r < kRowsEach; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(s.query + (my_row + r) * kDim + 4 * c);
          parts[r].x += q.x * k.x, parts[r].y += q.y * k.y, parts[r].z += q.z * k.z, parts[r].w += q.w * k.w;
        }
      }
      float x[kRowsEach];
      const int pos = key + my_key;
      const bool readable = s.k_at[my_key] >= 0;
#pragma unroll
      for (int r = 0; r < kRowsEach; ++r) {
        const int row = my_row + r;
        bool visible = false;
        x[r] = (parts[r].x + parts[r].y) + (parts[r].z + parts[r].w);
        if (readable && row < run.rows) {
          const int position = run.position(plan, row);
          const KeyRange seen = visible_keys(p, position, run.keys);
          visible = pos >= seen.lo && pos < seen.hi;
          x[r] *= p.scale;
          if (p.softcap > 0) x[r] = p.softcap * tanhf(x[r] / p.softcap);
          if (p.alibi_slopes) x[r] += p.alibi_slopes[run.head(plan, row)] * float(pos - position);
        }
        if (!visible) x[r] = kNegInf;
      }
      float4* const to = reinterpret_cast<float4*>(s.weights + my_key * L::kWeights + my_row);
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
      __syncthreads();

#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 4 * warp + r;
        float* const a = s.weights + lane * L::kWeights + row;
        float* const b = a + 32 * L::kWeights;
        const float xa = *a, xb = *b;
        float tile_top = fmaxf(xa, xb);
        for (int d = 16; d > 0; d /= 2) tile_top = fmaxf(tile_top, __shfl_xor_sync(0xffffffffu, tile_top, d));
        const float now = fmaxf(top[r], tile_top), base = now == kNegInf ? 0.f : now;
        const float shrink = expf(top[r] - base), pa = expf(xa - base), pb = expf(xb - base);
        float part = pa + pb;
        for (int d = 16; d > 0; d /= 2) part += __shfl_xor_sync(0xffffffffu, part, d);
        sum[r] = sum[r] * shrink + part;
        top[r] = now;
        *a = pa, *b = pb;
        if (lane == 0) s.shrink[row] = shrink;
      }
      load_rows(p.v, s.v_at, s.v_scale);  // everyone is done with K since the last barrier
      __syncthreads();

#pragma unroll
      for (int u = 0; u < kCells; ++u) {
        const int cell = int(threadIdx.x) + u * kSimtThreads, rows = cell / kColumns * 4, col = cell % kColumns * 4;
        if (cell >= kDim) continue;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float w = s.shrink[rows + r];
          o[u][r].x *= w, o[u][r].y *= w, o[u][r].z *= w, o[u][r].w *= w;
        }
#pragma unroll 4
        for (int k = 0; k < kKeyTile; ++k) {
          const float4 w = *reinterpret_cast<const float4*>(s.weights + k * L::kWeights + rows);
          const float4 v = *reinterpret_cast<const float4*>(s.rows + k * L::kStride + col);
          accumulate(o[u][0], w.x, v);
          accumulate(o[u][1], w.y, v);
          accumulate(o[u][2], w.z, v);
          accumulate(o[u][3], w.w, v);
        }
      }
      __syncthreads();  // the next tile overwrites rows, weights and offsets
    }

#pragma unroll
    for (int u = 0; u < kCells; ++u) {
      const int cell = int(threadIdx.x) + u * kSimtThreads, rows = cell / kColumns * 4, col = cell % kColumns * 4;
      if (cell >= kDim) continue;
#pragma unroll
      for (int r = 0; r < 4; ++r) *reinterpret_cast<float4*>(s.rows + (rows + r) * part_row<kDim> + col) = o[u][r];
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
      if (lane == 0)
        *reinterpret_cast<float2*>(s.rows + (4 * warp + r) * part_row<kDim> + kDim) = make_float2(top[r], sum[r]);
    if (threadIdx.x == 0) s.part = {run, s.rows};
    __syncthreads();
    combine<float, kDim, 1>(p, plan, run, &s.part, 1, false);
    if (!run.whole() && plan.splits == 0) {
      if (threadIdx.x == 0) s.plan.pending[pending] = run;
      ++pending;
    }
    meet(plan);
  }
  settle<float, kDim>(p, plan, s.plan, 4, pending, stretch.filled);
}

}  // namespace pagedkv
