// Sampling without a sort (contract, distribution and random stream: torch_pagedkv/ops/sampling.py; csrc/philox.h).
//
// A row is split over as many blocks as fill the GPU (one row of 128k logits over 63), and goes through these kernels;
// those in brackets only where top_k, top_p or min_p is given at all:
//     [row_max]      the largest z of each piece
//     [descend x 3]  for top-k, then again for top-p: one digit (11, 11 and 10 bits) of the threshold. z becomes a
//     uint32
//                    key in the same order; each block adds its entries that match the digits found so far to a
//                    histogram in shared memory, then to the row's. The next kernel starts by picking the digit: the
//                    largest one with enough weight at or above it. Weight is 1 for top-k; for top-p the mass exp(z -
//                    max) as a fixed-point integer.
//     race           argmax of z - log(E) over the kept entries, as a 64-bit key (+inf flag, score, lowest index)
//     pick           the best of the pieces, when there is more than one
// Sums are of integers, so no result depends on the order of atomics, on the grid or on the batch. The fixed point has
// 62 - log2(V) fractional bits (45 for 128k), an error below that of the float32 exponential.
//
// Rows differ in their options: a row at temperature 0, or with an option off, skips what it does not need. If +inf
// occurs, only such entries count and all tie, so no filter can drop one: the filters skip the row too.
//
// Floor: one read of the logits / 4.28 TB/s for each kernel above that is needed (128 x 128256 bf16: 33 MB, 7.7 us;
// from the second kernel on mostly from L2).
#include "../philox.h"
#include "reduce.cuh"

namespace pagedkv {
namespace {

constexpr int kBlock = 256;
constexpr int kItem = 8;                // logits of one thread's load: two Philox blocks
constexpr int kItemsPerPiece = kBlock;  // at least 2048 logits a block
constexpr int kBlocksPerSM = 8;         // resident at once: where splitting rows further stops helping
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kDigits = 3;
constexpr int kHistograms = 3;  // one being read, one filled, one cleared for the next kernel
constexpr int kMaxSteps = 2 * kDigits + 1;

// What is known of a threshold before a digit is picked.
struct Step {
  unsigned long long need;  // weight still to find at or above the threshold, inside the digits found
  uint32_t prefix;          // those digits, at their place in the key
};

struct SampleParams {
  const void* logits;  // [B, V], unit stride in V
  int64_t stride;      // of a row
  int vocab, items, pieces, items_per_piece;
  bool aligned;
  const int64_t* seeds;      // [B], null: argmax of every row
  const int64_t* offsets;    // [B]
  const float* temperature;  // [B] or null, as the rest
  const int* top_k;
  const float* top_p;
  const float* min_p;
  float mass_unit;       // fixed-point units of a mass of 1
  int k_steps, p_steps;  // kernels of each filter: kDigits or 0

