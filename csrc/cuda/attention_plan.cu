// The plan kernel of split-KV attention (attention_plan.cuh has the scheme) and the fill of rows that see nothing.
//
// Plan: one CTA scans the sequences' units (a block-wide prefix sum, 512 sequences a pass), then each thread places
// cuts by binary search. The other CTAs fill, a warp a row. Cost: one launch, about a microsecond beside the latency of
// a few dependent loads from L2.
#include <array>
#include <mutex>

#include "attention_plan.cuh"

namespace pagedkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

__device__ bool sees_a_key(const AttentionParams& p, int seq, int64_t row) {
  const SeqWork w = seq_work(p, seq);
  const int64_t token = row - __ldg(p.query_start + seq);
  if (token < 0 || token >= w.tokens) return false;
  const KeyRange r = visible_keys(p, w.len - w.tokens + int(token), w.keys);
  return r.lo < r.hi;
}

// Rows blocks * warps apart, from `first`; every lane takes part.
__device__ void fill_rows(const AttentionParams& p, int out_size, int64_t first, int64_t step) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = first; row < p.num_tokens; row += step) {
    bool seen = false;
    for (int s = 0; s < p.num_seqs && !seen; s += 32)
      seen = __any_sync(0xffffffffu, s + lane < p.num_seqs && sees_a_key(p, s + lane, row));
    if (seen) continue;
    const int64_t bytes = int64_t(p.num_heads) * p.head_dim * out_size;  // a multiple of 16: head_dim is one of 8
    uint4* out = reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.out) + row * bytes);
    for (int64_t i = lane; i < bytes / 16; i += 32) out[i] = make_uint4(0, 0, 0, 0);
    for (int h = lane; p.lse && h < p.num_heads; h += 32) p.lse[row * p.num_heads + h] = kNegInf;
  }
}

// Index of the last entry <= value in a non-decreasing array that begins with one.
template <class F>
__device__ int last_not_above(int n, int64_t value, F&& entry) {
  int lo = 0, hi = n;  // entry(lo) <= value, entry(hi) > value or past the end
  while (hi - lo > 1) {
    const int mid = lo + (hi - lo) / 2;
    (entry(mid) <= value ? lo : hi) = mid;
  }
  return lo;
}

struct Scan {
  int64_t units, items;
};

// Inclusive prefix sum over the block, and its total; `shared` has kWarps entries.
__device__ Scan block_scan(Scan x, Scan* shared, Scan& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const int64_t units = __shfl_up_sync(0xffffffffu, x.units, d), items = __shfl_up_sync(0xffffffffu, x.items, d);
    if (lane >= d) x.units += units, x.items += items;
  }
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  Scan before{0, 0};
  total = {0, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before.units += shared[w].units, before.items += shared[w].items;
    total.units += shared[w].units, total.items += shared[w].items;
  }
  __syncthreads();  // the next call writes `shared`
  return {x.units + before.units, x.items + before.items};
}

