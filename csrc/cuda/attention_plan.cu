// Host side of the split-KV plan (attention_plan.cuh has the scheme), its counters, and the fill of rows that see
// nothing.
#include <array>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "attention_plan.cuh"

namespace pagedkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// counters ------------------------------------------------------------------------------------------------------------
//
// Blocks of integers on a device that are 0 when a kernel starts and when it ends: whoever counts sets them back, so
// that no kernel in front has to (a kernel of its own took 0.8 us of each call). Kernels that may run at the same time
// need blocks of their own. Those of a stream run one after the other, and share one. A kernel in a CUDA graph has its
// own, since the graph may run in any stream: it belongs to the graph and comes back when that is destroyed. Torch's
// allocator would not do: what a graph's pool hands out may hold other things between two replays.

constexpr int kMostTeams = 1024;  // counters of a block

class Counters {
 public:
  int* take(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
    STD_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr, nullptr));
#else
    STD_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, nullptr, nullptr));
#endif
    if (status != cudaStreamCaptureStatusActive) {
      unsigned long long id = 0;  // unlike the handle, never used again
      STD_CUDA_CHECK(cudaStreamGetId(stream, &id));
      const std::lock_guard<std::mutex> lock(mutex_);
      int*& block = of_stream_[id];
      if (!block) block = next();
      return block;
    }
    auto* const loan = new Loan{this, nullptr};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loan->block = next();
    }
    cudaUserObject_t object;
    STD_CUDA_CHECK(cudaUserObjectCreate(&object, loan, give_back, 1, cudaUserObjectNoDestructorSync));
    STD_CUDA_CHECK(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
    return loan->block;
  }

 private:
  struct Loan {
    Counters* owner;
    int* block;
  };
  struct Relaxed {  // while a stream is captured, a thread may not allocate otherwise
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  };

  static void give_back(void* pointer) {
    const auto* const loan = static_cast<Loan*>(pointer);
    {
      const std::lock_guard<std::mutex> lock(loan->owner->mutex_);
      loan->owner->free_.push_back(loan->block);
    }
    delete loan;
  }

  int* next() {
    if (free_.empty()) {
      constexpr int kBlocks = 64;
      constexpr size_t kBytes = size_t(kBlocks) * kMostTeams * sizeof(int);
      const Relaxed relaxed;
      int* memory = nullptr;
      cudaStream_t stream;
      STD_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&memory), kBytes));
      STD_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, kBytes, stream));
      STD_CUDA_CHECK(cudaStreamSynchronize(stream));
      STD_CUDA_CHECK(cudaStreamDestroy(stream));
      for (int i = 0; i < kBlocks; ++i) free_.push_back(memory + i * kMostTeams);
    }
    int* const block = free_.back();
    free_.pop_back();
    return block;
  }

  std::mutex mutex_;
  std::unordered_map<unsigned long long, int*> of_stream_;
  std::vector<int*> free_;
};

__global__ void __launch_bounds__(kThreads) fill_kernel(const __grid_constant__ AttentionParams p, int out_size) {
  fill_rows(p, out_size, int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, int64_t(gridDim.x) * kWarps);
}

int fill_blocks(const AttentionParams& p) {
  const int64_t blocks = (int64_t(p.num_tokens) + kWarps - 1) / kWarps;
  return int(std::min<int64_t>(blocks, 4 * int64_t(current_device().sms)));
}

}  // namespace

int* take_counters(cudaStream_t stream) {
  static auto& of_device = *new std::array<Counters, 64>;  // never destroyed: graphs may outlive static objects
  return of_device[current_device().index].take(stream);
}

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
    STD_CUDA_CHECK(cudaFuncGetAttributes(&compiled, fill_kernel));
    d.overlap = compiled.ptxVersion >= 90;
    devices[index] = d;
  });
  return devices[index];
}

Tensor make_plan(const AttentionParams& p, int dim, int num_splits, const Teams& most, const Tensor& like, Plan& plan) {
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
  plan.ahead = !plan.invariant || p.num_seqs > 1;  // attention_plan.cuh says what it costs others
  plan.solo = num_splits == 0 && plan.sequence_items == p.num_kv_heads;
  plan.splits = int(std::min<int64_t>(num_splits, std::max<int64_t>(1, blocks())));  // more would be empty
  plan.max_parts = plan.splits;
  if (plan.invariant) {
    int log_blocks = 0;
    while (int64_t(1) << log_blocks < blocks()) ++log_blocks;
    plan.splits = 2;  // only that it is above 1 counts
    plan.max_parts = 1 << std::max(0, log_blocks - std::max(0, invariant_shift(log_blocks, plan.key_shift)));
    plan.sequence_items = p.num_kv_heads;  // the others have one partition
  }
  plan.team_shift = 0;
  if (plan.splits == 0 && p.num_seqs == 1) {
    const int shift = blocks() <= kFewBlocks ? 4 : blocks() <= kManyBlocks ? 1 : 0;
    if (items > 0 && items <= most[shift]) plan.team_shift = shift;
  }
  plan.least_teams = plan.team_shift > 0 ? int(items) : current_device().sms;
  plan.full_shift = kFullShift + plan.team_shift;
  plan.teams = int(std::clamp<int64_t>(items * blocks(), 1, std::min(most[plan.team_shift], kMostTeams)));
  const int64_t split_items = int64_t(p.num_seqs) * plan.sequence_items;
  const int64_t slots = plan.splits > 1 ? split_items * plan.max_parts : 2 * int64_t(plan.teams);
  Tensor workspace = torch::stable::new_empty(like, {slots * plan.rows * dim}, ScalarType::Float);
  plan.partials = workspace.mutable_data_ptr<float>();
  plan.arrived = plan.splits == 1 ? nullptr : take_counters(current_stream(like));
  return workspace;
}

void launch_fill(const AttentionParams& p, int out_size, cudaStream_t stream) {
  fill_kernel<<<fill_blocks(p), kThreads, 0, stream>>>(p, out_size);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pagedkv
