// Launcher of paged_simt.cuh: three cache types times three buckets of head_dim.
#include <array>
#include <atomic>

#include "paged_simt.cuh"

namespace pagedkv {
namespace {

template <KVType kKV, int kDim>
void launch(const AttentionParams& p, int num_splits, const Tensor& like, cudaStream_t stream) {
  static std::array<std::atomic<int>, 64> known;  // CTAs that a device runs at once
  const auto kernel = attention_simt_kernel<kKV, kDim>;
  constexpr int kBytes = sizeof(SimtLayout<kDim>);
  const Device& device = current_device();
  int ctas = known[device.index];
  if (ctas == 0) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, kSimtThreads, kBytes));
    ctas = std::max(1, ctas) * device.sms;
    known[device.index] = ctas;
  }
  const bool vectors = reinterpret_cast<uintptr_t>(p.q) % 16 == 0 && (p.q_stride_t | p.q_stride_h) % 4 == 0;
  Plan plan;
  const Tensor workspace = make_plan(p, part_row<kDim>, num_splits, {ctas}, like, plan);
  launch_planned(kernel, plan, kSimtThreads, kBytes, stream, p, plan, vectors);
}

template <KVType kKV>
void launch_bucket(const AttentionParams& p, int num_splits, const Tensor& like, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch<kKV, 64>(p, num_splits, like, stream);
  if (p.head_dim <= 128) return launch<kKV, 128>(p, num_splits, like, stream);
  return launch<kKV, 256>(p, num_splits, like, stream);
}

}  // namespace

void launch_simt(const AttentionParams& p, KVType kv, int num_splits, const Tensor& like, cudaStream_t stream) {
  switch (kv) {
    case KVType::kSame:
      return launch_bucket<KVType::kSame>(p, num_splits, like, stream);
    case KVType::kInt8:
      return launch_bucket<KVType::kInt8>(p, num_splits, like, stream);
    case KVType::kFp8:
      return launch_bucket<KVType::kFp8>(p, num_splits, like, stream);
  }
}

}  // namespace pagedkv
