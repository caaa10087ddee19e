// int8_linear, and int4_linear and q4k_linear of weights with offsets, for 17 rows and more of 16-bit activations on
// Hopper's tensor cores (wgmma, sm_90a).
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Float32 scales and odd sizes stay with int8_mma.cu, int4_mma.cu, or weights in 16 bits and cuBLAS.
//
// Algorithm: y^T = W x^T, W from registers as the A operand, x from shared memory as B. A tile is 64 outputs for each
// consumer and kRows rows; a CTA does one, or a part of its inputs. Warpgroups:
//   producer   a thread copies x and words (boxes of the copy engine), a warp scales and offsets (cp.async), stages
//              ahead
//   consumers  each 64 outputs and all rows. A warp has 16 outputs, half of a block of 32, of which a lane has two
//              neighbours. Numbers of 32 inputs are made while the products of the 32 before run.
// Inputs keep their order, and x is read as it is: lane t of a row of four needs inputs 2 t, 2 t + 1 of each eight, so
// four lanes read a word of eight inputs (4 bits) or two a word of four, and each takes its own bits.
//
// A number becomes scale * q + offset in float32, one fused multiply-add, and is rounded once: the stock dequantised
// weight. q is there as a float plus a constant (its bits written into the float's), which the offset takes away again,
// to 2e-3 of a step of q.
//
// Too few tiles for the GPU are cut along K: sums go to memory, and reduce_kernel adds them up in order. All orders are
// fixed by the shapes: equal calls give equal bits.
//
// Floor: the larger of bytes of W / 4.28 TB/s and 2 m n k / 790 TFLOP/s (an H200's). Measured there, bfloat16, in us,
// bytes with scales of 32 inputs, Q4_K, and cuBLAS on bfloat16 weights:
//
//     N x K       4096x4096        6144x4096        14336x4096        4096x14336        28672x4096
//     32 rows     14  14   14      18  18   17       29   31   32      28   29   34      47   51   64
//     64 rows     16  16   13      19  19   17       31   33   34      30   32   37      52   56   64
//     128 rows    20  20   15      25  27   17       40   42   34      38   40   38      65   70   69
//     256 rows    22  22   18      32  33   22       52   54   44      50   52   48     103  108   91
//     512 rows    34  35   24      50  53   36      101  107   86      91   95   78     187  194  155
//     1024 rows   49  52   45      85  87   68      184  192  152     161  171  148     357  369  307
//
// (Weights in 16 bits for the call, and cuBLAS: 161 of 28672 x 4096 at 64 rows, 187 at 256, 398 at 1024.) A slice of 32
// inputs and 256 outputs takes 570 cycles with 32 rows, 640 with 64: of 93 instructions of a warp 40 are for a pipe of
// half rate (bytes are selected and flipped one by one), which are 320 for the four warps that share it, and a product
// of registers takes 25 cycles more than its columns ask for.
// Tried: four consumers with 128 rows each beside more than 128 rows (59 us a tile of 4096 inputs, for 49 of two with
// 256 rows). All four slices of a stage unrolled: ptxas takes the numbers of one for registers of products that still
// run, and serialises them (C7513).
#include <cuda.h>

#include <algorithm>

