// int8_linear for 16-bit activations on tensor cores (mma.sync m16n8k16, float32 sums), sm_80 and later.
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// y^T = W x^T, as in int4_mma.cu: of a slice of 32 inputs and 32 outputs a lane's words are two times 16 bytes, and
// they are its fragments of W for four mma. A number becomes a half or a bfloat16 exactly, sums of a slice are scaled
// in float32. All orders are fixed by the shapes: equal calls give equal bits.
//
// Up to 16 rows: weights come straight from memory into registers, four slices ahead of each of 16 warps an SM. A CTA
// stays and walks over blocks of 32 outputs, its warps share K and are added up in order.
//
// More rows: x and weights come through shared memory, three stages of 128 inputs ahead. A CTA has 128 outputs and 32
// or 64 rows; up to 8 that share K are a cluster, and each finishes a part of the outputs, reading the sums of the
// others where they are.
//
// Floor: bytes of W / 4.28 TB/s (an H200's copy bandwidth). Measured there, bfloat16, scales of 32 inputs, in us,
// rotated weights in a CUDA graph (cuBLAS on bfloat16 weights beside it):
//
//     N x K       4096x4096     6144x4096     14336x4096    4096x14336    28672x4096    576x1536
//     floor        4.2           6.4          14.9          14.9          29.7           0.2
//     1 row        7.8 (12.4)   11.3 (15.4)   21.1 (30.2)   18.4 (30.5)   35.1 (54.9)    2.8 (5.1)
//     8 rows       8.5 (12.4)   11.8 (15.2)   22.0 (29.6)   19.4 (30.9)   37.2 (55.0)    2.8 (4.7)
//     16 rows      9.8 (12.5)   13.8 (15.4)   26.3 (29.9)   22.2 (31.3)   47.8 (55.6)    3.3 (4.9)
//     32 rows     16.8 (12.9)   17.5 (15.7)   28.7 (30.4)   39.5 (32.2)   51.9 (56.8)    6.2 (4.4)
//     64 rows     25.8 (11.2)   27.1 (15.8)   44.0 (33.0)   64.4 (35.0)   81.3 (60.6)    9.1 (4.9)
//
// On Hopper more than 16 rows are packed_wgmma.cu's, where it can. Else, from 65 rows on int8.cu expands W and calls
// cuBLAS, which is no slower then. Each 8 rows more of 28672 x 4096 take 7 us here: products do not hide behind copies.
//
// Tried, up to 16 rows: blocks of 16 outputs, which share out more evenly, in loads of 8 bytes (9.4 for 4096 x 4096 at
// 1 row, 27.0 for 14336 x 4096); 8 or 4 warps a CTA (no better at 1 row but for 6144 x 4096); 32 warps an SM with two
// slices ahead (10.1 for 4096 x 4096, 20.0 for 14336 x 4096). More rows: weights into a ring of registers (the loop
// waited for the last load, not for the first: 1.1 us a slice); one CTA an SM with twice the stages (20.5 for 4096 x
// 4096 at 32 rows); numbers scaled in 16 bits and no sums of a slice (26.4 for 25.8 at 64 rows); tiles of 128 rows
// (74.6 for 80 at 128 rows of 14336 x 4096, but 39.8 for 27 with cuBLAS for 4096 x 4096).
#include <algorithm>

#include "cluster.cuh"
#include "int4.h"
#include "int4_tile.cuh"

namespace pagedkv {
namespace {

constexpr int kSlice = 32;                        // inputs
constexpr int kSliceBytes = kSlice * kInt4Block;  // of a block

// Words of four inputs -> a lane's part of fragments of 16 outputs, exactly. 0x6400 | (q + 128) is the half 1152 + q.
// 0x4300 | the low 7 bits of q is the bfloat16 128 + them, and the sign bit makes 256 of 128.
template <class T>
__device__ __forceinline__ void int8_fragments(const uint4& words, uint32_t (&a)[2][4]) {
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int b = 0; b < 4; ++b)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t bytes = pair ? 0x4342u : 0x4140u;
      uint32_t& to = a[b / 2][b % 2 + 2 * pair];
      if constexpr (std::is_same_v<T, __half>) {
        to = subtract_pair<T>(__byte_perm(w[b] ^ 0x80808080u, 0x64646464u, bytes), 0x64806480u);
      } else {
        const uint32_t bits = __byte_perm(w[b], 0x43434343u, bytes);
        to = subtract_pair<T>(bits & 0xff7fff7fu, bits & 0xff80ff80u);
      }
    }
}

