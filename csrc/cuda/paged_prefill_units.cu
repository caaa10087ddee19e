// units: PAGEDKV_HEAD_DIM=32,64,96,128,192,256
// The instantiations of paged_prefill.cuh.
#include "paged_prefill.cuh"

namespace pagedkv::prefill {

template <class T, int kDim>
void launch_bucket(const Params& p, bool quantized, unsigned grid, cudaStream_t stream) {
  (quantized ? launch<T, kDim, true> : launch<T, kDim, false>)(p, grid, stream);
}

template void launch_bucket<__half, PAGEDKV_HEAD_DIM>(const Params&, bool, unsigned, cudaStream_t);
template void launch_bucket<__nv_bfloat16, PAGEDKV_HEAD_DIM>(const Params&, bool, unsigned, cudaStream_t);

}  // namespace pagedkv::prefill
