// Stand-in for CUDA's header of this name: a GPU on the CPU, as far as csrc/cuda needs one. What it shows and what it
// cannot is in __init__.py.
//
// A thread block runs on one CPU thread, each of its threads as a fiber that yields wherever CUDA threads wait for each
// other: barriers, warp collectives. runtime.cpp schedules the fibers. Blocks run one after the other.
//
// Everything that a real GPU forbids and this file can see ends the process with a message (emulate::fail).
#pragma once

#include <cuda_fp16.h>
#include <math.h>
#include <stdlib.h>
#include <torch/csrc/stable/macros.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- language -------------------------------------------------------------------------------------------------------

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : uint3{x_, y_, z_} {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;

// ---- host side ------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrClusterLaunch
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost };
enum cudaMemcpyKind { cudaMemcpyDefault };
struct cudaPointerAttributes {
  cudaMemoryType type;
  void* devicePointer;
};

namespace emulate {

// Prints what went wrong, in which kernel, block and thread, and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// From the environment: EMULATE_SEED, EMULATE_SMS, EMULATE_SHARED (bytes a block may have) and EMULATE_HOPPER (1: the
// device has compute capability 9.0, otherwise 8.0). Read once.
struct Settings {
  unsigned seed;
  int sms, shared, hopper;
};
const Settings& settings();

cudaError_t set_max_shared(const void* kernel, int bytes);
cudaError_t last_error();  // of a launch; reading it clears it
const char* error_name(cudaError_t error);

struct Config {
  dim3 grid, block;
  size_t shared;
  Config(dim3 grid_, dim3 block_, size_t shared_ = 0, cudaStream_t = nullptr)
      : grid(grid_), block(block_), shared(shared_) {}
};
void run(const std::string& name, const void* kernel, const Config& config, const std::function<void()>& thread);

// kernel<<<config>>>(args...); arguments are evaluated once and every thread gets a copy
template <class... P, class... A>
void launch(const char* name, const char* by, void (*kernel)(P...), const Config& config, A&&... args) {
  const std::tuple<std::decay_t<P>...> parameters(std::forward<A>(args)...);
  run(std::string(name) + " of " + by, reinterpret_cast<const void*>(kernel), config,
      [&] { std::apply(kernel, parameters); });
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};

}  // namespace emulate

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    uint3 clusterDim;  // kernels compiled for this device have no clusters
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return emulate::last_error(); }
inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& s = emulate::settings();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = s.sms, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = s.shared, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = s.hopper ? 9 : 8, cudaSuccess;
    default:
      return *value = 0, cudaSuccess;
  }
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(P...)) {
  return *attributes = {48 << 10, 80}, cudaSuccess;  // compiled for this device, too old for launches that overlap
}
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  return emulate::set_max_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... args) {
  emulate::launch("kernel", __PRETTY_FUNCTION__, kernel,
                  emulate::Config(c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream), std::forward<A>(args)...);
  return emulate::last_error();
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  return *blocks = 2, cudaSuccess;
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(P...), const cudaLaunchConfig_t*) {
  return *clusters = 0, cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  *a = {cudaMemoryTypeHost, const_cast<void*>(p)};
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) { return *memory = malloc(bytes), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  return memset(memory, byte, bytes), cudaSuccess;
}

