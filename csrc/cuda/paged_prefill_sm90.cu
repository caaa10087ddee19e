// launch_sm90: whether a call is for paged_prefill_sm90.cuh, and its launch.
#include <array>
#include <mutex>

#include "attention_plan.cuh"
#include "paged_prefill_sm90.cuh"

namespace pagedkv::prefill {
namespace {

constexpr bool kEnabled = true;  // false: mma.sync everywhere, to compare

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

}  // namespace

bool launch_sm90(const Params& p, ScalarType dtype, KVType kv, cudaStream_t stream) {
  const AttentionParams& a = p.a;
  if (!kEnabled || kv != KVType::kSame || a.head_dim <= 32 || !p.q_vectors || !a.next_item || !has_wgmma())
    return false;
  // Two bounds on the row tiles of a KV head: sequences own disjoint rows, and none has more than max_query_len tokens
  const int64_t tiles =
      std::min(int64_t(a.num_tokens) * p.group / kRows + a.num_seqs, int64_t(a.num_seqs) * p.row_tiles);
  const unsigned grid = unsigned(std::min<int64_t>(tiles * a.num_kv_heads, current_device().sms));
  auto launch = [&]<class T>(T) {
    const auto bucket = a.head_dim <= 64    ? sm90::launch_bucket<T, 64>
                        : a.head_dim <= 128 ? sm90::launch_bucket<T, 128>
                                            : sm90::launch_bucket<T, 256>;
    bucket(p, grid, stream);
  };
  if (dtype == ScalarType::Half)
    launch(__half{});
  else
    launch(__nv_bfloat16{});
  return true;
}

}  // namespace pagedkv::prefill
