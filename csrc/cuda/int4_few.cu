// int4_linear for 9 to 64 rows of 16-bit activations on Hopper (sm_90a).
// units: PAGEDKV_TYPE=__half,__nv_bfloat16
//
// Weights with offsets, float32 scales and odd sizes stay with int4_mma.cu.
//
// Algorithm: y^T = W x^T, W from registers as the A operand, x from shared memory as B. A tile is 256 outputs, and all
// rows: x in steps of 128 inputs, and the words of 8 blocks (int4.h), come by the copy engine, kStages ahead and the
// weights before the kernel in front is done. Four warpgroups have 64 outputs each; a lane takes the pairs of numbers
// that its place in a product asks for from the words of four lanes, so that x stays in order. Numbers are q - zero,
// exactly, and the sums of a set (inputs of a stage in one group) are scaled in float32: a product for each sum, not
// for each pair of weights, and scales of any type lose nothing. The numbers of a step are made while the products of
// the one before run.
//
// Few tiles: the CTAs of a cluster share the inputs of one, and each adds up the sums of every so many-th warp, its own
// and then those that the others write to its shared memory, in the order of their ranks. All orders are fixed by the
// shapes: equal calls give equal bits. Nothing runs in front or behind. (Stream-K filled all SMs, but with a kernel in
// front that arranged x and one behind that added up: about 10 us of 26 for 64 rows of 14336 x 4096 did not grow with
// the weights. Neither fits beside a CTA that has all registers of an SM, so little overlapped.)
//
// Floor: the larger of bytes of W / 4.28 TB/s and 2 m n k / 790 TFLOP/s (an H200's): 7.2 us for 14336 x 4096. Measured,
// us, at m = 16, 32, 64 (in parentheses with stream-K):
//   6144 x 4096      -           10.8 (14.5)  13.7 (16.7)
//   14336 x 4096   15.8 (17.4)   16.9 (20.0)  20.8 (26.1)
//   4096 x 14336     -           19.6 (20.9)  24.5 (26.1)
//   28672 x 4096   26.4 (24.8)   28.4 (31.7)  35.7 (40.7)
// A stage takes 0.6 us of 32 rows and 0.85 of 64, for a wgmma with A from registers takes about 25 cycles more than its
// columns ask for. Another 5 to 7 us are start, first copies and exchange; another round of a cluster takes 4 of them.
//
// Tried: products by mma.sync, x as it lies, 16 warps: 14.6, 20.2, 31.1 us for 14336 x 4096. The first words ahead of
// the cluster's meeting: half a us more.
#include <algorithm>
#include <array>
#include <mutex>

