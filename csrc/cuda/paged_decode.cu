// units: PAGEDKV_HEAD_DIM=32,64,96,128,192,256
// Launchers of paged_decode.cuh and paged_decode_quantized.cuh for one bucket of head_dim: two query types times three
// cache types.
#include <array>
#include <mutex>

#include "paged_decode_quantized.cuh"

namespace pagedkv {
namespace {

struct Launch {
  int warps, bytes;
  Teams teams;
};

// As many warps as shared memory allows; asked of the driver once a device. L: the layout.
template <auto kKernel, class L>
const Launch& decode_launch() {
  static std::array<Launch, 64> known;
  static std::array<std::once_flag, 64> once;
  const Device& device = current_device();
  std::call_once(once[device.index], [&] {
    Launch& launch = known[device.index];
    launch.warps = L::kWarps;
    while (launch.warps > 1 && L::bytes(launch.warps) > device.smem_per_block) --launch.warps;
    launch.bytes = L::bytes(launch.warps);
    int ctas = 0;  // of a multiprocessor
    STD_CUDA_CHECK(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::bytes(launch.warps)));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kKernel, 32 * launch.warps, launch.bytes));
    launch.teams[0] = std::max(1, ctas) * device.sms;
    count_teams(kKernel, 32 * launch.warps, launch.bytes, launch.teams);
  });
  return known[device.index];
}

// `element`: bytes of a stored number.
template <auto kKernel, class L, int kDim>
void launch(const AttentionParams& p, int element, int num_splits, const Tensor& like, cudaStream_t stream) {
  const Launch& config = decode_launch<kKernel, L>();
  auto aligned = [](const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  auto wide = [&](const void* rows, int64_t block, int64_t token, int64_t head) {
    return aligned(rows, 16) && (block | token | head) * element % 16 == 0;
  };
  DecodeAccess access;
  access.query_pairs = aligned(p.q, 4) && (p.q_stride_t | p.q_stride_h) % 2 == 0;
  access.wide = p.head_dim * element % 16 == 0 && wide(p.k, p.k_stride_block, p.k_stride_t, p.k_stride_h) &&
                wide(p.v, p.v_stride_block, p.v_stride_t, p.v_stride_h);
  Plan plan;
  plan.head = kHead * 2 / element;
  const Tensor workspace = make_plan(p, part_row<kDim>, num_splits, config.teams, like, plan);
  access.by_step = Divisor(16 * config.warps << plan.team_shift);
  launch_planned(kKernel, plan, 32 * config.warps, config.bytes, stream, p, plan, access);
}

template <class T, KVType kKV, int kDim, int kTiles>
void launch_quantized(const AttentionParams& p, int num_splits, const Tensor& like, cudaStream_t stream) {
  constexpr auto kKernel = paged_decode_quantized_kernel<T, kKV, kDim, kTiles>;
  launch<kKernel, QuantizedLayout<kDim, kTiles>, kDim>(p, 1, num_splits, like, stream);
}
template <class T, KVType kKV, int kDim>
void launch_quantized(const AttentionParams& p, int num_splits, const Tensor& like, cudaStream_t stream) {
  const int64_t rows = int64_t(p.max_query_len) * (p.num_heads / p.num_kv_heads);
  const auto launch_tiles = rows > 8 ? launch_quantized<T, kKV, kDim, 2> : launch_quantized<T, kKV, kDim, 1>;
  launch_tiles(p, num_splits, like, stream);
}

}  // namespace

template <class T, int kDim>
void launch_decode_dim(const AttentionParams& p, KVType kv, int num_splits, const Tensor& like, cudaStream_t stream) {
  switch (kv) {
    case KVType::kSame:
      return launch<paged_decode_kernel<T, kDim>, DecodeLayout<kDim>, kDim>(p, 2, num_splits, like, stream);
    case KVType::kInt8:
      return launch_quantized<T, KVType::kInt8, kDim>(p, num_splits, like, stream);
    case KVType::kFp8:
      return launch_quantized<T, KVType::kFp8, kDim>(p, num_splits, like, stream);
  }
}

template void launch_decode_dim<__half, PAGEDKV_HEAD_DIM>(const AttentionParams&, KVType, int, const Tensor&,
                                                          cudaStream_t);
template void launch_decode_dim<__nv_bfloat16, PAGEDKV_HEAD_DIM>(const AttentionParams&, KVType, int, const Tensor&,
                                                                 cudaStream_t);

}  // namespace pagedkv