// one stream, never captured
enum { cudaStreamNonBlocking = 1, cudaUserObjectNoDestructorSync = 1, cudaGraphUserObjectMove = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaGraph_t = void*;
using cudaUserObject_t = void*;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamGetId(cudaStream_t, unsigned long long* id) { return *id = 0, cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*,
                                            cudaGraph_t*, const void**, size_t*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaUserObjectCreate(cudaUserObject_t*, void*, void (*)(void*), unsigned, unsigned) {
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return memcpy(to, from, bytes), cudaSuccess;
}

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                                                                  \
  do {                                                                                                        \
    const cudaError_t error = call;                                                                           \
    if (error != cudaSuccess) throw std::runtime_error(#call ": " + std::string(emulate::error_name(error))); \
  } while (0)

// ---- threads --------------------------------------------------------------------------------------------------------

namespace emulate {

constexpr int kWarp = 32;

void block_barrier();

// A warp-wide operation. Deposits a lane's operands; the last lane to come runs `all` on the 32 of them, then everyone
// goes on. `name` tells operations apart: lanes that meet in different ones are an error.
void collective(const char* name, void* mine, void (*all)(void* const (&lanes)[kWarp]));

// The lanes' T, in and out, for an operation over the whole warp.
template <class T, class F>
T warp_operation(const char* name, unsigned mask, const T& mine, F) {
  if (mask != ~0u) fail("%s of mask %08x: only full warps are emulated", name, mask);
  T lane = mine;
  collective(name, &lane, [](void* const(&lanes)[kWarp]) {
    T* x[kWarp];
    for (int l = 0; l < kWarp; ++l) x[l] = static_cast<T*>(lanes[l]);
    F{}(x);
  });
  return lane;
}

template <class T>
struct Shuffle {
  T in, out;
  int lane;  // to take from
};
template <class T>
T shuffle(const char* name, unsigned mask, T x, int from) {
  return warp_operation(name, mask, Shuffle<T>{x, x, from},
                        [](Shuffle<T>* const* lanes) {
                          for (int l = 0; l < kWarp; ++l) lanes[l]->out = lanes[lanes[l]->lane]->in;
                        })
      .out;
}
inline int lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp); }

struct Vote {
  bool in;
  unsigned out;
};
inline unsigned ballot(const char* name, unsigned mask, bool vote) {
  return warp_operation(name, mask, Vote{vote, 0},
                        [](Vote* const* lanes) {
                          unsigned bits = 0;
                          for (int l = 0; l < kWarp; ++l) bits |= unsigned(lanes[l]->in) << l;
                          for (int l = 0; l < kWarp; ++l) lanes[l]->out = bits;
                        })
      .out;
}

}  // namespace emulate

inline void __syncthreads() { emulate::block_barrier(); }
inline int __syncthreads_count(bool vote) {
  static int votes;  // blocks run one after another, and a block's threads too
  if (threadIdx.x + threadIdx.y + threadIdx.z == 0) votes = 0;
  emulate::block_barrier();
  votes += vote;
  emulate::block_barrier();
  const int all = votes;
  emulate::block_barrier();
  return all;
}
inline int __syncthreads_or(bool vote) { return __syncthreads_count(vote) > 0; }
inline void __syncwarp() {
  emulate::collective("__syncwarp", nullptr, [](void* const(&)[emulate::kWarp]) {});
}
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return emulate::shuffle("__shfl_sync", mask, x, lane % emulate::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return emulate::shuffle("__shfl_xor_sync", mask, x, emulate::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  const int from = emulate::lane() - distance;
  return emulate::shuffle("__shfl_up_sync", mask, x, from < 0 ? emulate::lane() : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int distance) {
  const int from = emulate::lane() + distance;
  return emulate::shuffle("__shfl_down_sync", mask, x, from >= emulate::kWarp ? emulate::lane() : from);
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __reduce_add_sync(unsigned mask, int x) {
  for (int d = emulate::kWarp / 2; d > 0; d /= 2) x += __shfl_xor_sync(mask, x, d);
  return x;
}
inline int __reduce_max_sync(unsigned mask, int x) {
  for (int d = emulate::kWarp / 2; d > 0; d /= 2) x = std::max(x, __shfl_xor_sync(mask, x, d));
  return x;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  for (int d = emulate::kWarp / 2; d > 0; d /= 2) x = std::max(x, __shfl_xor_sync(mask, x, d));
  return x;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) { return emulate::ballot("__ballot_sync", mask, vote); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline bool __all_sync(unsigned mask, bool vote) { return emulate::ballot("__all_sync", mask, vote) == mask; }
inline bool __any_sync(unsigned mask, bool vote) { return emulate::ballot("__any_sync", mask, vote) != 0; }

// ---- memory ---------------------------------------------------------------------------------------------------------

namespace emulate {

// The block's dynamic shared memory. It starts out as NaN, and ends at a page that may not be touched.
uint8_t* dynamic_shared_bytes();
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_bytes());
}

// A __shared__ variable of a function: likewise.
uint8_t* allocate_guarded(size_t bytes, size_t alignment);
long block_number();  // counts all blocks ever run
template <class T>
class SharedVariable {
 public:
  T& get() {
    if (block_ != block_number()) memset(storage_, 0xff, sizeof(T)), block_ = block_number();
    return *reinterpret_cast<T*>(storage_);
  }

 private:
  uint8_t* storage_ = allocate_guarded(sizeof(T), alignof(T));
  long block_ = -1;
};

uint32_t shared_address(const void* p);

}  // namespace emulate

inline size_t __cvta_generic_to_shared(const void* p) { return emulate::shared_address(p); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
template <class T>
void __stcg(T* p, T x) {
  *p = x;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T x) {
  return std::exchange(*p, T(*p + x));
}
template <class T>
T atomicMax(T* p, T x) {
  return std::exchange(*p, *p > x ? *p : x);
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) < C(b) ? C(a) : C(b);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  return C(a) > C(b) ? C(a) : C(b);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
// A result of an approximate function, as far off as the hardware may be: up to `ulps` either way, by chance (the same
// for the same result). Powers of two stay, which the hardware hits.
inline float approximate(float y, int ulps) {
  const unsigned bits = __float_as_uint(y), hash = bits * 0x9E3779B1u >> 16;
  if (!isfinite(y) || (bits & 0x7fffffu) == 0) return y;
  return __uint_as_float(bits + hash % (2 * ulps + 1) - ulps);
}
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float a, float b) { return approximate(a / b, 2); }
inline float __expf(float x) {
  const float y = expf(x);
  return y < 0x1p-100f ? y : approximate(y, 2 + int(fabsf(x)));
}
inline float __logf(float x) { return approximate(logf(x), 3); }
// the larger of each half
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a & 0xffff0000u, b & 0xffff0000u) | std::max(a & 0xffffu, b & 0xffffu);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  const double r = nearbyint(double(x));
  return r >= 0x1p31 ? 0x7fffffff : r < -0x1p31 ? -0x7fffffff - 1 : int(r);
}
inline unsigned __float2uint_rz(float x) { return x >= 0x1p32f ? ~0u : x > 0 ? unsigned(x) : 0; }  // NaN: 0
inline float rsqrtf(float x) { return approximate(1 / sqrtf(x), 2); }
inline unsigned long long __float2ull_rn(float x) {
  if (x != x) return 1ull << 63;
  return x >= 0x1p64f ? ~0ull : x < 0 ? 0 : static_cast<unsigned long long>(nearbyint(double(x)));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> 4 * i, byte = bytes >> 8 * (s & 7) & 0xff;
    r |= (s & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return r;
}

// ---- PTX: transform.py turns asm("name operands") into emulate::ptx::name(operands in the order of the text)
// ---------

namespace emulate::ptx {

inline void ex2_approx_ftz_f32(float& y, float x) {
  y = exp2f(x);
  y = fabsf(y) < 0x1p-126f ? 0 : approximate(y, 2);
}

inline void rcp_approx_ftz_f32(float& y, float x) {
  y = fabsf(x) < 0x1p-126f ? copysignf(INFINITY, x) : 1.f / x;
  y = fabsf(y) < 0x1p-126f ? copysignf(0.f, x) : approximate(y, 1);
}

inline void tanh_approx_f32(float& y, float x) { y = approximate(tanhf(x), 1 << 12); }
inline void ld_global_L1_no_allocate_L2_128B_v4_u32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w,
                                                    const uint4* p) {
  const uint4 loaded = *p;
  x = loaded.x, y = loaded.y, z = loaded.z, w = loaded.w;
}
inline void atom_acq_rel_gpu_global_add_s32(int& before, int* at, int x) { before = *at, *at += x; }
template <class T>
void mov_b32(T& to, T from) {
  to = from;
}
template <class T>
void mov_b64(T& to, T from) {
  to = from;
}
inline void mov_u64(uint64_t& nanoseconds) {  // of the special registers, the timer
  static uint64_t now = 0;
  nanoseconds = now += 100;
}
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}
inline void ld_global_L1_no_allocate_v4_u32(unsigned& x, unsigned& y, unsigned& z, unsigned& w, const uint4* p) {
  const uint4 v = *p;
  x = v.x, y = v.y, z = v.z, w = v.w;
}
inline void prefetch_global_L2(const volatile void*) {}
inline void cp_async_bulk_prefetch_L2_global(const volatile void*, int bytes) {
  if (bytes <= 0 || bytes % 16 != 0) fail("cp.async.bulk.prefetch of %d bytes: needs multiples of 16", bytes);
}
inline void ld_relaxed_gpu_global_s32(int& x, const int* at) { x = *at; }

void cp_async(uint32_t target, const void* source, int size, int bytes);
inline void lop3_b32(uint32_t& r, uint32_t a, uint32_t b, uint32_t c, int table) {
  r = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
}
inline void cp_async_cg_shared_global(uint32_t target, const void* source, int size, int bytes) {
  if (size != 16) fail("cp.async.cg of %d bytes: only 16 exist", size);
  cp_async(target, source, size, bytes);
}
inline void createpolicy_fractional_L2_evict_first_b64(uint64_t& policy, int, int) { policy = 1; }
inline void cp_async_cg_shared_global_L2_cache_hint_L2_128B(uint32_t target, const void* source, int size,
                                                            uint64_t policy) {
  if (policy != 1) fail("cp.async with a cache hint that is no policy");
  cp_async_cg_shared_global(target, source, size, size);
}
inline void cp_async_cg_shared_global_L2_cache_hint_L2_128B(uint32_t target, const void* source, int size, int bytes,
                                                            uint64_t policy) {
  if (policy != 1) fail("cp.async with a cache hint that is no policy");
  cp_async_cg_shared_global(target, source, size, bytes);
}
inline void cp_async_cg_shared_global_L2_cache_hint_L2_64B(uint32_t target, const void* source, int size, int bytes,
                                                           uint64_t policy) {
  cp_async_cg_shared_global_L2_cache_hint_L2_128B(target, source, size, bytes, policy);
}
inline void cp_async_ca_shared_global(uint32_t target, const void* source, int size, int bytes) {
  if (size != 4 && size != 8 && size != 16) fail("cp.async.ca of %d bytes: only 4, 8 and 16 exist", size);
  cp_async(target, source, size, bytes);
}
inline void cp_async_ca_shared_global_L2_128B(uint32_t target, const void* source, int size, int bytes) {
  cp_async_ca_shared_global(target, source, size, bytes);
}
void cp_async_commit_group();
void cp_async_wait_group(int pending);

void ldmatrix(uint32_t* const (&r)[4], uint32_t address, bool transposed);
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                     uint32_t address) {
  ldmatrix({&a, &b, &c, &d}, address, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                           uint32_t address) {
  ldmatrix({&a, &b, &c, &d}, address, true);
}

inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& transposed, uint32_t pair) {
  const int row = int(threadIdx.x) % 32 / 4, column = int(threadIdx.x) % 4 * 2;  // of the result
  uint32_t found[2];
  for (int i = 0; i < 2; ++i)
    found[i] = __shfl_sync(0xffffffffu, pair, 4 * (column + i) + row / 2) >> row % 2 * 16 & 0xffff;
  transposed = found[0] | found[1] << 16;
}