// Scales of a lane's four outputs in a group: bits of 16-bit numbers in one load, or floats (kEach).
template <bool kEach>
struct Scales {
  uint32_t bits[kEach ? 4 : 2];
  __device__ __forceinline__ void load(const Int4Params& p, int64_t at, int count) {
    if constexpr (kEach) {
#pragma unroll
      for (int b = 0; b < 4; ++b)
        bits[b] = b < count ? __float_as_uint(load_scale(p.scales, p.scale_type, at + b)) : 0u;
    } else {
      take(static_cast<const uint16_t*>(p.scales) + at);
    }
  }
  __device__ __forceinline__ void take(const void* p) {
    const uint2 v = *static_cast<const uint2*>(p);
    bits[0] = v.x, bits[1] = v.y;
  }
  __device__ __forceinline__ float get(int b, ScalarType type) const {
    if constexpr (kEach) return __uint_as_float(bits[b]);
    const uint32_t v = bits[b / 2] >> 16 * (b % 2);
    if (type == ScalarType::BFloat16) return __uint_as_float(v << 16);
    return __half2float(__ushort_as_half(uint16_t(v)));
  }
};

// up to 16 rows -------------------------------------------------------------------------------------------------------

struct FewPlan {
  int log_k, blocks, slices;
  int of_group;       // slices of a group
  int rounds, extra;  // of blocks; the first `extra` blocks of a round have one more
};

constexpr int kMostWarps = 16;

template <class T, int kTiles, bool kEach>
__global__ void __launch_bounds__(32 * kMostWarps)
    few_rows_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ FewPlan plan) {
  constexpr int kRing = 4, kXRing = kTiles == 1 ? 4 : 2;
  constexpr int kSums = 2 * kTiles * 4;
  constexpr int kSliceWords = kSliceBytes / 16;
  extern __shared__ __align__(16) float sums[];  // [warp][sum][lane]
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), warps_k = 1 << plan.log_k;
  const int warps_n = blockDim.x >> (5 + plan.log_k), warp_n = warp >> plan.log_k, warp_k = warp & (warps_k - 1);
  const int first_block = int(blockIdx.x) * warps_n, stride = int(gridDim.x) * warps_n;
  const int begin = plan.slices * warp_k >> plan.log_k, end = plan.slices * (warp_k + 1) >> plan.log_k;
  const int first_group = begin / plan.of_group, in_first_group = begin - first_group * plan.of_group;
  const int all = (plan.rounds + (first_block < plan.extra)) * (end - begin);

  // ---- the ring: slice s is in entry (s - begin) % kRing
  const uint4* words;
  int block = first_block + warp_n, slice = begin, in_group = in_first_group, count = 4;
  int64_t n, at;          // of this lane's outputs, of their scales
  auto set_block = [&] {  // one too many does the last one's work again
    const int64_t lane_block = min(block, plan.blocks - 1);
    words = reinterpret_cast<const uint4*>(p.packed) + (lane_block * plan.slices + begin) * kSliceWords + t * 16 + g;
    n = lane_block * kInt4Block + 4 * g;
    if constexpr (kEach)
      count = int(min(int64_t(4), max(int64_t(0), p.n - n)));
    else
      n = min(n, p.n - 4);  // none or all of a lane's outputs exist
    at = first_group * p.n + n;
  };
  set_block();
  release_next();
  // What the ring will ask for first, into L2: runs of K are consecutive bytes, a line for each lane.
  if (lane * 8 < min(kRing, end - begin) * kSliceWords)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(words - (t * 16 + g) + lane * 8));
  wait_for_previous();
  uint4 ring[kRing][2];
  Scales<kEach> scales[kRing];
  auto fetch = [&](int i) {  // moves on to the next slice
    ring[i][0] = __ldcs(words), ring[i][1] = __ldcs(words + 8);
    scales[i].load(p, at, count);
    words += kSliceWords;
    if (++in_group == plan.of_group) in_group = 0, at += p.n;
    if (++slice == end) {
      slice = begin, in_group = in_first_group, block += stride;
      set_block();
    }
  };