#include "int4.h"
#include "int4_tile.cuh"
#include "reduce.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace pagedkv {
namespace {

constexpr int kBlocks = 8, kOutputs = kBlocks * kInt4Block;  // of a tile
constexpr int kSlices = 4;                                   // of a stage
constexpr int kConsumers = kOutputs / 16;                    // warps with 16 outputs each, four to a product
constexpr int kThreads = 128 + 32 * kConsumers;
// Of a cluster: its CTAs share the inputs of a tile, and each adds up the sums of every so many-th warp.
constexpr int kMostSize = 8;
constexpr int most_parts() {
  int most = 0;
  for (int size = 1; size <= kMostSize; ++size) most = std::max(most, (kConsumers + size - 1) / size * (size - 1));
  return most;
}
constexpr int kMostParts = most_parts();

// Shared memory of a stage: x, for each 64 inputs [kRows, 64] in the swizzle of wgmma.cuh; the words of each block,
// [slices][4][32]; scales and zeros [outputs] of each set of slices, which share a group. Behind the stages: sums of
// other CTAs.
template <int kRows_, int kSets_>
struct Shape {
  static constexpr int kRows = kRows_, kSets = kSets_, kSetSlices = kSlices / kSets;
  static constexpr int kXBytes = kRows * 64 * kSlices, kWordBytes = kBlocks * 512 * kSlices,
                       kFactorBytes = 3 * kOutputs;
  static constexpr int kStageBytes = (kXBytes + kWordBytes + kSets * kFactorBytes + 1023) / 1024 * 1024;
  static constexpr int kPartBytes = 16 * kRows * int(sizeof(float));  // a warp's sums
  static constexpr int kExchangeBytes = kMostParts * kPartBytes;
  static constexpr int kStages = std::min(16, (225 * 1024 - kExchangeBytes) / kStageBytes);
  static constexpr int kBytes = kStages * kStageBytes + kExchangeBytes + 1024;
  static_assert(kStages >= 4);
};

template <int kStages>
struct Barriers {
  uint64_t full[kStages], empty[kStages];
  uint64_t met[kConsumers];   // the other parts of what a warp adds up are here
  uint64_t free[kConsumers];  // a warp's last part was read
};

struct Work {
  CUtensorMap words, x;
  int slices, of_group;  // slices of a group
  int stages, tiles;
};

#ifdef PAGEDKV_WGMMA

// What this CTA does: stages begin .. end of every clusters-th tile.
struct Share {
  int rank, size, first, clusters, begin, end;
  __device__ __forceinline__ explicit Share(const Work& w)
      : rank(wgmma::cluster_rank()),
        size(wgmma::cluster_size()),
        first(int(blockIdx.x) / size),
        clusters(int(gridDim.x) / size),
        begin(w.stages * rank / size),
        end(w.stages * (rank + 1) / size) {}
};

// Three warps: a lane copies x, a lane words, and all lanes of the third scales and zeros.
constexpr int kArrivals = 2 + 32;

template <class S>
__device__ __forceinline__ void produce(const Int4Params& p, const Work& work, const Share& share,
                                        Barriers<S::kStages>& barriers, uint32_t shared, int warp, int lane) {
  if (warp == 3 || (warp < 2 && lane > 0)) return;
  wgmma::Ring<S::kStages> ring;
  if (warp == 0) wait_for_previous();
  for (int tile = share.first; tile < work.tiles; tile += share.clusters) {
    int slice = share.begin * kSlices, group = slice / work.of_group, in_group = slice - group * work.of_group;
#pragma unroll 1
    for (int stage = share.begin; stage < share.end; ++stage) {
      uint64_t& full = barriers.full[ring.index];
      const uint32_t to = shared + ring.index * S::kStageBytes;
      wgmma::barrier_wait(barriers.empty[ring.index], ring.parity ^ 1);
      if (warp == 0) {
        wgmma::barrier_arrive_expecting(full, S::kXBytes);
#pragma unroll
        for (int i = 0; i < kSlices / 2; ++i)
          wgmma::copy_box(to + i * S::kRows * 128, work.x, full, stage * (32 * kSlices) + i * 64, 0, 0, 0);
      } else if (warp == 1) {
        wgmma::barrier_arrive_expecting(full, S::kWordBytes);
        wgmma::copy_box(to + S::kXBytes, work.words, full, 0, stage * kSlices, tile * kBlocks, 0);
      } else {
#pragma unroll
        for (int i = 0; i < S::kSets; ++i) {
          const bool exists = slice < work.slices;
#pragma unroll
          for (int j = 0; j < kOutputs / 128; ++j) {
            const int output = 128 * j + 4 * lane;
            const int64_t n = int64_t(tile) * kOutputs + output;
            const bool ok = exists && n < p.n;
            const int64_t from = ok ? group * p.n + n : 0;
            const uint32_t at = to + S::kXBytes + S::kWordBytes + i * S::kFactorBytes;
            cp_async<8>(at + 2 * output, static_cast<const char*>(p.scales) + from * 2, ok);
            if (p.zeros) cp_async<4>(at + 2 * kOutputs + output, p.zeros + from, ok);
          }
          slice += S::kSetSlices, in_group += S::kSetSlices;
          if (in_group >= work.of_group) in_group = 0, ++group;
        }
        wgmma::barrier_arrive_copies(full);
      }
      ring.advance();
    }
  }
  if (warp == 2) cp_async_wait<0>();
}

// The sums of two neighbouring outputs: rows row + 8 j and the next of each j
template <class T, int kRows>
__device__ __forceinline__ void store_tile(const Int4Params& p, int64_t row, int64_t n, float (&sum)[kRows / 2]) {
  if (n >= p.n) return;
  if (p.bias) {
    const auto bias = load_vec<T, 2>(static_cast<const T*>(p.bias) + n);
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sum[i] += to_float(bias.v[i / 2 % 2]);
  }
  apply<kRows / 2>(p.act, sum);
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t at = (row + 8 * j + e) * p.n + n;
      float out[2] = {sum[4 * j + e], sum[4 * j + 2 + e]};
      if (row + 8 * j + e >= p.m) continue;
      if (p.residual) {
        const auto residual = load_vec<T, 2>(static_cast<const T*>(p.residual) + at);
        out[0] += to_float(residual.v[0]), out[1] += to_float(residual.v[1]);
      }
      store_vec(static_cast<T*>(p.y) + at, Vec<T, 2>{from_float<T>(out[0]), from_float<T>(out[1])});
    }
}

