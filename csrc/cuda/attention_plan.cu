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
  release_next();
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
  plan.group = p.num_heads / p.num_kv_heads;
  plan.by_group = Divisor(plan.group);
  const int64_t most_rows = std::min<int64_t>(p.max_query_len, p.num_tokens) * plan.group;
  plan.rows = int(std::min<int64_t>(kRowTile, most_rows));
  plan.sequence_items = int((most_rows + kRowTile - 1) / kRowTile * p.num_kv_heads);
  const int64_t items = int64_t(p.num_seqs) * plan.sequence_items;
  const auto blocks = [&] { return ((int64_t(p.max_key_len) - 1) >> plan.key_shift) + 1; };  // of an item
  plan.key_shift = 4;
  while (plan.key_shift < 30 && double(items) * double(blocks()) >= double(1 << 28)) ++plan.key_shift;

  plan.window_blocks = 1 << 30;
  if (p.window > 0) {
    // tokens that the rows of one tile can belong to, and the keys that they see, from the start of one's block on
    const int64_t span = plan.group % kRowTile == 0   ? 1
                         : kRowTile % plan.group == 0 ? kRowTile / plan.group
                                                      : (kRowTile - 2 + plan.group) / plan.group + 1;
    const int64_t width = span - 1 + (p.causal ? int64_t(p.window) : 2 * int64_t(p.window) - 1) + kBlockKeys - 1;
    plan.window_blocks = int(((width - 1) >> plan.key_shift) + 1);
  }
  // Whole pages of the table, where they are few
  const int64_t lines = p.block_tables && p.table_stride == p.max_blocks ? int64_t(p.num_seqs) * p.max_blocks / 32 : 0;
  plan.table_lines = lines <= 4096 ? int(lines) : 0;

  plan.invariant = num_splits == kInvariant;
  plan.fill = !p.filled;
  plan.splits = int(std::min<int64_t>(num_splits, std::max<int64_t>(1, blocks())));  // more would be empty
  plan.max_parts = plan.splits;
  if (plan.invariant) {
    int log_blocks = 0;
    while (int64_t(1) << log_blocks < blocks()) ++log_blocks;
    plan.splits = 2;  // only that it is above 1 counts
    plan.max_parts = 1 << std::max(0, log_blocks - std::max(0, invariant_shift(log_blocks, plan.key_shift)));
    plan.sequence_items = p.num_kv_heads;  // the others have one partition
  }
  plan.sms = current_device().sms;
  plan.ctas = int(std::clamp<int64_t>(items * blocks(), 1, ctas));
  const int64_t split_items = int64_t(p.num_seqs) * plan.sequence_items;
  const int64_t slots = plan.splits > 1 ? split_items * plan.max_parts : 2 * int64_t(plan.ctas);
  plan.counters = int(plan.splits == 0 ? plan.ctas : plan.splits == 1 ? 0 : split_items);
  const int64_t counter_floats = (plan.counters + 63) / 64 * 64;
  Tensor workspace = torch::stable::new_empty(like, {counter_floats + slots * plan.rows * dim}, ScalarType::Float);
  plan.partials = workspace.mutable_data_ptr<float>() + counter_floats;
  plan.arrived = static_cast<int*>(workspace.mutable_data_ptr());
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