#pragma unroll
  for (int i = 0; i < kRing; ++i) {
    ring[i][0] = ring[i][1] = uint4{0, 0, 0, 0}, scales[i] = {};
    if (i < all) fetch(i);
  }

  const int64_t first_row = int64_t(blockIdx.y) * (8 * kTiles), rows_left = p.m - first_row;
  const T* const x_first = static_cast<const T*>(p.x) + (first_row + g) * p.x_stride + int64_t(begin) * kSlice + 8 * t;
  const T* x_at = x_first;
  int x_slice = begin;
  uint4 x_ring[kXRing][kTiles];
  auto fetch_x = [&](int i) {  // lanes without a row keep their zeros
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (8 * j + g < rows_left) x_ring[i][j] = *reinterpret_cast<const uint4*>(x_at + 8 * j * p.x_stride);
    x_at += kSlice;
    if (++x_slice == end) x_slice = begin, x_at = x_first;
  };
#pragma unroll
  for (int i = 0; i < kXRing; ++i) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) x_ring[i][j] = make_uint4(0, 0, 0, 0);
    if (i < all) fetch_x(i);
  }

  const int rows = int(min(int64_t(8 * kTiles), rows_left));
  float total[2][kTiles][4] = {};
  int done = 0, done_block = first_block;  // slices of block done_block
#pragma unroll 1
  for (int s0 = 0; s0 < all; s0 += kRing) {
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
      const int s = s0 + i;
      if (s >= all) break;
      float scale[4], sum[2][kTiles][4] = {};
#pragma unroll
      for (int b = 0; b < 4; ++b) scale[b] = scales[i].get(b, p.scale_type);
      const uint4(&x)[kTiles] = x_ring[i % kXRing];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
        int8_fragments<T>(ring[i][half], a);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int j = 0; j < kTiles; ++j)
            mma_16816<T>(sum[part][j], a[part], half ? x[j].z : x[j].x, half ? x[j].w : x[j].y);
      }
      if (s + kRing < all) fetch(i);
      if (s + kXRing < all) fetch_x(i % kXRing);
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            total[part][j][e] = fmaf(scale[2 * part + e / 2], sum[part][j][e], total[part][j][e]);
      if (++done < end - begin) continue;
      done = 0;

      // ---- the warps' sums, in order; thread i of the CTA has output i % kInt4Block of a block and a row
      if (s + 1 > end - begin) __syncthreads();  // the block before is written
#pragma unroll
      for (int e = 0; e < kSums; ++e) {
        float& of = total[e / (kTiles * 4)][e / 4 % kTiles][e % 4];
        sums[(warp * kSums + e) * 32 + lane] = of;
        of = 0.f;
      }
      __syncthreads();
      for (int v = threadIdx.x; v < rows * warps_n * kInt4Block; v += blockDim.x) {
        const int c = v % kInt4Block, of = v / kInt4Block % warps_n, row = v / kInt4Block / warps_n;
        const int b = c % 4, from = (b / 2 * kTiles + row / 8) * 4 + b % 2 * 2 + row % 2;
        const int from_lane = c / 4 * 4 + row % 8 / 2;
        float result = 0.f;
#pragma unroll 8
        for (int w = of * warps_k; w < (of + 1) * warps_k; ++w) result += sums[(w * kSums + from) * 32 + from_lane];
        const int64_t to = int64_t(done_block + of) * kInt4Block + c, to_row = first_row + row;
        if (to < p.n) static_cast<T*>(p.y)[to_row * p.n + to] = int4_finish<T>(p, to_row, to, result);
      }
      done_block += stride;
    }
  }
}

