// int4_linear for 16-bit activations on tensor cores (mma.sync m16n8k16, float32 sums), sm_80 and later.
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Hopper has int4_few.cu from kInt4Few rows on where it can be and pays, and int4_many.cu from kInt4Many on; where not,
// int4.cu turns to cuBLAS from kInt4Expand on.
//
// Algorithm: y^T = W x^T, so that weights are the 16 rows of a product and few rows of x fill its 8 columns. Of a slice
// of 32 inputs and 32 outputs a lane's words are 16 consecutive bytes and a warp's 512, and they are its fragments of W
// for four mma (int4.h): they come straight from memory into registers, nothing passes through shared memory. A warp
// has 32 outputs, 8, 16 or 32 rows and a run of K; warps of a CTA with the same outputs are added up in order at the
// end. All orders are fixed by the shapes: equal calls give equal bits. With 8 or 16 rows a CTA stays, walks over
// blocks of outputs, the ring of loads running on from one to the next, and the launch overlaps with the kernel in
// front: the ring is filled before that one is done, for no kernel that overlaps writes weights (11.9 us for 14336 x
// 4096 and 21.2 for 28672 x 4096 where L2 alone was asked for them, 10.6 and 20.0 so). A nibble becomes a number by
//
//     0x6400 | q is the half 1024 + q        0x4300 | q is the bfloat16 128 + q
//     0x5400 | q << 4 is the half 64 + q
//
// With 32 rows a warp minus the same of its zero, exactly. With fewer the sums are of q + 128 (64), and what is too
// much, (128 + zero) sum(x), is subtracted from them, sum(x) from an mma with ones. Sums of a step (1, 2 or 4 slices of
// one group) are float32 and are scaled in float32, so scales of any type lose nothing. Offsets: y += offset sum(x).
//
// What counts is how many bytes are under way: every warp keeps kRing slices and their factors in flight, and as many
// warps run as registers allow: 16 an SM and 64 KiB, twice what 4.28 TB/s at a microsecond of latency ask for. x comes
// through L1, four slices ahead (one slice ahead, a warp waited for L2 at each: 12.9 us for 14336 x 4096 without any
// arithmetic).
//
// Floor: bytes of W / 4.28 TB/s (an H200's copy bandwidth); a kernel that only reads takes 8.5 us for 14336 x
// 4096, 15.1 for 28672 x 4096, 3.7 for 4096 x 4096. The other limit is instructions: 28 turn a slice into numbers,
// about 62 in all. One row of 14336 x 4096, us: 14.3; without x 13.7; without factors 13.3; without arithmetic 11.0;
// none of these 10.2. Divisions of 64 bits in front of the first load took 0.7. (All before the ring was filled early.)
//
// Tried: the ring in shared memory, twice as long (cp.async, each lane its own 16 bytes): 15.7 us for 14336 x 4096 and
// 29.6 for 28672 x 4096, whose 10.5 and 19.9 it was to lower. More of the weights asked into L2 ahead of the kernel in
// front's end, or a step ahead of the ring all along: up to 2 us slower.
#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"

namespace pagedkv {
namespace {

constexpr int kSlice = 32;
// Warps of a CTA and of an SM: 128 registers a thread, for 32 rows 255.
constexpr int most_warps(int tiles) { return tiles > 2 ? 8 : 16; }

// How the factors of a lane's four outputs are read: 16 or 32 bits each in one load, those of Q4_K, or any way they may
// lie.
enum class Read { kNarrow, kWide, kQ4K, kEach };

// Scales and zeros (or offsets) of a lane's four outputs in a group: bits as in memory, or of floats (kEach).
template <Read kRead, bool kOffsets>
struct Raw {
  static constexpr int kWords = kRead == Read::kNarrow ? 2 : kRead == Read::kQ4K ? 3 : 4;  // kQ4K: the 6-bit ones first
  uint32_t scale[kWords];
  uint32_t other[kOffsets ? kWords : 1];
};

template <Read kRead, int kWords>
__device__ __forceinline__ void load_factors(uint32_t (&to)[kWords], const void* from, ScalarType type, int64_t at,
                                             int count) {
  if constexpr (kRead == Read::kNarrow) {
    const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at);
    to[0] = v.x, to[1] = v.y;
  } else if constexpr (kRead == Read::kWide) {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(from) + at);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
#pragma unroll
    for (int b = 0; b < 4; ++b) to[b] = b < count ? __float_as_uint(load_scale(from, type, at + b)) : 0u;
  }
}
// 6-bit numbers at `at`, their halves at `super`
__device__ __forceinline__ void load_factors(uint32_t (&to)[3], const uint8_t* sub, const void* from, int64_t at,
                                             int64_t super) {
  const uint2 v = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + super);
  to[0] = *reinterpret_cast<const uint32_t*>(sub + at), to[1] = v.x, to[2] = v.y;
}