template <class S, class T>
__device__ __forceinline__ void consume(const Int4Params& p, const Work& work, const Share& share,
                                        Barriers<S::kStages>& barriers, unsigned char* shared, int warp, int lane) {
  constexpr int kRows = S::kRows;
  constexpr int kStepSlices = kRows > 32 ? 1 : std::min(2, S::kSetSlices), kSteps = kSlices / kStepSlices;
  constexpr int kSetSteps = kSteps / S::kSets, kPart = S::kPartBytes / 16;
  const int t = lane & 3, g = lane >> 2, output = warp * 16 + 2 * g;
  const uint64_t x_base = wgmma::descriptor(smem_address(shared), 16);
  const uint32_t x_low = uint32_t(x_base), x_high = uint32_t(x_base >> 32);
  const unsigned char* const words = shared + S::kXBytes + warp / 2 * (kSlices * 512) + warp % 2 * 64 + g * 8;
  const unsigned char* const scales = shared + S::kXBytes + S::kWordBytes + 2 * output;
  const unsigned char* const zeros = shared + S::kXBytes + S::kWordBytes + 2 * kOutputs + output;
  const bool has_zeros = p.zeros != nullptr, bfloat = p.scale_type == ScalarType::BFloat16;
  // Where the sums of this warp of all CTAs are added up: the others' parts lie side by side.
  const int owner = warp % share.size, slot = warp / share.size;
  float4* const exchange =
      reinterpret_cast<float4*>(shared + S::kStages * S::kStageBytes) + slot * (share.size - 1) * kPart + lane;

  auto release = [&](int index) {
    __syncwarp();
    if (lane == 0) wgmma::barrier_arrive(barriers.empty[index]);
  };
  wgmma::Ring<S::kStages> ring;
  uint32_t round = 0;
  for (int tile = share.first; tile < work.tiles; tile += share.clusters, ++round) {
    float total[kRows / 2], sum[kRows / 2], scale[2] = {};
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) total[i] = sum[i] = 0.f;
    wgmma::pin(sum);
    auto fold = [&] {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) total[i] = fmaf(scale[i / 2 % 2], sum[i], total[i]);
    };
    uint2 word[kStepSlices][4];  // of the next step
    uint32_t raw = 0x0808u;      // zeros of its set
    auto load = [&](int index, int step) {
      const int base = index * S::kStageBytes;
#pragma unroll
      for (int i = 0; i < kStepSlices; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          word[i][j] = *reinterpret_cast<const uint2*>(words + base + 512 * (step * kStepSlices + i) + 128 * j);
      if (step % kSetSteps == 0 && has_zeros)
        raw = *reinterpret_cast<const uint16_t*>(zeros + base + step / kSetSteps * S::kFactorBytes);
    };
    uint32_t a[2][kStepSlices][2][4];
    int before = -1;
    wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
    load(ring.index, 0);
#pragma unroll 1
    for (int stage = share.begin; stage < share.end; ++stage) {
      const int index = ring.index, base = index * S::kStageBytes;
      ring.advance();
      uint32_t zero[2];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int set = step / kSetSteps;
        if (step % kSetSteps == 0) zero[0] = int4_zero_pair<T>(raw, 0), zero[1] = int4_zero_pair<T>(raw, 1);
#pragma unroll
        for (int i = 0; i < kStepSlices; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int b = 0; b < 2; ++b)
              a[step % 2][i][j / 2][b + j % 2 * 2] = subtract_pair<T>(
                  and_xor((b == 0 ? word[i][j].x : word[i][j].y) >> 4 * t, 0x000f000fu, int4_bias<T>() | 0x00080008u),
                  zero[b]);
        if (step < kSteps - 1) {
          load(index, step + 1);
        } else if (stage + 1 < share.end) {
          wgmma::barrier_wait(barriers.full[ring.index], ring.parity);
          load(ring.index, 0);
        }
        wgmma::hold(a[step % 2][kStepSlices - 1][1][3]);
        wgmma::wait<0>();  // the step before is done
        wgmma::pin(sum);
        if (step == 0 && before >= 0) release(before);
        if (step % kSetSteps == 0) {
          fold();
          const uint32_t bits = *reinterpret_cast<const uint32_t*>(scales + base + set * S::kFactorBytes);
          if (bfloat)
            scale[0] = __uint_as_float(bits << 16), scale[1] = __uint_as_float(bits & 0xffff0000u);
          else
            scale[0] = __half2float(__ushort_as_half(uint16_t(bits))),
            scale[1] = __half2float(__ushort_as_half(uint16_t(bits >> 16)));
        }
        wgmma::fence();
#pragma unroll
        for (int i = 0; i < 2 * kStepSlices; ++i) {
          const int k = step * 2 * kStepSlices + i;  // 16 inputs
          wgmma::multiply_add<T, kRows, false>(
              sum, a[step % 2][i / 2][i % 2],
              uint64_t(x_high) << 32 | (x_low + base / 16 + k / 4 * (kRows * 128 / 16) + k % 4 * 2),
              step % kSetSteps > 0 || i > 0);
        }
        wgmma::commit();
      }
      before = index;
    }
    wgmma::wait<0>();
    wgmma::pin(sum);
    release(before);
    fold();

    if (share.size > 1) {
      if (share.rank != owner) {
        if (round > 0) wgmma::barrier_wait_cluster(barriers.free[warp], (round - 1) & 1);
        float4* const to = exchange + (share.rank < owner ? share.rank : share.rank - 1) * kPart;
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j)
          wgmma::store_at(to + j * 32, owner,
                          make_float4(total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]));
        __syncwarp();
        if (lane == 0) wgmma::barrier_release_at(barriers.met[warp], owner);
        continue;
      }
      wgmma::barrier_wait_cluster(barriers.met[warp], round & 1);