  float* piece_max;                // [B, pieces]
  unsigned long long* piece_best;  // [B, pieces]
  unsigned long long* histograms;  // [B, kHistograms, kBins]
  Step* steps;                     // [B, kMaxSteps]
  int64_t* out;                    // [B]
};

// reading a row ------------------------------------------------------------------------------------------------------

struct Row {
  int64_t row;
  int piece, begin, end;  // this block's items
  float temperature;      // 1: no division
  bool greedy;
};
__device__ __forceinline__ Row this_row(const SampleParams& p) {
  Row r;
  r.row = blockIdx.x / p.pieces;
  r.piece = blockIdx.x % p.pieces;
  r.begin = r.piece * p.items_per_piece;
  r.end = min(r.begin + p.items_per_piece, p.items);
  r.temperature = p.temperature ? p.temperature[r.row] : 1.f;
  r.greedy = p.seeds == nullptr || fabsf(r.temperature) < 1e-30f;  // a quotient could overflow: its limit
  if (r.greedy) r.temperature = 1.f;
  return r;
}

// z of one item: NaN and what lies beyond the row are -inf
template <class T>
__device__ __forceinline__ void load_item(const SampleParams& p, const Row& r, int item, float* z) {
  const T* x = static_cast<const T*>(p.logits) + r.row * p.stride + int64_t(item) * kItem;
  const int left = p.vocab - item * kItem;
  Vec<T, kItem> v;
  if (p.aligned && left >= kItem) {
    v = load_vec<T, kItem>(x);
  } else {
#pragma unroll
    for (int i = 0; i < kItem; ++i) v.v[i] = i < left ? x[i] : from_float<T>(-INFINITY);
  }
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    float f = to_float(v.v[i]);
    if (r.temperature != 1.f) f = __fdiv_rn(f, r.temperature);
    z[i] = isnan(f) ? -INFINITY : f;
  }
}

// uint32 in the order of the floats; -0 counts as +0, so that equal floats have equal keys
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t u = __float_as_uint(__fadd_rn(x, 0.f));
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float max_of_row(const SampleParams& p, const Row& r, Scratch<float>& scratch) {
  float best = -INFINITY;
  for (int i = threadIdx.x; i < p.pieces; i += kBlock) best = fmaxf(best, p.piece_max[r.row * p.pieces + i]);
  return row_reduce(best, scratch, -INFINITY, Max{});
}

// the filters --------------------------------------------------------------------------------------------------------

enum class Filter { kTopK, kTopP };

// Whether the filter does anything to a row whose largest z is `top`.
__device__ __forceinline__ bool active(const SampleParams& p, const Row& r, Filter f, float top) {
  if (r.greedy || isinf(top)) return false;
  if (f == Filter::kTopK) return p.k_steps > 0 && p.top_k[r.row] > 0 && p.top_k[r.row] < p.vocab;
  return p.p_steps > 0 && p.top_p[r.row] < 1.f;
}
__device__ __forceinline__ int digit_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// Finds the largest bin with `need` weight at or above it. For the first digit of a threshold the weight needed follows
// from the row's option and, for top-p, the total. Every thread returns the same.
__device__ __forceinline__ Step pick_digit(const SampleParams& p, const Row& r, Filter f, int digit, Step before,
                                           const unsigned long long* histogram) {
  using Weight = unsigned long long;
  constexpr int kOwn = kBins / kBlock, kWarps = kBlock / 32;
  __shared__ Weight warp_total[kWarps];
  __shared__ Step found;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;

  // thread t owns bins [t * kOwn, (t + 1) * kOwn); `above` is the weight of all higher threads
  Weight own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i] = histogram[tid * kOwn + i];
  Weight suffix = sum;  // inclusive over the warp's higher lanes
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const Weight other = __shfl_down_sync(kFullWarp, suffix, o);
    if (lane + o < 32) suffix += other;
  }
  if (lane == 0) warp_total[warp] = suffix;
  __syncthreads();
  Weight above = suffix - sum, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total += warp_total[w];
    if (w > warp) above += warp_total[w];
  }

  Weight need = before.need;
  if (digit == 0) {
    if (f == Filter::kTopK) {
      need = Weight(p.top_k[r.row]);
    } else {
      const double mass = fmax(0.0, double(p.top_p[r.row])) * double(total);
      need = max(Weight(1), min(total, Weight(ceil(mass))));
    }
  }
  // Exactly one bin has less than `need` above it and at least `need` with itself, as 1 <= need <= total.
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    if (above < need && above + own[i] >= need)
      found = {need - above, before.prefix | uint32_t(tid * kOwn + i) << digit_shift(digit)};
    above += own[i];
  }
  __syncthreads();
  return found;
}

// What a kernel that comes after `step` descents knows: it picks the digit that the last of them counted.
struct Thresholds {
  Step now;              // of the filter that `step` belongs to
  uint32_t top_k, kept;  // keys at or above are kept by top-k; by both filters, once both are done
};
__device__ __forceinline__ Thresholds resolve(const SampleParams& p, const Row& r, int step, float top) {
  Thresholds t{};
  if (step == 0) return t;
  const int last = step - 1, digit = last % kDigits;
  const Filter f = last < p.k_steps ? Filter::kTopK : Filter::kTopP;
  Step* steps = p.steps + r.row * kMaxSteps;
  if (active(p, r, f, top)) {
    const Step before = digit == 0 ? Step{} : steps[last];
    const int64_t slot = r.row * kHistograms + last % kHistograms;
    t.now = pick_digit(p, r, f, digit, before, p.histograms + slot * kBins);
    if (r.piece == 0 && threadIdx.x == 0) steps[step] = t.now;
  }
  if (p.k_steps > 0 && active(p, r, Filter::kTopK, top)) {
    if (step == p.k_steps)
      t.top_k = t.now.prefix;
    else if (step > p.k_steps)
      t.top_k = steps[p.k_steps].prefix;
  }
  t.kept = max(t.top_k, t.now.prefix);
  return t;
}