template <class T, int kTiles, bool kEach>
void launch_few(const Int4Params& p, cudaStream_t stream) {
  const int sms = int4_device().sms;
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block, rows = (p.m + 8 * kTiles - 1) / (8 * kTiles);
  const int64_t slices = p.k_padded / kSlice;
  // A CTA stays, and its warps share K.
  int warps_n = 1, warps_k = 1;
  const int most = blocks > sms && blocks <= 4 * sms ? kMostWarps / 2 : kMostWarps;
  while (2 * warps_k <= most && 2 * warps_k <= slices) warps_k *= 2;
  while (2 * warps_n * warps_k <= most && blocks >= 2 * warps_n * sms) warps_n *= 2;
  const int warps = warps_n * warps_k;
  const int64_t ctas = std::min<int64_t>((blocks + warps_n - 1) / warps_n, int64_t(sms) * (kMostWarps / warps));
  FewPlan plan{};
  while (1 << plan.log_k < warps_k) ++plan.log_k;
  plan.blocks = int(blocks), plan.slices = int(slices);
  plan.of_group = p.group >= p.k ? int(slices) : int(p.group / kSlice);
  plan.rounds = int(blocks / (ctas * warps_n)), plan.extra = int(blocks % (ctas * warps_n));
  launch_kernel(few_rows_kernel<T, kTiles, kEach>, dim3(unsigned(ctas), unsigned(rows)), 32 * warps,
                size_t(warps) * (2 * kTiles * 4 * 32 * sizeof(float)), stream, p, plan);
}

// more rows -----------------------------------------------------------------------------------------------------------

constexpr int kWarps = 8, kWarpsN = 4, kWarpsK = kWarps / kWarpsN;
constexpr int kPer = 2, kChunk = kPer * kWarpsK;  // slices of a stage: a warp's, all
constexpr int kPitch = 36;                        // floats from a row of sums to the next, so that writes hit all banks

struct ManyPlan {
  int blocks, slices, splits, row_tiles;  // splits: CTAs of a cluster, which share K
  uint32_t of_group;                      // a slice's group: the upper half of the product with this; 0: the slice
};

// Shared memory of a stage: x [kChunk][rows][64 bytes], in odd slices with rows 2 i and 2 i + 1 in each other's place;
// words of each warp [kPer][8][128 bytes], chunk c of row j in place c ^ (j & 6); their scales [kPer][32].
template <int kTiles>
struct Shape {
  static constexpr int kRows = 8 * kTiles, kXBytes = kChunk * kRows * 64, kWordBytes = kWarps * kPer * kSliceBytes;
  static constexpr int kScaleBytes = kWarps * kPer * 64, kStageBytes = kXBytes + kWordBytes + kScaleBytes;
  static constexpr int kResident = 2;                      // CTAs of an SM
  static constexpr int kStages = 99 * 1024 / kStageBytes;  // what every device gives one CTA, sm_90 two
  static constexpr int kBytes = std::max(kStages * kStageBytes, kWarps * kRows * kPitch * 4);
};

template <class T, int kTiles, bool kEach>
__global__ void __launch_bounds__(32 * kWarps, Shape<kTiles>::kResident)
    many_rows_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ ManyPlan plan) {
  using S = Shape<kTiles>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), warp_n = warp / kWarpsK, warp_k = warp % kWarpsK;
  const int tile_row = int(blockIdx.x) / plan.splits, rank = int(blockIdx.x) - tile_row * plan.splits;
  const int tile = tile_row / plan.row_tiles, row_tile = tile_row - tile * plan.row_tiles;
  const int begin = plan.slices * rank / plan.splits, end = plan.slices * (rank + 1) / plan.splits;
  const int chunks = (end - begin + kChunk - 1) / kChunk;
  const int first = begin + warp_k * kPer;  // of this warp's slices

  const int64_t block = min(tile * kWarpsN + warp_n, plan.blocks - 1);
  const char* const words =
      reinterpret_cast<const char*>(p.packed) + (block * plan.slices + first) * kSliceBytes + lane * 16;
  release_next();
  if (first + lane / 16 * kChunk + lane / 8 % 2 < end)  // of the first two stages, a line for each lane
    asm volatile(
        "prefetch.global.L2 [%0];" ::"l"(words + lane / 16 * kChunk * kSliceBytes + lane % 16 * 128 - lane * 16));
  wait_for_previous();

  const uint32_t base = smem_address(shared);
  const uint32_t word_to = base + S::kXBytes + warp * (kPer * kSliceBytes) + (lane >> 3) * 128;
  const int word_place = (lane & 7) ^ (lane >> 3 & 6);  // of rows 0 .. 3; those of 4 .. 7 differ in bit 2
  const uint32_t scale_to = base + S::kXBytes + S::kWordBytes + warp * (kPer * 64) + lane * 8;
  const int64_t scale_n = min(block * kInt4Block + 4 * (lane & 7), p.n - 4);
  auto group_of = [&](int slice) {
    return int64_t(plan.of_group ? __umulhi(uint32_t(slice), plan.of_group) : uint32_t(slice));
  };
  // x: two rows a warp at a time, 16 lanes each
  const int64_t first_row = int64_t(row_tile) * S::kRows;
  const int rows = int(min(int64_t(S::kRows), p.m - first_row));
  const int x_row = warp * 2 + (lane >> 4), x_slice = lane >> 2 & 3;
  const uint32_t x_to = base + (x_slice * S::kRows + (x_row ^ (x_slice & 1))) * 64 + (lane & 3) * 16;
  const T* const x =
      static_cast<const T*>(p.x) + (first_row + x_row) * p.x_stride + int64_t(begin) * kSlice + 8 * (lane & 15);
  auto copy = [&](int chunk, int stage) {
    const uint32_t to = stage * S::kStageBytes;
#pragma unroll
    for (int u = 0; u < kPer; ++u) {
      if (first + chunk * kChunk + u >= end) continue;
      const char* const from = words + int64_t(chunk * kChunk + u) * kSliceBytes;
      cp_async_stream(to + word_to + u * kSliceBytes + word_place * 16, from);
      cp_async_stream(to + word_to + u * kSliceBytes + 512 + (word_place ^ 4) * 16, from + 512);
    }
    if constexpr (!kEach) {
      const int slice = first + chunk * kChunk + (lane >> 3);
      if (lane < 8 * kPer && slice < end)
        cp_async<8>(to + scale_to, static_cast<const uint16_t*>(p.scales) + group_of(slice) * p.n + scale_n, true);
    }
    const bool exists = begin + chunk * kChunk + x_slice < end;
#pragma unroll
    for (int i = 0; i < (kTiles + 1) / 2; ++i) {
      const bool ok = exists && x_row + 16 * i < rows;
      if (kTiles > 1 || x_row < S::kRows)
        cp_async<16>(to + x_to + i * 16 * 64, ok ? x + 16 * i * p.x_stride + int64_t(chunk) * (kChunk * kSlice) : p.x,
                     ok);
    }
  };