#pragma unroll 1
      for (int other = 0; other < share.size - 1; ++other)
#pragma unroll
        for (int j = 0; j < kRows / 8; ++j) {
          const float4 v = exchange[other * kPart + j * 32];
          total[4 * j] += v.x, total[4 * j + 1] += v.y, total[4 * j + 2] += v.z, total[4 * j + 3] += v.w;
        }
      __syncwarp();
      if (tile + share.clusters < work.tiles && lane < share.size - 1)  // another part will come
        wgmma::barrier_release_at(barriers.free[warp], lane < owner ? lane : lane + 1);
    }
    store_tile<T, kRows>(p, 2 * t, int64_t(tile) * kOutputs + output, total);
  }
}

#endif

template <class S, class T>
__global__ void __launch_bounds__(kThreads, 1)
    int4_few_kernel(const __grid_constant__ Int4Params p, const __grid_constant__ Work work) {
#ifdef PAGEDKV_WGMMA
  extern __shared__ unsigned char dynamic_shared[];
  __shared__ Barriers<S::kStages> barriers;
  unsigned char* const shared = dynamic_shared + (-smem_address(dynamic_shared) & 1023u);
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(~0u, int(threadIdx.x >> 5), 0);  // tells the compiler that it is uniform
  release_next();
  const Share share(work);
  if (threadIdx.x == 0) {
    wgmma::prefetch_map(work.words);
    wgmma::prefetch_map(work.x);
    for (int i = 0; i < S::kStages; ++i) {
      wgmma::barrier_init(barriers.full[i], kArrivals);
      wgmma::barrier_init(barriers.empty[i], kConsumers);
    }
    for (int i = 0; i < kConsumers; ++i) {
      wgmma::barrier_init(barriers.met[i], max(1, share.size - 1));
      wgmma::barrier_init(barriers.free[i], 1);
    }
    wgmma::fence_barriers();
  }
  wgmma::cluster_sync();
  if (warp < 4) {
    wgmma::give_registers<32>();
    produce<S>(p, work, share, barriers, smem_address(shared), warp, lane);
  } else {
    wgmma::take_registers<112>();
    consume<S, T>(p, work, share, barriers, shared, warp - 4, lane);
  }
#endif
}

// How a product is cut up: CTAs of a cluster, and clusters.
struct Cut {
  int size, clusters;
  double time;  // us
};