template <class T>
__global__ void __launch_bounds__(kBlock) row_max_kernel(const SampleParams p) {
  __shared__ Scratch<float> scratch;
  const Row r = this_row(p);
  if (r.piece == 0 && p.histograms) {
    unsigned long long* h = p.histograms + r.row * kHistograms * kBins;
    for (int i = threadIdx.x; i < kBins; i += kBlock) h[i] = 0;
  }
  float best = -INFINITY;
  for (int item = r.begin + threadIdx.x; item < r.end; item += kBlock) {
    float z[kItem];
    load_item<T>(p, r, item, z);
#pragma unroll
    for (int i = 0; i < kItem; ++i) best = fmaxf(best, z[i]);
  }
  best = row_reduce(best, scratch, -INFINITY, Max{});
  if (threadIdx.x == 0) p.piece_max[r.row * p.pieces + r.piece] = best;
}

template <class T>
__global__ void __launch_bounds__(kBlock) descend_kernel(const SampleParams p, int step) {
  // A bin's 64-bit weight as two words: shared memory adds 32-bit integers natively, and the carry is known from the
  // value that the add returns.
  __shared__ uint32_t low[kBins], high[kBins];
  __shared__ Scratch<float> scratch;
  const Row r = this_row(p);
  const Filter f = step < p.k_steps ? Filter::kTopK : Filter::kTopP;
  const int digit = step % kDigits, shift = digit_shift(digit);
  unsigned long long* histograms = p.histograms + r.row * kHistograms * kBins;
  if (r.piece == 0) {
    unsigned long long* next = histograms + (step + 1) % kHistograms * kBins;
    for (int i = threadIdx.x; i < kBins; i += kBlock) next[i] = 0;
  }
  for (int i = threadIdx.x; i < kBins; i += kBlock) low[i] = high[i] = 0;
  const float top = max_of_row(p, r, scratch);
  const Thresholds t = resolve(p, r, step, top);
  if (!active(p, r, f, top)) return;
  __syncthreads();  // low and high are zero

  const int found_shift = digit == 0 ? 32 : digit_shift(digit - 1);  // the digits above are found
  const uint64_t prefix = digit == 0 ? 0 : uint64_t(t.now.prefix) >> found_shift;
  const uint32_t floor = f == Filter::kTopP ? t.top_k : 0;
  for (int item = r.begin + threadIdx.x; item < r.end; item += kBlock) {
    float z[kItem];
    load_item<T>(p, r, item, z);
    const int count = min(kItem, p.vocab - item * kItem);
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      const uint32_t key = order_key(z[i]);
      if (i >= count || key < floor || (uint64_t(key) >> found_shift) != prefix) continue;
      const uint32_t bin = (key >> shift) & (kBins - 1) & (digit == 2 ? 0x3ffu : 0x7ffu);
      if (f == Filter::kTopK) {
        atomicAdd(&low[bin], 1u);
      } else {
        const unsigned long long mass = __float2ull_rn(expf(z[i] - top) * p.mass_unit);
        const uint32_t low_part = uint32_t(mass);
        uint32_t high_part = uint32_t(mass >> 32);
        if (low_part) {
          const uint32_t old = atomicAdd(&low[bin], low_part);
          high_part += old + low_part < old;
        }
        if (high_part) atomicAdd(&high[bin], high_part);
      }
    }
  }
  __syncthreads();
  unsigned long long* mine = histograms + step % kHistograms * kBins;
  for (int i = threadIdx.x; i < kBins; i += kBlock) {
    const unsigned long long weight = (unsigned long long)(high[i]) << 32 | low[i];
    if (weight) atomicAdd(&mine[i], weight);
  }
}

// the race -----------------------------------------------------------------------------------------------------------

