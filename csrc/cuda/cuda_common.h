// Shared by the CUDA files: hardware types behind torch's, the current stream, 16-byte vectors, conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <utility>

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

// launches that overlap -----------------------------------------------------------------------------------------------
//
// A kernel launched by launch_kernel() may start while the one in front of it in the stream still runs (programmatic
// dependent launch, sm_90 and later): a part of the microsecond from the end of a kernel to the first instruction of
// the next is gone, in a CUDA graph too (reshape_and_cache of one token: 0.97 us for 1.27, together with an earlier
// load). In return, no thread may touch memory before wait_for_previous(), prefetches into L2, guess() and packed
// weights apart, which no kernel writes that lets others start, and every thread must call it: a block that ended
// without waiting would let the kernel behind it go ahead of the one in front.
//
// Such a kernel must not load by __ldg: the compiler takes what it reads for constant, and moves the load up across the
// wait. (Products of 4-bit weights read inputs that were not written yet, in graphs of whole models alone.)

// What such code finds in memory before wait_for_previous() is no more than a guess.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PAGEDKV_OVERLAP
#endif
#ifdef PAGEDKV_OVERLAP
constexpr bool kOverlap = true;
#else
constexpr bool kOverlap = false;
#endif

// Lets the next kernel start as soon as there is room.
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel in front is complete and its memory visible.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// An integer that another kernel may be writing: in its place among this thread's accesses, and not by way of L1, which
// would keep it.
__device__ __forceinline__ int guess(const int* at) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
  return x;
}
// Memory that another kernel may be writing to L2, where it stays what it is: `bytes` from `at`, multiples of 16.
__device__ __forceinline__ void bring_to_l2(const void* at, int bytes) {
#ifdef PAGEDKV_OVERLAP
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void begin_kernel() {
  release_next();
  wait_for_previous();
}

// Whether the code that runs on the current device waits: it may be compiled for an older one. All kernels of the
// library are compiled for the same architectures, so any tells.
template <class... P>
bool launches_overlap(void (*kernel)(P...)) {
  static std::array<std::atomic<signed char>, 64> known;  // 0: not yet, 1: no, 2: yes
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  if (device >= int(known.size())) return false;
  signed char answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes compiled;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&compiled, kernel));
    answer = compiled.ptxVersion >= 90 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

// Launches a kernel that calls wait_for_previous() or begin_kernel(), in clusters of so many CTAs (sm_90 and later).
template <class... P, class... A>
void launch_clusters(int size, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                     A&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = attributes;
  if (launches_overlap(kernel)) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (size > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(size), 1, 1};
  }
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

template <class... P, class... A>
void launch_kernel(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A&&... arguments) {
  launch_clusters(1, kernel, grid, block, shared, stream, std::forward<A>(arguments)...);
}

// vectors and conversions ---------------------------------------------------------------------------------------------

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