#include "int4.h"
#include "int4_tile.cuh"
#include "reduce.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace pagedkv {
namespace {

// Forms of weights: bytes with scales; nibbles with scales and offsets; those of Q4_K.
enum class Form { kBytes, kOffsets, kSuper };

// Shared memory of a stage: x, boxes [kRows, 64] as wgmma.cuh has it; words, for each block rows of 32 in the same
// swizzle; of each slice scales (and offsets) [kOutputs]; of Q4_K, d and dmin.
template <Form kForm_, int kRows_, int kConsumers_>
struct Shape {
  static constexpr Form kForm = kForm_;
  static constexpr int kRows = kRows_, kConsumers = kConsumers_, kThreads = 128 * (1 + kConsumers);
  static constexpr int kOutputs = 64 * kConsumers, kBlocks = kOutputs / kInt4Block;
  static constexpr int kSlices = kRows > 128 ? 2 : 4, kInputs = kSlices * kInt4Block;  // slices of 32
  static constexpr int kWordRows = kForm == Form::kBytes ? 8 : 4;                      // of a slice
  static constexpr int kXBytes = kRows * kInputs * 2, kBlockBytes = kSlices * kWordRows * 128,
                       kWordBytes = kBlocks * kBlockBytes;
  static constexpr int kFactorBytes = kOutputs * (kForm == Form::kOffsets ? 4 : 2);  // of a slice
  static constexpr int kSuperBytes = kForm == Form::kSuper ? 4 * kOutputs : 0;
  static constexpr int kStageBytes = (kXBytes + kWordBytes + kSlices * kFactorBytes + kSuperBytes + 1023) / 1024 * 1024;
  static constexpr int kStages = std::min(8, 224 * 1024 / kStageBytes);
  static constexpr int kBytes = kStages * (kStageBytes + 16);  // with barriers
  static constexpr int kSums = kRows / 2;                      // of a thread
  // setmaxnreg: what the CTA is launched with is shared out anew
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 24;
  static constexpr int kConsumerRegisters =
      (65536 / kThreads / 8 * 8 * (1 + kConsumers) - kProducerRegisters) / kConsumers / 8 * 8;
};

template <int kStages>
struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

struct Work {
  CUtensorMap x;          // boxes of 64 inputs and the rows of a tile
  CUtensorMap words;      // [blocks][rows of 32 words], boxes of a stage
  int slices, of_group;   // of 32 inputs; those of a group
  int stages, row_tiles;  // of a tile; tiles with the same weights, which lie next to each other
  int whole, parts;       // tiles that one CTA does; the parts that the others are cut into
  float4* partial;        // [tiles that are cut][parts][kRows / 8][threads of the consumers]
};

// The first of a lane's two outputs in a tile; the other is the next. Lanes of half a warp have every other four.
__device__ __forceinline__ int lane_output(int warp, int lane) {
  const int g = lane / 4;
  return warp * 16 + (g / 2 % 2 * 2 + g / 4) * 4 + g % 2 * 2;
}

#ifdef PAGEDKV_WGMMA

constexpr int kArrivals = 1 + 32;

template <class S>
__device__ __forceinline__ void produce(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        uint32_t shared, int warp, int lane, int tile, int row, int begin, int end) {
  if (warp == 0 ? !wgmma::elect() : warp > 1) return;
  wgmma::Ring<S::kStages> ring;
  if (warp == 0) {
#pragma unroll 1
    for (int stage = begin; stage < end; ++stage) {
      uint64_t& full = barriers.full[ring.index];
      const uint32_t to = shared + ring.index * S::kStageBytes;
      wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
      wgmma::barrier_arrive_expecting(full, S::kWordBytes + S::kXBytes);
      wgmma::copy_box(to + S::kXBytes, work.words, full, 0, stage * (S::kSlices * S::kWordRows), tile * S::kBlocks, 0);
#pragma unroll
      for (int i = 0; i < S::kInputs / 64; ++i)
        wgmma::copy_box(to + i * S::kRows * 128, work.x, full, stage * S::kInputs + i * 64, row, 0, 0);
      ring.advance();
    }
    return;
  }
  // 16 bytes at a time of `kEach` bytes for each output: from row `at` of [.., n], zeros where there is nothing
  auto copy = [&]<int kEach>(std::integral_constant<int, kEach>, uint32_t to, const void* from, int64_t at, bool is) {
    constexpr int kOf = 16 / kEach;
#pragma unroll
    for (int first = 0; first < S::kOutputs; first += 32 * kOf) {
      const int output = first + lane * kOf, n = tile * S::kOutputs + output;
      const bool has = is && n < p.n;
      if (output < S::kOutputs)
        cp_async<16>(to + output * kEach, static_cast<const char*>(from) + (has ? at * p.n + n : 0) * kEach, has);
    }
  };
  constexpr std::integral_constant<int, 1> kByte;
  constexpr std::integral_constant<int, 2> kTwo;
  int slice = begin * S::kSlices, group = slice / work.of_group, in_group = slice - group * work.of_group;
#pragma unroll 1
  for (int stage = begin; stage < end; ++stage) {
    wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
    uint32_t to = shared + ring.index * S::kStageBytes + S::kXBytes + S::kWordBytes;
    const int super = slice / kQ4KGroups;
#pragma unroll
    for (int i = 0; i < S::kSlices; ++i, ++slice, to += S::kFactorBytes) {
      const bool is = slice < work.slices;
      if constexpr (S::kForm == Form::kSuper) {
        copy(kByte, to, p.sub_scales, slice, is);
        copy(kByte, to + S::kOutputs, p.sub_mins, slice, is);
      } else {
        copy(kTwo, to, p.scales, group, is);
        if constexpr (S::kForm == Form::kOffsets) copy(kTwo, to + 2 * S::kOutputs, p.offsets, group, is);
        if (++in_group == work.of_group) in_group = 0, ++group;
      }
    }
    if constexpr (S::kForm == Form::kSuper) {  // a stage lies in one
      copy(kTwo, to, p.scales, super, true);
      copy(kTwo, to + 2 * S::kOutputs, p.offsets, super, true);
    }
    wgmma::barrier_arrive_copies(barriers.full[ring.index]);
    ring.advance();
  }
  cp_async_wait<0>();
}

__device__ __forceinline__ float2 floats_of(uint32_t bits, ScalarType type) {
  if (type == ScalarType::BFloat16) return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// What q is written into: 2^15 + (q + 128) has a byte's bits 8 .. 15, 128 + q a nibble's 16 .. 19.
template <Form kForm>
constexpr float kBias = kForm == Form::kBytes ? 32768.f + 128.f : 128.f;

// Of a lane's two outputs: w = scale * (q + bias) + offset
struct Factors {
  float scale[2], offset[2];
  template <class S>
  __device__ __forceinline__ void load(const unsigned char* of_slice, const unsigned char* of_super, int output,
                                       ScalarType type) {
    const auto word = [](const void* from) { return *static_cast<const uint32_t*>(from); };
    if constexpr (S::kForm == Form::kSuper) {
      const auto bytes = [](const void* from) {
        const uint32_t v = *static_cast<const uint16_t*>(from);
        return float2{float(v & 255), float(v >> 8)};
      };
      const float2 s = bytes(of_slice + output), m = bytes(of_slice + S::kOutputs + output);
      const float2 d = floats_of(word(of_super + 2 * output), ScalarType::Half);
      const float2 dmin = floats_of(word(of_super + 2 * (S::kOutputs + output)), ScalarType::Half);
      scale[0] = d.x * s.x, scale[1] = d.y * s.y, offset[0] = -(dmin.x * m.x), offset[1] = -(dmin.y * m.y);
    } else {
      const float2 s = floats_of(word(of_slice + 2 * output), type);
      scale[0] = s.x, scale[1] = s.y, offset[0] = offset[1] = 0.f;
      if constexpr (S::kForm == Form::kOffsets) {
        const float2 o = floats_of(word(of_slice + 2 * (S::kOutputs + output)), type);
        offset[0] = o.x, offset[1] = o.y;
      }
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) offset[b] = fmaf(-kBias<S::kForm>, scale[b], offset[b]);
  }
  // Two neighbouring inputs of output b, from their word.
  template <class T, Form kForm>
  __device__ __forceinline__ uint32_t weights(uint32_t word, int t, int b) const {
    float v[2];
    if constexpr (kForm == Form::kBytes) {
      const uint32_t flipped = word ^ 0x80808080u;
      const uint32_t select = t % 2 ? 0x7424u : 0x7404u;  // bytes 0, q, 0, 0x47
      v[0] = __uint_as_float(__byte_perm(flipped, 0x47000000u, select));
      v[1] = __uint_as_float(__byte_perm(flipped, 0x47000000u, select + 0x10u));
    } else {
      const uint32_t pair = and_xor(word >> 4 * t, 0x000f000fu, 0x43084308u);
      v[0] = __uint_as_float(pair << 16), v[1] = __uint_as_float(pair & 0xffff0000u);
    }
    const float low = fmaf(v[0], scale[b], offset[b]), high = fmaf(v[1], scale[b], offset[b]);
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 h = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&h);
    } else {
      const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&h);
    }
  }
};