// Clusters of so many CTAs that run at once.
template <class T>
const std::array<int, kMostSize + 1>& running_clusters(const Int4Device& device) {
  static std::array<std::array<int, kMostSize + 1>, 64> most{};
  static std::array<std::once_flag, 64> once;
  int index = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));  // int4_device() has seen that there is room for it
  std::call_once(once[index], [&] {
    most[index][1] = device.sms;
    if (!device.has_clusters) return;
    using S = Shape<64, 1>;  // any: a CTA has an SM
    const auto kernel = int4_few_kernel<S, T>;
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
    for (int size = 2; size <= kMostSize; ++size) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension, attribute.val.clusterDim = {unsigned(size), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(unsigned(size * device.sms)), config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = S::kBytes, config.attrs = &attribute, config.numAttrs = 1;
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&most[index][size], kernel, &config));
    }
  });
  return most[index];
}

// As many CTAs a cluster as make the rounds of tiles short. The times are an H200's.
Cut choose(const Int4Params& p, const std::array<int, kMostSize + 1>& running) {
  const int tiles = int(ceil_div(p.n, kOutputs)), stages = int(ceil_div(p.k_padded, kInt4Block * kSlices));
  const double stage = p.m <= 32 ? 0.62 : p.m <= 48 ? 0.72 : 0.85;
  Cut best{};
  for (int size = 1; size <= std::min(kMostSize, stages); ++size) {
    if (running[size] == 0) continue;
    const int rounds = int(ceil_div(tiles, running[size]));
    const double time = 4.5 + rounds * int(ceil_div(stages, size)) * stage + (size > 1 ? 4 * rounds - 2.8 : 0);
    if (best.size == 0 || time < best.time) best = {size, std::min(tiles, running[size]), time};
  }
  return best;
}

// What int4_mma.cu takes, us.
double without(const Int4Params& p, int sms) {
  const double megabytes = double(p.n) * double(p.k) * 0.5e-6 * 132 / sms;
  return p.m <= 16 ? 2.5 + 0.5 * megabytes : p.m <= 32 ? 3 + 0.78 * megabytes : 2 + 1.6 * megabytes;
}

template <class S, class T>
bool launch(const Int4Params& p, const Cut& by, cudaStream_t stream) {
  Work work{};
  work.tiles = int(ceil_div(p.n, kOutputs)), work.slices = int(p.k_padded / kInt4Block);
  work.stages = int(ceil_div(work.slices, kSlices));
  work.of_group = p.group >= p.k ? kSlices * work.stages : int(p.group / kInt4Block);
  const int64_t slices = work.slices;
  if (!describe_tensor(work.words, p.packed, 256,
                       {{slices, 512, kSlices}, {ceil_div(p.n, kInt4Block), slices * 512, kBlocks}, {1, 16, 1}},
                       false) ||
      !describe_tensor(work.x, p.x, p.k_padded, {{p.m, p.x_stride * 2, S::kRows}, {1, 16, 1}, {1, 16, 1}}))
    return false;
  const auto kernel = int4_few_kernel<S, T>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  launch_clusters(by.size, kernel, dim3(unsigned(by.size * by.clusters)), kThreads, S::kBytes, stream, p, work);
  return true;
}

}  // namespace

template <>
bool launch_int4_few<PAGEDKV_TYPE>(const Int4Params& p, cudaStream_t stream) {
  using T = PAGEDKV_TYPE;
  constexpr bool kHalf = std::is_same_v<T, __half>;
  const auto aligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 8 == 0; };
  const bool scales = p.scale_type == ScalarType::Half || (!kHalf && p.scale_type == ScalarType::BFloat16);
  if (p.m < kInt4Few || p.m > 64 || p.offsets || !scales || p.n % 4 != 0 || p.k == 0 || !aligned(p.packed) ||
      !aligned(p.scales) || !aligned(p.zeros) || !aligned(p.bias) || !aligned(p.residual) || p.n > (1 << 30))
    return false;
  const Int4Device& d = int4_device();
  if (!d.has_wgmma) return false;
  const Cut by = choose(p, running_clusters<T>(d));
  if (by.time >= 0.95 * without(p, d.sms)) return false;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    const bool whole = p.group >= p.k || p.group % (kSlices * kInt4Block) == 0;  // a stage in one group
    return (whole ? launch<Shape<kRows, 1>, T> : launch<Shape<kRows, kSlices>, T>)(p, by, stream);
  };
  if (p.m <= 16) return run(std::integral_constant<int, 16>());
  if (p.m <= 32) return run(std::integral_constant<int, 32>());
  if (p.m <= 48) return run(std::integral_constant<int, 48>());
  return run(std::integral_constant<int, 64>());
}

}  // namespace pagedkv