// d = a b + c, one lane's fragments of m16n8k16
struct Mma {
  float d[4];
  uint32_t a[4], b[2];
  float c[4];
};
void mma_half(Mma& lane);
void mma_bfloat16(Mma& lane);
#define EMULATE_MMA(name, function)                                                                                \
  inline void name(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                   uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {                             \
    Mma m{{}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};                                                       \
    function(m);                                                                                                   \
    d0 = m.d[0], d1 = m.d[1], d2 = m.d[2], d3 = m.d[3];                                                            \
  }
EMULATE_MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, mma_half)
EMULATE_MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, mma_bfloat16)
#undef EMULATE_MMA

// d += a b, one lane's fragments of m16n8k32 in 8 bits
struct MmaInt8 {
  int d[4];
  uint32_t a[4], b[2];
};
void mma_int8(MmaInt8& lane);
inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(int& d0, int& d1, int& d2, int& d3, uint32_t a0,
                                                            uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                            uint32_t b1, int c0, int c1, int c2, int c3) {
  MmaInt8 m{{c0, c1, c2, c3}, {a0, a1, a2, a3}, {b0, b1}};
  mma_int8(m);
  d0 = m.d[0], d1 = m.d[1], d2 = m.d[2], d3 = m.d[3];
}

}  // namespace emulate::ptx
