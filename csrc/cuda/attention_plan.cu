// Host side of the split-KV plan (attention_plan.cuh has the scheme), the kernel that zeroes its counters, and the fill
// of rows that see nothing.
#include <array>
#include <mutex>

#include "attention_plan.cuh"

namespace pagedkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// The attention kernel may start at once: it waits for this one before it counts.
__global__ void __launch_bounds__(kThreads) zero_kernel(int* counters, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i < count) counters[i] = 0;
}

__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ AttentionParams p, int out_size) {
  if (p.next_item && blockIdx.x == 0 && threadIdx.x == 0) *p.next_item = 0;
  fill_rows(p, out_size, int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, int64_t(gridDim.x) * kWarps);
}

int fill_blocks(const AttentionParams& p) {
  const int64_t blocks = (int64_t(p.num_tokens) + kWarps - 1) / kWarps;
  return int(std::min<int64_t>(blocks, 4 * int64_t(current_device().sms)));
}

}  // namespace

const Device& current_device() {
  static std::array<Device, 64> devices;
  static std::array<std::once_flag, 64> once;
  int index = 0;
  STD_CUDA_CHECK(cudaGetDevice(&index));
  if (index >= int(devices.size())) fail("torch_pagedkv: got device cuda:", index, ", needs an index below 64");
  std::call_once(once[index], [&] {
    Device d{index, 0, 0, false};
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&d.smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    cudaFuncAttributes compiled;  // for an architecture that may be older than the device
    STD_CUDA_CHECK(cudaFuncGetAttributes(&compiled, zero_kernel));
    d.overlap = compiled.ptxVersion >= 90;
    devices[index] = d;
  });
  return devices[index];
}

Tensor make_plan(const AttentionParams& p, int dim, int num_splits, int ctas, const Tensor& like, Plan& plan) {
  const int64_t group = p.num_heads / p.num_kv_heads, max_tiles = (int64_t(p.max_key_len) + kKeyTile - 1) / kKeyTile;
  // Two bounds on the row tiles of a KV head: sequences own disjoint rows, and none has more than max_query_len tokens.
  const int64_t each = (std::min<int64_t>(p.max_query_len, p.num_tokens) * group + kRowTile - 1) / kRowTile;
  const int64_t row_tiles = std::min(p.num_tokens * group / kRowTile + p.num_seqs, p.num_seqs * each);
  const int64_t items = row_tiles * p.num_kv_heads;
  plan.splits = int(std::min<int64_t>(num_splits, std::max<int64_t>(1, max_tiles)));  // more would be empty
  plan.max_items = items;
  plan.sms = current_device().sms;
  plan.ctas = int(std::clamp<int64_t>(items * max_tiles, 1, ctas));
  const int64_t slots = plan.splits == 0 ? 2 * int64_t(plan.ctas) : plan.splits == 1 ? 0 : items * plan.splits;
  plan.counters = int(plan.splits == 0 ? plan.ctas : plan.splits == 1 ? 0 : items);

  int64_t bytes = 0;
  auto take = [&](int64_t n) { return std::exchange(bytes, bytes + (n + 255) / 256 * 256); };
  const int64_t arrived = take(sizeof(int) * plan.counters);
  const int64_t tops = take(sizeof(float) * slots * kRowTile), sums = take(sizeof(float) * slots * kRowTile);
  const int64_t outs = take(sizeof(float) * slots * kRowTile * dim);
  Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  uint8_t* base = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  plan.arrived = reinterpret_cast<int*>(base + arrived);
  plan.partial_max = reinterpret_cast<float*>(base + tops);
  plan.partial_sum = reinterpret_cast<float*>(base + sums);
  plan.partial_out = reinterpret_cast<float*>(base + outs);
  return workspace;
}

void launch_zero(const Plan& plan, cudaStream_t stream) {
  zero_kernel<<<(plan.counters + kThreads - 1) / kThreads, kThreads, 0, stream>>>(plan.arrived, plan.counters);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_fill(const AttentionParams& p, int out_size, cudaStream_t stream) {
  fill_kernel<<<fill_blocks(p), kThreads, 0, stream>>>(p, out_size);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pagedkv