// (+inf flag, score, lowest index) in the order in which candidates win; 0: none. Any score above -inf gives more than
// 0.
__device__ __forceinline__ unsigned long long candidate(bool infinite, float score, int index) {
  return (unsigned long long)(infinite) << 63 | (unsigned long long)(order_key(score)) << 31 |
         (unsigned long long)(0x7fffffff - index);
}
__device__ __forceinline__ int64_t token_of(unsigned long long best) {
  return best == 0 ? -1 : 0x7fffffff - int64_t(best & 0x7fffffff);
}

struct Keep {
  uint32_t key;         // top-k, top-p: at or above it
  float top, min_mass;  // min-p: exp(z - top) at or above it; 0: off
};
__device__ __forceinline__ bool is_kept(const Keep& k, float z) {
  return z > -INFINITY && order_key(z) >= k.key && !(k.min_mass > 0.f && expf(z - k.top) < k.min_mass);
}

// Runs the race over one item; best_score is the best of the finite candidates so far.
__device__ __forceinline__ void race_item(const float* z, int item, const PhiloxStream& stream, const Keep& keep,
                                          unsigned long long& best, float& best_score) {
#pragma unroll
  for (int g = 0; g < kItem; g += 4) {
    bool kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = is_kept(keep, z[g + i]);
    if (!(kept[0] || kept[1] || kept[2] || kept[3])) continue;
    const int index = item * kItem + g;
    const PhiloxWords words = philox4(stream, uint32_t(index) / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!kept[i]) continue;
      const float x = z[g + i], w = philox_uniform(words.x[i]);
      const bool infinite = isinf(x);
      // E >= w, so this bounds the score from above (1e-3 covers __logf): the precise one is needed only when it may
      // win, about log(V) times a thread.
      if (!infinite && x + (1e-3f - __logf(w)) < best_score) continue;
      const float race = -logf(-log1pf(-w));
      const float score = infinite ? race : x + race;
      if (!infinite) best_score = fmaxf(best_score, score);
      best = max(best, candidate(infinite, score, index + i));
    }
  }
}

template <class T, bool sampled>
__global__ void __launch_bounds__(kBlock) race_kernel(const SampleParams p) {
  __shared__ Scratch<unsigned long long> scratch;
  __shared__ Scratch<float> max_scratch;
  const Row r = this_row(p);
  Keep keep{};
  PhiloxStream stream{};
  if constexpr (sampled) {
    if (p.piece_max) keep.top = max_of_row(p, r, max_scratch);
    keep.key = resolve(p, r, p.k_steps + p.p_steps, keep.top).kept;
    if (p.min_p && p.min_p[r.row] > 0.f && !isinf(keep.top)) keep.min_mass = fminf(p.min_p[r.row], 1.f);
    stream = philox_stream(p.seeds[r.row], p.offsets[r.row]);
  }

  unsigned long long best = 0;
  float best_score = -INFINITY;  // of the finite candidates
  for (int item = r.begin + threadIdx.x; item < r.end; item += kBlock) {
    float z[kItem];
    load_item<T>(p, r, item, z);
    if (r.greedy) {
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        if (z[i] > best_score) {  // a thread's indices rise, so the first of equals stays
          best_score = z[i];
          best = candidate(isinf(z[i]), z[i], item * kItem + i);
        }
      }
      continue;
    }
    if constexpr (sampled) race_item(z, item, stream, keep, best, best_score);
  }
  best = row_reduce(best, scratch, 0ull, Max{});
  if (threadIdx.x != 0) return;
  if (p.pieces == 1)
    p.out[r.row] = token_of(best);
  else
    p.piece_best[r.row * p.pieces + r.piece] = best;
}

__global__ void __launch_bounds__(kBlock)
    pick_kernel(const unsigned long long* piece_best, int pieces, int64_t rows, int64_t* out) {
  const int64_t row = int64_t(blockIdx.x) * (kBlock / 32) + threadIdx.x / 32;  // one warp a row
  if (row >= rows) return;
  unsigned long long best = 0;
  for (int i = threadIdx.x % 32; i < pieces; i += 32) best = max(best, piece_best[row * pieces + i]);
  best = group_reduce(best, 32, Max{});
  if (threadIdx.x % 32 == 0) out[row] = token_of(best);
}