template <class S, class T>
__device__ __forceinline__ void consume(const Int4Params& p, const Work& work, Barriers<S::kStages>& barriers,
                                        const unsigned char* shared, int warp, int lane, int stages,
                                        float (&sum)[S::kSums]) {
  constexpr bool kBytes = S::kForm == Form::kBytes;
  const int t = lane & 3, output = lane_output(warp, lane), in_block = output % kInt4Block;
  const uint64_t x_base = wgmma::descriptor(smem_address(shared), 16);
  // of row t / 2 (bytes) or 0 of the lane's words; in row r more, chunks of 16 bytes are in place c ^ r
  const int first_row = kBytes ? t / 2 : 0;
  const uint32_t word = warp / 2 * S::kBlockBytes + wgmma::swizzle128(first_row, in_block / 4) + in_block % 4 * 4;
  const unsigned char* const words = shared + S::kXBytes;
  const unsigned char* const factors = words + S::kWordBytes;

#pragma unroll
  for (int i = 0; i < S::kSums; ++i) sum[i] = 0.f;
  wgmma::pin(sum);
  uint32_t a[2][2][4];
  wgmma::Ring<S::kStages> ring;
  int before = -1;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    const int index = ring.index, base = index * S::kStageBytes;
    const uint64_t x = x_base + base / 16;
    wgmma::barrier_wait(barriers.full[index], ring.parity);
    ring.advance();
#pragma unroll 1
    for (int pair = 0; pair < S::kSlices / 2; ++pair) {
      const unsigned char* const from = words + base + pair * (2 * S::kWordRows * 128);
      const unsigned char* const with_from = factors + base + pair * (2 * S::kFactorBytes);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Factors with;
        with.load<S>(with_from + i * S::kFactorBytes, factors + base + S::kSlices * S::kFactorBytes, output,
                     p.scale_type);
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // eight inputs
          const int row = i * S::kWordRows + (kBytes ? 2 * j : j);
          const uint2 w = *reinterpret_cast<const uint2*>(from + row * 128 + (word ^ row % 8 * 16));
          a[i][j / 2][j % 2 * 2] = with.weights<T, S::kForm>(w.x, t, 0);
          a[i][j / 2][j % 2 * 2 + 1] = with.weights<T, S::kForm>(w.y, t, 1);
        }
        wgmma::fence();
#pragma unroll
        for (int step = 0; step < 2; ++step)
          wgmma::multiply_add<T, S::kRows, false>(sum, a[i][step], x + pair * (S::kRows * 8) + i * 4 + step * 2);
        wgmma::commit();
        wgmma::wait<1>();  // the products before are done
        if (i == 0 && pair == 0 && before >= 0) {
          __syncwarp();
          if (lane == 0) wgmma::barrier_arrive(barriers.empty[before]);
        }
      }
    }
    before = index;
  }
  wgmma::wait<0>();
  wgmma::pin(sum);
}