template <Read kRead>
__device__ __forceinline__ float factor(const uint32_t* words, int b, ScalarType type) {
  if constexpr (kRead == Read::kQ4K)
    return float(words[0] >> 8 * b & 63) * __half2float(__ushort_as_half(uint16_t(words[1 + b / 2] >> 16 * (b % 2))));
  if constexpr (kRead != Read::kNarrow) return __uint_as_float(words[b]);
  const uint32_t bits = words[b / 2] >> 16 * (b % 2);
  if (type == ScalarType::BFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(uint16_t(bits)));
}

// How the work is laid out: a CTA's warps have 1 << log_k runs of K, and 1, 2, ... blocks of outputs at once. All that
// would take a division is made by the host.
struct Plan {
  int log_k, blocks, slices, steps;
  int of_group;       // steps of a group
  int rounds, extra;  // of blocks; the first `extra` blocks of a round have one more
};

// kStep: slices that are loaded and scaled together, all of one group.
template <class T, int kTiles, Read kRead, int kStep, bool kOffsets>
__global__ void __launch_bounds__(32 * most_warps(kTiles))
    int4_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Plan plan) {
  constexpr bool kManyFactors = kRead == Read::kEach || (kRead != Read::kNarrow && kOffsets);
  constexpr int kRing = (kTiles == 2 && kStep < 4) || kManyFactors ? 4 : 8, kSteps = kRing / kStep;  // slices, steps
  constexpr int kXSteps = kTiles > 2 || kStep >= 4 ? 1 : 4 / kStep;                                  // that x is ahead
  constexpr int kSums = 2 * kTiles * 4;
  constexpr bool kFold = kTiles <= 2, kInputSums = kFold || kOffsets;
  constexpr int kSliceWords = kSlice / kInt4Word * kInt4Block / 4;  // in 16 bytes
  extern __shared__ __align__(16) float sums[];                     // [warp][sum][lane]
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), warps_k = 1 << plan.log_k;
  const int warps_n = blockDim.x >> (5 + plan.log_k), warp_n = warp >> plan.log_k, warp_k = warp & (warps_k - 1);
  const int first_block = int(blockIdx.x) * warps_n, stride = int(gridDim.x) * warps_n;
  const int begin = plan.steps * warp_k >> plan.log_k, end = plan.steps * (warp_k + 1) >> plan.log_k;
  const int first_group = begin / plan.of_group, in_first_group = begin - first_group * plan.of_group;
  const int all = (plan.rounds + (first_block < plan.extra)) * (end - begin);

  // ---- the ring: step s is in entry (s - begin) % kSteps
  const uint4* words;
  int64_t n;
  int block = first_block + warp_n, step = begin, group = first_group, in_group = in_first_group, count = 4;
  const int64_t group_at = first_group * p.n;
  int64_t at;             // of this lane's factors
  auto set_block = [&] {  // one too many does the last one's work again
    const int64_t lane_block = min(block, plan.blocks - 1);
    words =
        reinterpret_cast<const uint4*>(p.packed) + (lane_block * plan.slices + begin * kStep) * kSliceWords + t * 8 + g;
    n = lane_block * kInt4Block + 4 * g;
    if constexpr (kRead == Read::kEach)
      count = int(min(int64_t(4), max(int64_t(0), p.n - n)));  // of this lane's outputs
    else
      n = min(n, p.n - 4);  // none or all of a lane's outputs exist
    at = group_at + n;
  };
  set_block();
  release_next();
  uint4 ring[kRing];
  Raw<kRead, kOffsets> raw[kSteps];
  auto fetch_words = [&](int i, bool more) {
    if (more) ring[i] = __ldcs(words + i % kStep * kSliceWords);
  };
  auto fetch_factors = [&](int i, bool more) {  // after the step's words: moves on to the next step
    if (!more) return;
    if (count == 0) {
    } else if constexpr (kRead == Read::kQ4K) {
      const int64_t super = int64_t(group / kQ4KGroups) * p.n + n;
      load_factors(raw[i].scale, p.sub_scales, p.scales, at, super);
      load_factors(raw[i].other, p.sub_mins, p.offsets, at, super);
    } else if (kRead == Read::kEach && kOffsets && p.sub_scales) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const ScaleOffset of = b < count ? load_scale_offset(p, group, n + b) : ScaleOffset{};
        raw[i].scale[b % Raw<kRead, kOffsets>::kWords] = __float_as_uint(of.scale);
        raw[i].other[kOffsets ? b % Raw<kRead, kOffsets>::kWords : 0] = __float_as_uint(of.offset);
      }
    } else {
      load_factors<kRead>(raw[i].scale, p.scales, p.scale_type, at, count);
      if constexpr (kOffsets) {
        load_factors<kRead>(raw[i].other, p.offsets, p.scale_type, at, count);
      } else if constexpr (kRead != Read::kEach) {
        if (p.zeros) raw[i].other[0] = *reinterpret_cast<const uint32_t*>(p.zeros + at);
      } else if (p.zeros) {
        raw[i].other[0] = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b)
          if (b < count) raw[i].other[0] |= uint32_t(p.zeros[at + b]) << 8 * b;
      }
    }
    words += kStep * kSliceWords;
    if (++in_group == plan.of_group) in_group = 0, ++group, at += p.n;
    if (++step == end) {
      step = begin, group = first_group, in_group = in_first_group, block += stride;
      set_block();
    }
  };
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    raw[i] = {};
    if constexpr (!kOffsets) raw[i].other[0] = 0x08080808u;
