// units: PAGEDKV_HEAD_DIM=32,64,96,128,192,256
// Launchers of paged_decode.cuh for one bucket of head_dim: two query types times three cache types.
#include <array>
#include <mutex>

#include "paged_decode.cuh"

namespace pagedkv {
namespace {

struct Launch {
  int warps;
  Teams teams;
};

// As many warps as shared memory allows; asked of the driver once a device.
template <class T, KVType kKV, int kDim>
const Launch& decode_launch() {
  static std::array<Launch, 64> known;
  static std::array<std::once_flag, 64> once;
  using L = DecodeLayout<kKV, kDim>;
  const Device& device = current_device();
  std::call_once(once[device.index], [&] {
    Launch launch{kDecodeWarps, {}};
    while (launch.warps > 1 && L::bytes(launch.warps) > device.smem_per_block) --launch.warps;
    const auto kernel = paged_decode_kernel<T, kKV, kDim>;
    const int bytes = L::bytes(launch.warps);
    int ctas = 0;  // of a multiprocessor
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, 32 * launch.warps, bytes));
    launch.teams[0] = std::max(1, ctas) * device.sms;
    known[device.index] = launch;
    count_teams(kernel, 32 * launch.warps, bytes, known[device.index].teams);
  });
  return known[device.index];
}

template <class T, KVType kKV, int kDim>
void launch(const AttentionParams& p, int num_splits, const Tensor& like, cudaStream_t stream) {
  constexpr int kElement = DecodeLayout<kKV, kDim>::kElement;
  const Launch& config = decode_launch<T, kKV, kDim>();
  auto aligned = [](const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  auto wide = [&](const void* rows, int64_t block, int64_t token, int64_t head) {
    return aligned(rows, 16) && (block | token | head) * kElement % 16 == 0;
  };
  DecodeAccess access;
  access.query_pairs = aligned(p.q, 4) && (p.q_stride_t | p.q_stride_h) % 2 == 0;
  access.wide = p.head_dim * kElement % 16 == 0 && wide(p.k, p.k_stride_block, p.k_stride_t, p.k_stride_h) &&
                wide(p.v, p.v_stride_block, p.v_stride_t, p.v_stride_h);
  Plan plan;
  const Tensor workspace = make_plan(p, part_row<kDim>, num_splits, config.teams, like, plan);
  access.by_step = Divisor(16 * config.warps << plan.team_shift);
  launch_planned(paged_decode_kernel<T, kKV, kDim>, plan, 32 * config.warps,
                 DecodeLayout<kKV, kDim>::bytes(config.warps), stream, p, plan, access);
}

}  // namespace

template <class T, int kDim>
void launch_decode_dim(const AttentionParams& p, KVType kv, int num_splits, const Tensor& like, cudaStream_t stream) {
  switch (kv) {
    case KVType::kSame:
      return launch<T, KVType::kSame, kDim>(p, num_splits, like, stream);
    case KVType::kInt8:
      return launch<T, KVType::kInt8, kDim>(p, num_splits, like, stream);
    case KVType::kFp8:
      return launch<T, KVType::kFp8, kDim>(p, num_splits, like, stream);
  }
}

template void launch_decode_dim<__half, PAGEDKV_HEAD_DIM>(const AttentionParams&, KVType, int, const Tensor&,
                                                          cudaStream_t);
template void launch_decode_dim<__nv_bfloat16, PAGEDKV_HEAD_DIM>(const AttentionParams&, KVType, int, const Tensor&,
                                                                 cudaStream_t);

}  // namespace pagedkv