#endif

template <class S, class T>
__global__ void __launch_bounds__(S::kThreads, 1)
    packed_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
#ifdef PAGEDKV_WGMMA
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& barriers = *reinterpret_cast<Barriers<S::kStages>*>(shared + S::kStages * S::kStageBytes);
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  const int slot = int(blockIdx.x) - work.whole;                // of `partial`; negative: a whole tile
  const int cut = slot < 0 ? 0 : slot / work.parts, item = slot < 0 ? int(blockIdx.x) : work.whole + cut;
  const int tile = item / work.row_tiles, row = (item - tile * work.row_tiles) * S::kRows;
  const int part = slot - cut * work.parts, parts = work.parts;
  const int begin = slot < 0 ? 0 : work.stages * part / parts,
            end = slot < 0 ? work.stages : work.stages * (part + 1) / parts;
  release_next();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.full[i], kArrivals);
      wgmma::barrier_init(barriers.empty[i], 4 * S::kConsumers);
    }
    wgmma::fence_barriers();
  }
  __syncthreads();
  wait_for_previous();
  if (warp < 4) {
    wgmma::give_registers<S::kProducerRegisters>();
    produce<S>(p, work, barriers, smem_address(shared), warp, lane, tile, row, begin, end);
  } else {
    wgmma::take_registers<S::kConsumerRegisters>();
    float sum[S::kSums];
    consume<S, T>(p, work, barriers, shared, warp - 4, lane, end - begin, sum);
    if (slot >= 0) {
      float4* const to = work.partial + int64_t(slot) * (S::kSums / 4 * 128 * S::kConsumers) + (warp - 4) * 32 + lane;
#pragma unroll
      for (int j = 0; j < S::kSums / 4; ++j)
        to[j * (128 * S::kConsumers)] = make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    } else {
      const int64_t n = int64_t(tile) * S::kOutputs + lane_output(warp - 4, lane);
      if (n >= p.n) return;
      float bias[2] = {};
      if (p.bias) to_floats(load_vec<T, 2>(static_cast<const T*>(p.bias) + n), bias);
      T* const y = static_cast<T*>(p.y) + n;
      const int first = row + 2 * (lane & 3);
#pragma unroll
      for (int i = 0; i < S::kSums / 2; ++i) {  // j, e
        const int64_t at = first + i / 2 * 8 + i % 2;
        const float one = sum[i / 2 * 4 + i % 2] + bias[0], two = sum[i / 2 * 4 + 2 + i % 2] + bias[1];
        if (at < p.m) store_vec(y + at * p.n, Vec<T, 2>{from_float<T>(one), from_float<T>(two)});
      }
    }
  }
