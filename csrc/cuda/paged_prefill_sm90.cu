// launch_sm90: whether a call is for paged_prefill_sm90.cuh, and its launch.
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "attention_plan.cuh"
#include "paged_prefill_sm90.cuh"
#include "tensor_map.h"

namespace pagedkv::prefill {
namespace {

constexpr int64_t kFillHere = 1 << 22;  // rows * sequences to look at for rows that nobody owns; a kernel for more

// The environment's PAGEDKV_PREFILL=mma: the kernel of older GPUs (paged_prefill.cuh) on Hopper too, to test and
// measure it there. Read at each call, so that a process can run both.
bool wanted() {
  const char* const kernel = std::getenv("PAGEDKV_PREFILL");
  return !kernel || std::strcmp(kernel, "mma") != 0;
}

// Has that much shared memory exactly where it was compiled for sm_90a: the device may run another of the library's
// binaries, whose kernels are empty.
constexpr size_t kProbeBytes = 8192;
__global__ void wgmma_probe(int* out) {
#ifdef PAGEDKV_WGMMA
  __shared__ int shared[kProbeBytes / sizeof(int)];
  shared[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
#endif
}

bool has_wgmma() {
  static std::array<bool, 64> has;
  static std::array<std::once_flag, 64> once;
  const int index = current_device().index;
  std::call_once(once[index], [&] {
    int major = 0, minor = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    cudaFuncAttributes attributes{};
    if (major == 9 && minor == 0) STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, wgmma_probe));
    has[index] = attributes.sharedSizeBytes >= kProbeBytes;
  });
  return has[index];
}

bool describe(sm90::Call& call) {
  const Params& p = call.p;
  const AttentionParams& a = p.a;
  const bool paged = a.block_tables;
  call.box_shift = paged ? std::min(a.block_shift, 4) : 4;
  while (p.group << (call.q_box_shift + 1) <= 16) ++call.q_box_shift;
  auto cache = [&](CUtensorMap& map, const void* data, int64_t page, int64_t token, int64_t head, int box) {
    return describe_tensor(map, data, a.head_dim,
                           {{paged ? a.block_size : a.num_blocks, token, box},
                            {a.num_kv_heads, head, 1},
                            {paged ? a.num_blocks : 1, page, 1}});
  };
  auto queries = [&](CUtensorMap& map, int heads, int tokens) {
    return describe_tensor(map, a.q, a.head_dim,
                           {{p.group, 2 * a.q_stride_h, heads},
                            {a.num_kv_heads, 2 * a.q_stride_h * p.group, 1},
                            {a.num_tokens, 2 * a.q_stride_t, tokens}});
  };
  return cache(call.k, a.k, p.k_block, p.k_token, p.k_head, 1 << call.box_shift) &&
         cache(call.v, a.v, p.v_block, p.v_token, p.v_head, 1 << call.box_shift) &&
         cache(call.k_row, a.k, p.k_block, p.k_token, p.k_head, 1) &&
         cache(call.v_row, a.v, p.v_block, p.v_token, p.v_head, 1) &&
         queries(call.q, std::min(p.group, 256), 1 << call.q_box_shift) && queries(call.q_row, 1, 1);
}

}  // namespace

bool launch_sm90(const Params& p, ScalarType dtype, KVType kv, cudaStream_t stream) {
  const AttentionParams& a = p.a;
  if (kv != KVType::kSame || a.head_dim <= 32 || !p.q_vectors || !has_wgmma() || !wanted()) return false;
  sm90::Call call{p};
  if (!describe(call)) return false;
  call.counters = take_counters(stream);
  if (!a.filled && int64_t(a.num_tokens) * a.num_seqs > kFillHere) {
    launch_fill(a, 2, stream);
    call.p.a.filled = true;
  }
  auto launch = [&]<class T>(T) {
    const auto bucket = a.head_dim <= 64    ? sm90::launch_bucket<T, 64>
                        : a.head_dim <= 128 ? sm90::launch_bucket<T, 128>
                                            : sm90::launch_bucket<T, 256>;
    bucket(call, current_device().sms, stream);
  };
  if (dtype == ScalarType::Half)
    launch(__half{});
  else
    launch(__nv_bfloat16{});
  return true;
}

}  // namespace pagedkv::prefill