#pragma unroll
    for (int j = 0; j < kStep; ++j) fetch_words(i * kStep + j, i < all);
    fetch_factors(i, i < all);
  }

  wait_for_previous();
  const int64_t first_row = int64_t(blockIdx.y) * (8 * kTiles), rows_left = p.m - first_row;
  const T* const x_first =
      static_cast<const T*>(p.x) + (first_row + g) * p.x_stride + int64_t(begin) * kStep * kSlice + 8 * t;
  const T* x_at = x_first;
  int x_step = begin;
  uint4 x_ring[kXSteps * kStep][kTiles];
  auto load_x = [&](int i, bool more) {  // lanes without a row keep their zeros
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (more && 8 * j + g < rows_left)
        x_ring[i][j] = *reinterpret_cast<const uint4*>(x_at + i % kStep * kSlice + 8 * j * p.x_stride);
  };
  auto next_x = [&] {
    x_at += kStep * kSlice;
    if (++x_step == end) x_step = begin, x_at = x_first;
  };
#pragma unroll
  for (int i = 0; i < kXSteps; ++i) {
#pragma unroll
    for (int slice = 0; slice < kStep; ++slice) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) x_ring[i * kStep + slice][j] = make_uint4(0, 0, 0, 0);
      load_x(i * kStep + slice, i < all);
    }
    next_x();
  }

  const int rows = int(min(int64_t(8 * kTiles), rows_left));
  float total[2][kTiles][4] = {};
  int done = 0;  // steps of block done_block
  int done_block = first_block;
#pragma unroll 1
  for (int s0 = 0; s0 < all; s0 += kSteps) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int s = s0 + i;
      if (s >= all) break;
      float scale[4], offset[kOffsets ? 4 : 1];
      uint32_t zero[4];
      float less[4];  // what a number is too large by
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        scale[b] = factor<kRead>(raw[i].scale, b, p.scale_type);
        if constexpr (kOffsets)
          offset[b] = kRead == Read::kQ4K ? -factor<kRead>(raw[i].other, b, p.scale_type)
                                          : factor<kRead>(raw[i].other, b, p.scale_type);
        else if constexpr (!kFold)
          zero[b] = int4_zero_pair<T>(raw[i].other[0], b);
        less[b] = int4_fold_bias<T>() + (kOffsets ? 0.f : float(raw[i].other[0] >> 8 * b & 255));
      }
      const bool more = s + kSteps < all, more_x = s + kXSteps < all;
      float sum[2][kTiles][4] = {}, x_sum[kInputSums ? kTiles : 1][4] = {};