#endif
}

// The sums of a tile's parts, in the order of their inputs. One CTA for 8 rows of a tile, whose threads have the
// outputs of the consumers.
template <class S, class T>
__global__ void __launch_bounds__(128 * S::kConsumers)
    reduce_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
  begin_kernel();
  constexpr int kPart = S::kSums / 4 * 128 * S::kConsumers;
  const int j = int(blockIdx.y), item = work.whole + int(blockIdx.x), tile = item / work.row_tiles;
  const float4* const from =
      work.partial + int64_t(blockIdx.x) * work.parts * kPart + j * (128 * S::kConsumers) + threadIdx.x;
  const int64_t n = int64_t(tile) * S::kOutputs + lane_output(threadIdx.x / 32, threadIdx.x % 32);
  const int64_t row = int64_t(item - tile * work.row_tiles) * S::kRows + 8 * j + 2 * (threadIdx.x & 3);
  if (n >= p.n || row >= p.m) return;
  float sum[4] = {};  // 2 h + e: output n + h of row e
#pragma unroll 4
  for (int i = 0; i < work.parts; ++i) {
    const float4 v = from[int64_t(i) * kPart];
    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e)
    if (row + e < p.m)
      store_vec(static_cast<T*>(p.y) + (row + e) * p.n + n,
                Vec<T, 2>{int4_finish<T>(p, row + e, n, sum[e]), int4_finish<T>(p, row + e, n + 1, sum[2 + e])});
}

// How a product is cut up: each round of CTAs does whole tiles, but those of the last one, if they do not fill it, may
// be cut along K into `parts`, whose sums go to memory.
struct Cut {
  int64_t whole;
  int parts;
  double time;  // us, measured on an H200: a stage, what is around stages, sums
};
template <class S>
Cut choose(const Int4Params& p, int sms) {
  constexpr double kStage = S::kRows == 256 ? 0.77 : S::kRows == 128 ? 1.85 : S::kRows == 64 ? 1.47 : 1.35;
  const bool alone = !p.residual && p.act == Act::kNone;  // else sums are finished by reduce_kernel
  const int64_t tiles = ceil_div(p.n, S::kOutputs) * int64_t(ceil_div(p.m, S::kRows)),
                stages = ceil_div(p.k_padded, S::kInputs);
  Cut best{};
  for (int parts = 1; parts <= std::min<int64_t>(8, stages); ++parts) {
    const bool sums = parts > 1 || !alone;
    const int64_t whole = sums ? (alone ? tiles / sms * sms : 0) : tiles, left = tiles - whole;
    const double megabytes = double(left * parts) * S::kRows * S::kOutputs * 8e-6;  // written and read
    const double time = double(ceil_div(whole, sms)) * (double(stages) * kStage + 2) +
                        double(ceil_div(left * parts, sms)) * (double(ceil_div(stages, parts)) * kStage + 2) +
                        (sums ? 2 + megabytes / 4.5 : 0);
    if (best.parts == 0 || time < best.time) best = {whole, parts, time};
  }
  return best;
}