#pragma unroll
  for (int c = 0; c < S::kStages - 1; ++c) {
    if (c < chunks) copy(c, c);
    cp_async_commit();
  }

  int count = 4;
  const int64_t n = block * kInt4Block + 4 * g;
  if constexpr (kEach) count = int(min(int64_t(4), max(int64_t(0), p.n - n)));
  float total[kTiles][2][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int c = 0; c < chunks; ++c) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();
    if (c + S::kStages - 1 < chunks) copy(c + S::kStages - 1, stage == 0 ? S::kStages - 1 : stage - 1);
    cp_async_commit();
    const unsigned char* const now = shared + stage * S::kStageBytes;
    if (++stage == S::kStages) stage = 0;
#pragma unroll
    for (int u = 0; u < kPer; ++u) {
      const int slice = first + c * kChunk + u;
      if (slice >= end) break;
      const unsigned char* const w =
          now + S::kXBytes + (warp * kPer + u) * kSliceBytes + 2 * t * 128 + (g ^ 2 * t) * 16;
      Scales<kEach> scales;
      if constexpr (kEach)
        scales.load(p, group_of(slice) * p.n + n, count);
      else
        scales.take(now + S::kXBytes + S::kWordBytes + (warp * kPer + u) * 64 + g * 8);
      uint32_t a[2][2][4];
      int8_fragments<T>(*reinterpret_cast<const uint4*>(w), a[0]);
      int8_fragments<T>(*reinterpret_cast<const uint4*>(w + 128), a[1]);
      float scale[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) scale[b] = scales.get(b, p.scale_type);
      const unsigned char* const from = now + ((warp_k * kPer + u) * S::kRows + (g ^ (u & 1))) * 64 + t * 16;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const uint4 in = *reinterpret_cast<const uint4*>(from + j * 8 * 64);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float sum[4] = {};
          mma_16816<T>(sum, a[0][part], in.x, in.y);
          mma_16816<T>(sum, a[1][part], in.z, in.w);
#pragma unroll
          for (int e = 0; e < 4; ++e) total[j][part][e] = fmaf(scale[2 * part + e / 2], sum[e], total[j][part][e]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  // ---- the sums of the warps and CTAs that share K, in order: [warp][row][32 outputs] of each CTA
  float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      *reinterpret_cast<float4*>(sums + (warp * S::kRows + 8 * j + 2 * t + odd) * kPitch + 4 * g) =
          make_float4(total[j][0][odd], total[j][0][2 + odd], total[j][1][odd], total[j][1][2 + odd]);
  if (plan.splits > 1)
    cluster_sync();
  else
    __syncthreads();
  constexpr int kFours = kWarpsN * kInt4Block / 4;  // of outputs, in a row
  for (int v = rank * (32 * kWarps) + int(threadIdx.x); v < rows * kFours; v += plan.splits * (32 * kWarps)) {
    const int c = v % kFours, row = v / kFours;
    const float* const from = sums + (c / 8 * kWarpsK * S::kRows + row) * kPitch + c % 8 * 4;
    float result[4] = {};
    for (int cta = 0; cta < plan.splits; ++cta)
#pragma unroll
      for (int w = 0; w < kWarpsK; ++w) {
        const float* const one = from + w * (S::kRows * kPitch);
        const float4 of = plan.splits > 1 ? cluster_load(one, cta) : *reinterpret_cast<const float4*>(one);
        result[0] += of.x, result[1] += of.y, result[2] += of.z, result[3] += of.w;
      }
    const int64_t to = int64_t(tile) * (kWarpsN * kInt4Block) + 4 * c, to_row = first_row + row;
#pragma unroll
    for (int b = 0; b < 4; ++b)
      if (to + b < p.n) static_cast<T*>(p.y)[to_row * p.n + to + b] = int4_finish<T>(p, to_row, to + b, result[b]);
  }
  if (plan.splits > 1) cluster_sync();  // others may still read
}

template <class T, int kTiles, bool kEach>
void launch_many(const Int4Params& p, cudaStream_t stream) {
  using S = Shape<kTiles>;
  const auto kernel = many_rows_kernel<T, kTiles, kEach>;
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block, tiles = (blocks + kWarpsN - 1) / kWarpsN;
  const int64_t slices = p.k_padded / kSlice, row_tiles = (p.m + S::kRows - 1) / S::kRows;
  const int64_t sms = int4_device().sms;
  // The fewest slices, one CTA after the other: what else one does takes the time of about eight, what a cluster does
  // together five for each of its CTAs. (Measured: the best of 1, 2, 4 and 8 in shapes of Llama-3-8B.)
  ManyPlan plan{};
  int64_t best = 0;
  const int most = launches_overlap(kernel) ? 8 : 1;  // clusters came with that
  for (int splits = 1; splits <= most && (splits == 1 || splits * 2 * kChunk <= slices); splits *= 2) {
    const int64_t rounds = (tiles * row_tiles * splits + sms * S::kResident - 1) / (sms * S::kResident);
    const int64_t cost = rounds * ((slices + splits - 1) / splits + 8) + 5 * splits;
    if (best == 0 || cost < best) best = cost, plan.splits = splits;
  }
  plan.blocks = int(blocks), plan.slices = int(slices), plan.row_tiles = int(row_tiles);
  const uint64_t of_group = p.group >= p.k ? uint64_t(slices) : uint64_t(p.group / kSlice);
  plan.of_group = of_group == 1 ? 0u : uint32_t(((uint64_t(1) << 32) + of_group - 1) / of_group);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch_clusters(plan.splits, kernel, unsigned(tiles * row_tiles * plan.splits), 32 * kWarps, S::kBytes, stream, p,
                  plan);
}

template <class T, bool kEach>
void launch(const Int4Params& p, cudaStream_t stream) {
  if (p.m <= 8)
    launch_few<T, 1, kEach>(p, stream);
  else if (p.m <= 16)
    launch_few<T, 2, kEach>(p, stream);
  else if (p.m <= 32)
    launch_many<T, 4, kEach>(p, stream);
  else
    launch_many<T, 8, kEach>(p, stream);
}

}  // namespace

template <>
void launch_int8_mma<PAGEDKV_TYPE>(const Int4Params& p, cudaStream_t stream) {
  const bool at_once =
      p.n % 4 == 0 && p.scale_type != ScalarType::Float && reinterpret_cast<uintptr_t>(p.scales) % 8 == 0;
  (at_once ? launch<PAGEDKV_TYPE, false> : launch<PAGEDKV_TYPE, true>)(p, stream);
}

}  // namespace pagedkv