__device__ void make_cuts(const AttentionParams& p, const Plan& plan) {
  __shared__ Scan shared[kWarps];
  Scan done{0, 0};
  if (threadIdx.x == 0) plan.seq_units[0] = plan.seq_items[0] = 0;
  for (int s0 = 0; s0 < p.num_seqs; s0 += kThreads) {
    const int s = s0 + int(threadIdx.x);
    Scan x{0, 0}, total;
    if (s < p.num_seqs) {
      const SeqWork w = seq_work(p, s);
      x.items = w.tiles > 0 ? int64_t(w.row_tiles) * p.num_kv_heads : 0;
      x.units = x.items * w.tiles;
    }
    x = block_scan(x, shared, total);
    if (s < p.num_seqs) {
      plan.seq_units[s + 1] = done.units + x.units;
      plan.seq_items[s + 1] = done.items + x.items;
    }
    done.units += total.units, done.items += total.items;
  }
  __syncthreads();
  const int64_t all = done.units, used = max(int64_t(1), min(int64_t(plan.ctas), all));
  auto place = [&](int64_t unit, Cut& cut, int& tiles) {  // unit < all
    cut.seq = last_not_above(p.num_seqs, unit, [&](int s) { return plan.seq_units[s]; });
    tiles = seq_work(p, cut.seq).tiles;
    const int64_t inside = unit - plan.seq_units[cut.seq];
    cut.item = int(inside / tiles);
    cut.tile = int(inside - int64_t(cut.item) * tiles);
  };
  for (int c = threadIdx.x; c <= plan.ctas; c += kThreads) {
    Cut cut{c < used ? all * c / used : all, p.num_seqs, 0, 0, 0, 0, 0};
    int tiles = 0;
    if (cut.unit < all) {
      place(cut.unit, cut, tiles);
      int moved = cut.tile;
      if (plan.splits > 0) {
        const int n = partitions(plan.splits, tiles);
        moved = partition_begin(partition_of(cut.tile, tiles, n), tiles, n);
      } else if (tiles <= kWholeTiles) {
        moved = 2 * cut.tile < tiles ? 0 : tiles;
      }
      cut.unit += moved - cut.tile;
      cut.tile = moved;
      if (moved == tiles) {  // the next item, perhaps of another sequence
        cut.seq = p.num_seqs, cut.item = cut.tile = 0;
        if (cut.unit < all) place(cut.unit, cut, tiles);
      }
    }
    plan.cuts[c] = cut;
  }
  __syncthreads();
  for (int c = threadIdx.x; plan.splits == 0 && c <= plan.ctas; c += kThreads) {
    Cut& cut = plan.cuts[c];
    if (cut.unit >= all || cut.tile == 0) continue;
    const int64_t begin = cut.unit - cut.tile, end = begin + seq_work(p, cut.seq).tiles;
    auto unit = [&](int i) { return plan.cuts[i].unit; };
    cut.first = last_not_above(plan.ctas + 1, begin, unit);
    cut.last = last_not_above(plan.ctas + 1, end - 1, unit);
  }
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Plan plan, int out_size) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < plan.counters; i += int64_t(gridDim.x) * kThreads)
    plan.arrived[i] = 0;
  if (blockIdx.x == 0) {
    make_cuts(p, plan);
  } else {
    fill_rows(p, out_size, int64_t(blockIdx.x - 1) * kWarps + threadIdx.x / 32, int64_t(gridDim.x - 1) * kWarps);
  }
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
    Device d{index, 0, 0};
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&d.smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
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
  plan.ctas = int(std::clamp<int64_t>(items * max_tiles, 1, ctas));
  const int64_t slots = plan.splits == 0 ? 2 * int64_t(plan.ctas) : plan.splits == 1 ? 0 : items * plan.splits;
  plan.counters = int(plan.splits == 0 ? plan.ctas : plan.splits == 1 ? 0 : items);

  int64_t bytes = 0;
  auto take = [&](int64_t n) { return std::exchange(bytes, bytes + (n + 255) / 256 * 256); };
  const int64_t cuts = take(sizeof(Cut) * (plan.ctas + 1));
  const int64_t seq_units = take(sizeof(int64_t) * (p.num_seqs + 1)),
                seq_items = take(sizeof(int64_t) * (p.num_seqs + 1));
  const int64_t arrived = take(sizeof(int) * plan.counters);
  const int64_t tops = take(sizeof(float) * slots * kRowTile), sums = take(sizeof(float) * slots * kRowTile);
  const int64_t outs = take(sizeof(float) * slots * kRowTile * dim);
  Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  uint8_t* base = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  plan.cuts = reinterpret_cast<Cut*>(base + cuts);
  plan.seq_units = reinterpret_cast<int64_t*>(base + seq_units);
  plan.seq_items = reinterpret_cast<int64_t*>(base + seq_items);
  plan.arrived = reinterpret_cast<int*>(base + arrived);
  plan.partial_max = reinterpret_cast<float*>(base + tops);
  plan.partial_sum = reinterpret_cast<float*>(base + sums);
  plan.partial_out = reinterpret_cast<float*>(base + outs);
  return workspace;
}

void launch_plan(const AttentionParams& p, const Plan& plan, int out_size, cudaStream_t stream) {
  plan_kernel<<<1 + fill_blocks(p), kThreads, 0, stream>>>(p, plan, out_size);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_fill(const AttentionParams& p, int out_size, cudaStream_t stream) {
  fill_kernel<<<fill_blocks(p), kThreads, 0, stream>>>(p, out_size);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace pagedkv