template <class S, class T>
bool launch(const Int4Params& p, const Tensor& like, const Cut& cut, cudaStream_t stream) {
  Work work{};
  const int64_t slices = p.k_padded / kInt4Block, tiles = ceil_div(p.n, S::kOutputs), rows = ceil_div(p.m, S::kRows);
  if (!describe_tensor(work.words, p.packed, 64,
                       {{slices * S::kWordRows, 128, S::kSlices * S::kWordRows},
                        {ceil_div(p.n, kInt4Block), slices * S::kWordRows * 128, S::kBlocks},
                        {1, 16, 1}}) ||
      !describe_tensor(work.x, p.x, p.k_padded, {{p.m, p.x_stride * 2, S::kRows}, {1, 16, 1}, {1, 16, 1}}))
    return false;
  work.slices = int(slices), work.stages = int(ceil_div(slices, S::kSlices));
  work.of_group = p.group >= p.k ? S::kSlices * work.stages : int(p.group / kInt4Block);
  work.row_tiles = int(rows), work.whole = int(cut.whole), work.parts = cut.parts;
  const int64_t left = tiles * rows - cut.whole;
  Tensor workspace = like;
  if (left > 0) {
    workspace = torch::stable::new_empty(like, {left * cut.parts * S::kRows * S::kOutputs}, ScalarType::Float);
    work.partial = static_cast<float4*>(workspace.mutable_data_ptr());
  }
  const auto kernel = packed_kernel<S, T>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch_kernel(kernel, dim3(unsigned(cut.whole + left * cut.parts)), S::kThreads, S::kBytes, stream, p, work);
  if (left > 0)
    launch_kernel(reduce_kernel<S, T>, dim3(unsigned(left), unsigned(S::kRows / 8)), 128 * S::kConsumers, 0, stream, p,
                  work);
  return true;
}

template <Form kForm, class T>
bool launch_best(const Int4Params& p, const Tensor& like, int sms, cudaStream_t stream) {
  const auto run = [&]<class S>(S) { return launch<S, T>(p, like, choose<S>(p, sms), stream); };
  if (p.m <= 32) return run(Shape<kForm, 32, 4>{});
  if (p.m <= 64) return run(Shape<kForm, 64, 4>{});
  if (p.m <= 128) return run(Shape<kForm, 128, 4>{});
  return run(Shape<kForm, 256, 2>{});
}

}  // namespace

template <>
bool launch_packed_wgmma<PAGEDKV_TYPE>(const Int4Params& p, bool bytes, const Tensor& like, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  const auto aligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 16 == 0; };
  const Int4Device& device = int4_device();
  if (!device.has_wgmma || p.scale_type == ScalarType::Float || p.n % 16 != 0 || p.k == 0 || p.m > (1 << 20) ||
      p.n > (1 << 28) || !aligned(p.packed) || !aligned(p.scales) || !aligned(p.offsets) || !aligned(p.sub_scales) ||
      !aligned(p.sub_mins) || !aligned(p.bias) || !aligned(p.y))
    return false;
  if (!bytes && p.m <= 32 && p.n * p.k / device.sms < 150000) return false;  // int4_mma.cu is faster
  const auto run = bytes          ? launch_best<Form::kBytes, T>
                   : p.sub_scales ? launch_best<Form::kSuper, T>
                                  : launch_best<Form::kOffsets, T>;
  return run(p, like, device.sms, stream);
}

}  // namespace pagedkv