#pragma unroll
      for (int slice = 0; slice < kStep; ++slice) {
        const int x_slot = i % kXSteps * kStep + slice;
        const uint4(&x)[kTiles] = x_ring[x_slot];
        uint32_t a[2][2][4];
        if constexpr (kFold)
          int4_numbers<T>(ring[i * kStep + slice], a);
        else
          int4_fragments<T, kOffsets>(ring[i * kStep + slice], zero, a);
        fetch_words(i * kStep + slice, more);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            mma_16816<T>(sum[part][j], a[part][0], x[j].x, x[j].y);
            mma_16816<T>(sum[part][j], a[part][1], x[j].z, x[j].w);
          }
          if constexpr (kInputSums) int4_add_inputs<T>(x_sum[j], x[j]);
        }
        load_x(x_slot, more_x);
      }
      next_x();
      fetch_factors(i, more);
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int b = 2 * part + e / 2;
            float& to = total[part][j][e];
            const float product = sum[part][j][e];
            if constexpr (kFold) {
              const float inputs = x_sum[j][e & 1];
              to = fmaf(scale[b], fmaf(-less[b], inputs, product), to);
              if constexpr (kOffsets) to = fmaf(offset[b], inputs, to);
            } else {
              to = fmaf(scale[b], product, to);
              if constexpr (kOffsets) to = fmaf(fmaf(8.f, scale[b], offset[b]), x_sum[j][e & 1], to);
            }
          }
      if (++done < end - begin) continue;
      done = 0;

      // ---- the warps' sums, in order; thread i of the CTA has output i % 32 of a block and a row
      if (s + 1 > end - begin) __syncthreads();  // the block before is written
#pragma unroll
      for (int e = 0; e < kSums; ++e) {
        float& of = total[e / (kSums / 2)][e / 4 % kTiles][e % 4];
        sums[(warp * kSums + e) * 32 + lane] = of;
        of = 0.f;
      }
      __syncthreads();
      for (int v = threadIdx.x; v < rows * warps_n * kInt4Block; v += blockDim.x) {
        const int c = v % kInt4Block, of = v / kInt4Block % warps_n, row = v / kInt4Block / warps_n;  // c = 4 g + b
        const int at = ((c >> 1 & 1) * kTiles + row / 8) * 4 + (c & 1) * 2 + (row & 1);
        const int from = (c & ~3) + (row & 7) / 2;
        float result = 0.f;
#pragma unroll 8
        for (int w = of * warps_k; w < (of + 1) * warps_k; ++w) result += sums[(w * kSums + at) * 32 + from];
        const int64_t to = int64_t(done_block + of) * kInt4Block + c, to_row = first_row + row;
        if (to < p.n) static_cast<T*>(p.y)[to_row * p.n + to] = int4_finish<T>(p, to_row, to, result);
      }
      done_block += stride;
    }
  }
}