// host ---------------------------------------------------------------------------------------------------------------

// Hands out the parts of one workspace, which is sized by a first pass without memory.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const part = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
};

template <class T>
void launch(const SampleParams& p, int64_t rows, cudaStream_t stream) {
  const unsigned grid = unsigned(rows * p.pieces);
  if (p.piece_max) {
    row_max_kernel<T><<<grid, kBlock, 0, stream>>>(p);
    for (int step = 0; step < p.k_steps + p.p_steps; ++step) descend_kernel<T><<<grid, kBlock, 0, stream>>>(p, step);
  }
  if (p.seeds)
    race_kernel<T, true><<<grid, kBlock, 0, stream>>>(p);
  else
    race_kernel<T, false><<<grid, kBlock, 0, stream>>>(p);
  if (p.pieces > 1)
    pick_kernel<<<ceil_div(rows, kBlock / 32), kBlock, 0, stream>>>(p.piece_best, p.pieces, rows, p.out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor run(const char* op, const Tensor& logits, SampleParams p) {
  const int64_t rows = logits.size(0);
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  if (rows == 0) return out;
  p.logits = logits.const_data_ptr();
  p.stride = logits.stride(0);
  p.vocab = int(logits.size(1));
  p.items = int(ceil_div(p.vocab, kItem));
  p.aligned = is_aligned(logits, {0});
  p.out = out.mutable_data_ptr<int64_t>();

  int sms = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, logits.get_device_index()));
  const int64_t wanted =
      std::min<int64_t>(ceil_div(int64_t(sms) * kBlocksPerSM, rows), ceil_div(p.items, kItemsPerPiece));
  p.items_per_piece = int(ceil_div(p.items, wanted));
  p.pieces = int(ceil_div(p.items, p.items_per_piece));

  int bits = 0;
  while ((int64_t(1) << bits) < p.vocab) ++bits;
  p.mass_unit = float(int64_t(1) << (62 - bits));
  p.k_steps = p.top_k ? kDigits : 0;
  p.p_steps = p.top_p ? kDigits : 0;
  const int steps = p.k_steps + p.p_steps;

  auto place = [&](char* base) {
    Arena arena{base};
    if (p.pieces > 1) p.piece_best = arena.take<unsigned long long>(rows * p.pieces);
    if (steps > 0 || p.min_p) p.piece_max = arena.take<float>(rows * p.pieces);
    if (steps > 0) p.histograms = arena.take<unsigned long long>(rows * kHistograms * kBins);
    if (steps > 0) p.steps = arena.take<Step>(rows * kMaxSteps);
    return arena.used;
  };
  const int64_t bytes = place(nullptr);
  Tensor workspace = out;
  if (bytes > 0) {
    workspace = torch::stable::new_empty(logits, {bytes}, ScalarType::Byte);
    place(static_cast<char*>(workspace.mutable_data_ptr()));
  }
  const cudaStream_t stream = current_stream(logits);
  dispatch_cuda(logits.scalar_type(), op, [&](auto tag) { launch<decltype(tag)>(p, rows, stream); });
  return out;
}

template <class T>
const T* data_or_null(const OptTensor& t) {
  return t.has_value() ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace

Tensor sample_cuda(Tensor logits, Tensor seeds, Tensor offsets, OptTensor temperature, OptTensor top_k, OptTensor top_p,
                   OptTensor min_p) {
  check_sample(logits, seeds, offsets, temperature, top_k, top_p, min_p);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  SampleParams p{};
  p.seeds = seeds.const_data_ptr<int64_t>();
  p.offsets = offsets.const_data_ptr<int64_t>();
  p.temperature = data_or_null<float>(temperature);
  p.top_k = data_or_null<int>(top_k);
  p.top_p = data_or_null<float>(top_p);
  p.min_p = data_or_null<float>(min_p);
  return run("sample", logits, p);
}

Tensor argmax_cuda(Tensor logits) {
  check_logits("argmax", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  return run("argmax", logits, SampleParams{});
}

}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CUDA, m) {
  PAGEDKV_IMPL(m, sample, pagedkv::sample_cuda);
  PAGEDKV_IMPL(m, argmax, pagedkv::argmax_cuda);
}
