// units: PAGEDKV_HEAD_DIM=64,128,256
// The instantiations of paged_prefill_sm90.cuh.
#include "paged_prefill_sm90.cuh"

namespace pagedkv::prefill::sm90 {

template <class T, int kDim>
void launch_bucket(const Call& call, unsigned grid, cudaStream_t stream) {
  const auto kernel = prefill_sm90_kernel<T, kDim>;
  constexpr int kBytes = Shape<kDim>::kBytes;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  kernel<<<grid, Shape<kDim>::kThreads, kBytes, stream>>>(call);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template void launch_bucket<__half, PAGEDKV_HEAD_DIM>(const Call&, unsigned, cudaStream_t);
template void launch_bucket<__nv_bfloat16, PAGEDKV_HEAD_DIM>(const Call&, unsigned, cudaStream_t);

}  // namespace pagedkv::prefill::sm90