template <class T, int kTiles, Read kRead, int kStep, bool kOffsets>
void launch(const Int4Params& p, cudaStream_t stream) {
  constexpr int kMost = most_warps(kTiles);
  const Int4Device& of = int4_device();
  const int sms = of.sms;
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block, rows = (p.m + 8 * kTiles - 1) / (8 * kTiles);
  const int64_t steps = p.k_padded / kSlice / kStep;
  if (rows > 65535) fail("int4_linear: x: got ", p.m, " rows, needs at most ", 65535 * 8 * kTiles);
  // Up to 16 rows a warp: a CTA stays, and its warps share K. More: as many outputs a CTA as leave three quarters of
  // the SMs at work, then as many runs of K as all run at once.
  int warps_n = 1, warps_k = 1;
  if constexpr (kTiles <= 2) {
    const int most = blocks * rows > sms ? kMost / 2 : kMost;
    while (2 * warps_k <= most && 2 * warps_k <= steps) warps_k *= 2;
    while (2 * warps_n * warps_k <= most && blocks >= 2 * warps_n * sms) warps_n *= 2;
  } else {
    while (2 * warps_n <= kMost && blocks * rows / (2 * warps_n) * 4 >= 3 * sms) warps_n *= 2;
    const int64_t ctas = (blocks + warps_n - 1) / warps_n * rows;
    while (2 * warps_n * warps_k <= kMost && 2 * ctas * warps_n * warps_k <= int64_t(sms) * kMost &&
           2 * warps_k <= steps)
      warps_k *= 2;
  }
  constexpr int kWarpBytes = 2 * kTiles * 4 * 32 * int(sizeof(float));
  static_assert(kMost * kWarpBytes <= 48 * 1024);
  const int warps = warps_n * warps_k;
  int64_t ctas = (blocks + warps_n - 1) / warps_n;
  if (kTiles <= 2) ctas = std::min<int64_t>(ctas, int64_t(sms) * (kMost / warps));
  const dim3 grid{unsigned(ctas), unsigned(rows)};
  const auto kernel = int4_kernel<T, kTiles, kRead, kStep, kOffsets>;
  Plan plan{};
  while (1 << plan.log_k < warps_k) ++plan.log_k;
  plan.blocks = int(blocks), plan.slices = int(p.k_padded / kSlice), plan.steps = int(steps);
  plan.of_group = p.group >= p.k ? std::max(1, plan.steps) : int(p.group / (kSlice * kStep));
  plan.rounds = int(blocks / (ctas * warps_n)), plan.extra = int(blocks % (ctas * warps_n));
  launch_kernel(kernel, grid, 32 * warps, size_t(warps) * kWarpBytes, stream, p, plan);
}

template <class T, int kTiles, Read kRead, int kStep>
void launch(const Int4Params& p, cudaStream_t stream) {
  if constexpr (kRead == Read::kQ4K)
    launch<T, kTiles, kRead, kStep, true>(p, stream);
  else
    (p.offsets ? launch<T, kTiles, kRead, kStep, true> : launch<T, kTiles, kRead, kStep, false>)(p, stream);
}

template <class T, int kTiles>
void launch(const Int4Params& p, cudaStream_t stream) {
  const auto aligned = [](const void* q, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(q) % bytes == 0; };
  const uintptr_t four = p.scale_type == ScalarType::Float ? 16 : 8;  // bytes of a lane's scales
  const bool at_once = p.n % 4 == 0 && aligned(p.scales, four) && aligned(p.offsets, four) && aligned(p.zeros, 4) &&
                       aligned(p.sub_scales, 4) && aligned(p.sub_mins, 4);
  const auto divides = [&](int step) {
    return p.k_padded % (step * kSlice) == 0 && (p.group >= p.k || p.group % (step * kSlice) == 0);
  };
  if (!at_once)
    launch<T, kTiles, Read::kEach, 1>(p, stream);
  else if (p.sub_scales)
    launch<T, kTiles, Read::kQ4K, 1>(p, stream);
  else if (p.scale_type == ScalarType::Float)
    launch<T, kTiles, Read::kWide, 1>(p, stream);
  else if (divides(4))
    launch<T, kTiles, Read::kNarrow, 4>(p, stream);
  else if (divides(2))
    launch<T, kTiles, Read::kNarrow, 2>(p, stream);
  else
    launch<T, kTiles, Read::kNarrow, 1>(p, stream);
}

}  // namespace

template <>
void launch_int4_mma<PAGEDKV_TYPE>(const Int4Params& p, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  // As few rows a warp as leave a CTA and a half for each SM: more of them share the weights of small layers. 64 rows
  // of 576 x 576: 2.8 us, 4.2 of 32 rows a warp; 32 rows of 4096 x 4096: 10.0, 16.2 of 8.
  const int64_t blocks = (p.n + kInt4Block - 1) / kInt4Block, most = int4_device().sms * 3 / 2;
  const auto suits = [&](int tiles) {
    return p.m <= 8 * tiles || blocks * ((p.m + 8 * tiles - 1) / (8 * tiles)) <= most;
  };
  (suits(1) ? launch<T, 1> : suits(2) ? launch<T, 2> : launch<T, 4>)(p, stream);
}

}  // namespace pagedkv
