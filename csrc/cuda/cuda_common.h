// Shared by the CUDA files: hardware types behind torch's, the current stream, 16-byte vectors, conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "../ops.h"

namespace pagedkv {

// torch's float types -> CUDA's own, so that kernels use the hardware conversions
template <class T>
struct cuda_type {
  using type = T;
};
template <>
struct cuda_type<Half> {
  using type = __half;
};
template <>
struct cuda_type<BFloat16> {
  using type = __nv_bfloat16;
};

// dispatch_float over CUDA's types: f is called with a value of float, __half or __nv_bfloat16
template <class F>
inline void dispatch_cuda(ScalarType t, const char* op, F&& f) {
  dispatch_float(t, op, [&](auto tag) { f(typename cuda_type<decltype(tag)>::type{}); });
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// N elements moved as one aligned load or store
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return float(x);
}
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return T(x);
}

}  // namespace pagedkv
