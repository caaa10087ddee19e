// Sampling without a sort (contract, distribution and random stream: torch_pagedkv/ops/sampling.py; csrc/philox.h).
//
// A row is split into pieces, as many as fill the GPU (one row of 128k logits: 32), a block each:
//     race           argmax of z - log(E) over the kept entries, as a 64-bit key (+inf flag, score, lowest index)
//     pick           the best of the pieces, when there is more than one
// and where top_k, top_p or min_p is given at all, before these:
//     maxima         the largest logit of each of 256 parts of the row or more
//     collect        where k of the parts' maxima reach a value L, so do k entries: those that do, a little more than k
//                    of them, go into a list. (top-p alone: those above the 256th maximum; and the mass of all.)
//     select         a block a row ranks the list, filters it and runs the race on it. Where there was no list, or it
//     is
//                    too long (kList), or has too little mass, the block finds the thresholds digit by digit (11, 11
//                    and 10 bits of a uint32 key in the order of z, for top-k, then for top-p) in histograms of its
//                    own, and leaves the race to the two kernels above, which rows that are done skip.
// Weight is 1 for top-k; for top-p the mass exp(z - max) as a fixed-point integer. Sums are of integers, so no result
// depends on the order of atomics, on the grid or on the batch. The fixed point has 62 - log2(V) fractional bits (45
// for 128k), an error below that of the float32 exponential.
//
// Rows differ in their options: a row at temperature 0, or with an option off, skips what it does not need. If +inf
// occurs, only such entries count and all tie, so no filter can drop one: the filters skip the row too.
//
// What the race costs is Philox: 18 wide products and as many logical operations for four words. Neither logarithms nor
// the quotient by the temperature are taken for most entries: E >= w, so an entry can win only if w <= exp(z - best)
// for the best score so far in its block, and the least of eight entries' words is compared with one bound for their
// largest z. A first look at each thread's first item sets that best. About 30 entries of a row get past the bound.
//
// Measured, H200, vocabulary 128256, bf16, graph replay (us; before: a quotient, a bound and a logarithm an entry, and
// six kernels over the row for top-k and top-p). The code that takes an entry past the bound has changed since, for
// one that read and drew it again: that cost a single row 2 us.
//     rows                     1           32           256
//     temperature           7.7 -> 10.2  30.9 -> 25.9  165 -> 65
//     top-k 50, top-p 0.9  42.8 -> 17.5   134 -> 24.0  472 -> 62
//     min-p                 9.6 -> 10.4  22.6 -> 19.4  105 -> 51
//     argmax                4.6 -> 2.8    9.8 -> 6.3  35.5 -> 20.6
// The race alone is far from its floor (24 % of the bandwidth at 256 rows), and argmax, which reads as it does, is not.
//
// Floor: one read of the logits / 4.28 TB/s for race, maxima and collect each (256 x 128256 bf16: 66 MB, 15.4 us; where
// the rows fit into L2, the second read is faster).
#include "../philox.h"
#include "reduce.cuh"

namespace pagedkv {
namespace {

using Weight = unsigned long long;

constexpr int kBlock = 512, kWarps = kBlock / 32;
constexpr int kItem = 8;         // logits of one thread's load: two Philox blocks
constexpr int kBlocksPerSM = 2;  // resident at once
constexpr int kMaxPieces = 64;
constexpr int kAhead = 2;    // items of a thread on their way while it works on one
constexpr int kParts = 256;  // whose maxima are ranked
constexpr int kList = 1024;  // entries
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kDigits = 3;

// What select found for a row.
struct Verdict {
  uint32_t key;  // keys at or above are kept by top-k and top-p
  bool done;     // the token is known
};

struct SampleParams {
  const void* logits;    // [B, V], unit stride in V
  int64_t stride_bytes;  // of a row
  int vocab, items, pieces, items_per_piece;
  int whole;                 // items that one aligned load can take
  const int64_t* seeds;      // [B], null: argmax of every row
  const int64_t* offsets;    // [B]
  const float* temperature;  // [B] or null, as the rest
  const int* top_k;
  const float* top_p;
  const float* min_p;
  float mass_unit;  // fixed-point units of a mass of 1

  float* maxima;       // [B, maxima_count]: logits
  int maxima_count;    // of a row: pieces * kBlock / maxima_lanes
  int maxima_lanes;    // threads that share one
  int* listed;         // [B]: entries, of which kList at most are stored
  Weight* list;        // [B, kList]: (key, index)
  Weight* mass;        // [B]: of all entries; rows that top_p alone filters
  Verdict* verdicts;   // [B], null: no filters
  Weight* piece_best;  // [B, pieces]
  int64_t* out;        // [B]
};

// reading a row ------------------------------------------------------------------------------------------------------

struct Row {
  int64_t row;
  const void* logits;
  int piece, begin, end;       // this block's items
  float temperature, inverse;  // 1: no division
  bool greedy;
};
__device__ __forceinline__ Row this_row(const SampleParams& p, int64_t row, int piece, int items) {
  Row r;
  r.row = row;
  r.logits = static_cast<const char*>(p.logits) + row * p.stride_bytes;
  r.piece = piece;
  r.begin = piece * items;
  r.end = min(r.begin + items, p.items);
  r.temperature = p.temperature ? p.temperature[row] : 1.f;
  r.greedy = p.seeds == nullptr || fabsf(r.temperature) < 1e-30f;  // a quotient could overflow: its limit
  if (r.greedy) r.temperature = 1.f;
  r.inverse = 1.f / r.temperature;
  return r;
}
__device__ __forceinline__ Row this_piece(const SampleParams& p) {
  return this_row(p, blockIdx.x / p.pieces, blockIdx.x % p.pieces, p.items_per_piece);
}

// The logits of an item, as words: as an array of 16-bit elements, they would take a register each.
template <class T>
struct alignas(16) Item {
  uint32_t word[kItem * sizeof(T) / 4];
};
template <class T>
constexpr uint32_t kNothing = sizeof(T) == 4              ? 0xff800000u
                              : std::is_same_v<T, __half> ? 0xfc00u
                                                          : 0xff80u;  // -inf

template <class T>
__device__ __forceinline__ float entry(const Item<T>& v, int i) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(v.word[i]);
  const uint32_t word = v.word[i / 2];
  if constexpr (std::is_same_v<T, __half>) return to_float(__ushort_as_half(uint16_t(i % 2 ? word >> 16 : word)));
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}

// One item of the row; -inf beyond its end and beyond the piece's.
template <class T>
__device__ __forceinline__ Item<T> load_item(const SampleParams& p, const Row& r, int item) {
  if (item < min(r.end, p.whole)) return static_cast<const Item<T>*>(r.logits)[item];
  Item<T> v;
#pragma unroll
  for (uint32_t& word : v.word) word = sizeof(T) == 4 ? kNothing<T> : kNothing<T> * 0x10001u;
  if (item >= r.end) return v;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const Bits* const x = static_cast<const Bits*>(r.logits) + int64_t(item) * kItem;
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    const uint32_t bits = i < p.vocab - item * kItem ? x[i] : kNothing<T>;
    if constexpr (sizeof(T) == 4)
      v.word[i] = bits;
    else
      v.word[i / 2] = i % 2 ? (v.word[i / 2] & 0xffffu) | bits << 16 : bits;
  }
  return v;
}

// f(item, its logits) for this thread's items, with kAhead loads that run ahead.
template <class T, class F>
__device__ __forceinline__ void for_each_item(const SampleParams& p, const Row& r, F f) {
  const int first = r.begin + int(threadIdx.x);
  Item<T> ahead[kAhead];
#pragma unroll
  for (int a = 0; a < kAhead; ++a) ahead[a] = load_item<T>(p, r, first + a * kBlock);
  for (int item = first; item < r.end;) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a, item += kBlock) {
      const Item<T> now = ahead[a];
      ahead[a] = load_item<T>(p, r, item + kAhead * kBlock);
      if (item < r.end) f(item, now);
    }
  }
}

// The largest of an item's logits; NaN does not count.
__device__ __forceinline__ __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
template <class T>
__device__ __forceinline__ float item_max(const Item<T>& v) {
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair x[kItem / 2];
    memcpy(x, v.word, sizeof x);
    const Pair best = larger(larger(x[0], x[1]), larger(x[2], x[3]));
    return fmaxf(fmaxf(-INFINITY, to_float(best.x)), to_float(best.y));
  } else {
    float best = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItem; ++i) best = fmaxf(best, entry(v, i));
    return best;
  }
}

// z: NaN is -inf
__device__ __forceinline__ float exact_z(const Row& r, float x) {
  if (r.temperature != 1.f) x = __fdiv_rn(x, r.temperature);
  return isnan(x) ? -INFINITY : x;
}
// How far z and a product with the inverse temperature, or two roundings of a score, may be apart.
__device__ __forceinline__ float slack(float z) { return 1e-3f + 1e-6f * fabsf(z); }

// uint32 in the order of the floats; -0 counts as +0, so that equal floats have equal keys
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t u = __float_as_uint(__fadd_rn(x, 0.f));
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float key_float(uint32_t key) {
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// The largest z of the row.
__device__ __forceinline__ float max_of_row(const SampleParams& p, const Row& r, Scratch<float>& scratch) {
  float best = -INFINITY;
  for (int i = threadIdx.x; i < p.maxima_count; i += kBlock) best = fmaxf(best, p.maxima[r.row * p.maxima_count + i]);
  return exact_z(r, row_reduce(best, scratch, -INFINITY, Max{}));
}

// the race -----------------------------------------------------------------------------------------------------------

// (+inf flag, score, lowest index) in the order in which candidates win; 0: none. Any score above -inf gives more than
// 0.
__device__ __forceinline__ Weight candidate(bool infinite, float score, int index) {
  return Weight(infinite) << 63 | Weight(order_key(score)) << 31 | Weight(0x7fffffff - index);
}
__device__ __forceinline__ int64_t token_of(Weight best) {
  return best == 0 ? -1 : 0x7fffffff - int64_t(best & 0x7fffffff);
}
// z - log(E), E = -log1p(-w)
__device__ __forceinline__ float score_of(float z, uint32_t word) {
  const float race = -logf(-log1pf(-philox_uniform(word)));
  return isinf(z) ? race : z + race;
}

struct Keep {
  uint32_t key;         // top-k, top-p: at or above it
  float top, min_mass;  // min-p: exp(z - top) at or above it; 0: off
};
__device__ __forceinline__ bool is_kept(const Keep& k, float z) {
  return z > -INFINITY && order_key(z) >= k.key && !(k.min_mass > 0.f && expf(z - k.top) < k.min_mass);
}
__device__ __forceinline__ Keep keep_of(const SampleParams& p, const Row& r, float top, uint32_t key) {
  const bool min_p = p.min_p && p.min_p[r.row] > 0.f && !isinf(top);
  return {key, top, min_p ? fminf(p.min_p[r.row], 1.f) : 0.f};
}

struct Words {
  uint32_t x[kItem];
};
__device__ __forceinline__ Words item_words(const PhiloxStream& stream, int item) {
  const PhiloxWords a = philox4(stream, uint32_t(item) * 2), b = philox4(stream, uint32_t(item) * 2 + 1);
  return {{a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1], b.x[2], b.x[3]}};
}

// The word of one entry.
__device__ __forceinline__ uint32_t entry_word(const PhiloxStream& stream, int index) {
  const PhiloxWords words = philox4(stream, uint32_t(index) / 4);
  const int i = index % 4;
  return i == 0 ? words.x[0] : i == 1 ? words.x[1] : i == 2 ? words.x[2] : words.x[3];
}

// The best candidate among this thread's items. `shared_best`: the key of the best score of a finite entry in the
// block.
template <class T>
__device__ __forceinline__ Weight run_race(const SampleParams& p, const Row& r, const Keep& keep,
                                           uint32_t& shared_best) {
  const PhiloxStream stream = philox_stream(p.seeds[r.row], p.offsets[r.row]);
  float lowest = keep.key == 0 ? -INFINITY : key_float(keep.key);  // of what is kept
  if (keep.min_mass > 0.f) lowest = fmaxf(lowest, keep.top + logf(keep.min_mass));
  const float surely = lowest > -INFINITY ? lowest + slack(lowest) : -INFINITY, hardly = lowest - slack(lowest);

  Weight best = 0;
  const auto consider = [&](int item, const Item<T>& v, const Words& words) {
    const float z = item_max<T>(v) * r.inverse;
    if (z < hardly || z == -INFINITY) return;
    const float d = z - key_float(*const_cast<volatile uint32_t*>(&shared_best)) + slack(z);
    // The largest word with w <= exp(d); any where d is not below 0, or not a number.
    const uint32_t limit = d < 0.f ? __float2uint_rz(exp2f(fmaf(d, 1.44269504f, 32.f))) : 0xffffffffu;
    uint32_t least = words.x[0];
#pragma unroll
    for (int i = 1; i < kItem; ++i) least = min(least, words.x[i]);
    if (least > limit) return;
    int mask = 0;
#pragma unroll
    for (int i = 0; i < kItem; ++i) mask |= int(words.x[i] <= limit) << i;
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {  // few: one copy of the code, its operands picked from registers
      const int e = __ffs(mask) - 1;
      float x = entry(v, 0);
      uint32_t word = words.x[0];
#pragma unroll
      for (int i = 1; i < kItem; ++i) x = e == i ? entry(v, i) : x, word = e == i ? words.x[i] : word;
      x = exact_z(r, x);
      if (!is_kept(keep, x)) continue;
      const float score = score_of(x, word);
      if (!isinf(x)) atomicMax(&shared_best, order_key(score));
      best = max(best, candidate(isinf(x), score, item * kItem + e));
    }
  };

  // A first look at an item: its scores from below, where entries are surely kept. E <= 1.39 w for w <= 1/2, and
  // log 1.39 < 0.35.
  const int first = r.begin + int(threadIdx.x);
  const Item<T> v = load_item<T>(p, r, first);
  const Words words = item_words(stream, first);
  float bound = -INFINITY;
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    const float z = entry(v, i) * r.inverse, w = philox_uniform(words.x[i]);
    if (z >= surely && fabsf(z) < 1e38f && w < 0.5f) bound = fmaxf(bound, z - __logf(w) - 0.35f - slack(z));
  }
  bound = group_reduce(bound, 32, Max{});
  if (threadIdx.x == 0) shared_best = order_key(-INFINITY);
  __syncthreads();
  if (threadIdx.x % 32 == 0) atomicMax(&shared_best, order_key(bound));
  __syncthreads();
  if (first < r.end) consider(first, v, words);
  Row rest = r;
  rest.begin += kBlock;
  for_each_item<T>(p, rest, [&](int item, const Item<T>& x) { consider(item, x, item_words(stream, item)); });
  return best;
}

template <class T>
__device__ __forceinline__ Weight run_argmax(const SampleParams& p, const Row& r) {
  Weight best = 0;
  float top = -INFINITY;
  for_each_item<T>(p, r, [&](int item, const Item<T>& v) {
    const float z = item_max<T>(v);
    if (!(z > top)) return;  // a thread's indices rise, so the first of equals stays
    top = z;
    int first = kItem;
#pragma unroll
    for (int i = kItem - 1; i >= 0; --i)
      if (entry(v, i) == z) first = i;
    best = candidate(isinf(z), z, item * kItem + first);
  });
  return best;
}

template <class T, bool sampled>
__global__ void __launch_bounds__(kBlock, kBlocksPerSM) race_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Scratch<Weight> scratch;
  __shared__ Scratch<float> max_scratch;
  __shared__ uint32_t shared_best;
  begin_kernel();
  const Row r = this_piece(p);
  Verdict verdict{};
  if (p.verdicts) verdict = p.verdicts[r.row];
  if (verdict.done) return;
  Weight best;
  if (!sampled || r.greedy) {
    best = run_argmax<T>(p, r);
  } else {
    const float top = p.maxima ? max_of_row(p, r, max_scratch) : 0.f;
    best = run_race<T>(p, r, keep_of(p, r, top, verdict.key), shared_best);
  }
  best = row_reduce(best, scratch, Weight(0), Max{});
  if (threadIdx.x != 0) return;
  if (p.pieces == 1)
    p.out[r.row] = token_of(best);
  else
    p.piece_best[r.row * p.pieces + r.piece] = best;
}

__global__ void __launch_bounds__(kBlock) pick_kernel(const __grid_constant__ SampleParams p, int64_t rows) {
  begin_kernel();
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;  // one warp a row
  if (row >= rows || (p.verdicts && p.verdicts[row].done)) return;
  Weight best = 0;
  for (int i = threadIdx.x % 32; i < p.pieces; i += 32) best = max(best, p.piece_best[row * p.pieces + i]);
  best = group_reduce(best, 32, Max{});
  if (threadIdx.x % 32 == 0) p.out[row] = token_of(best);
}

// the filters --------------------------------------------------------------------------------------------------------

// Which filters do anything to a row whose largest z is `top`.
struct Active {
  bool top_k, top_p;
};
__device__ __forceinline__ Active active(const SampleParams& p, const Row& r, float top) {
  if (r.greedy || isinf(top)) return {false, false};
  return {p.top_k && p.top_k[r.row] > 0 && p.top_k[r.row] < p.vocab, p.top_p && p.top_p[r.row] < 1.f};
}
__device__ __forceinline__ Weight mass_of(const SampleParams& p, float z, float top) {
  return __float2ull_rn(expf(z - top) * p.mass_unit);
}
// The weight that top-p's kept set must reach, of `total`.
__device__ __forceinline__ Weight needed_mass(const SampleParams& p, const Row& r, Weight total) {
  const double mass = fmax(0.0, double(p.top_p[r.row])) * double(total);
  return max(Weight(1), min(total, Weight(ceil(mass))));
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksPerSM) maxima_kernel(const __grid_constant__ SampleParams p) {
  begin_kernel();
  const Row r = this_piece(p);
  if (r.piece == 0 && threadIdx.x == 0 && p.verdicts) {
    p.listed[r.row] = 0;
    p.mass[r.row] = 0;
  }
  float best = -INFINITY;
  for_each_item<T>(p, r, [&](int, const Item<T>& v) { best = fmaxf(best, item_max<T>(v)); });
  best = group_reduce(best, p.maxima_lanes, Max{});
  if (threadIdx.x % p.maxima_lanes == 0)
    p.maxima[r.row * p.maxima_count + (r.piece * kBlock + threadIdx.x) / p.maxima_lanes] = best;
}

// How many of the parts' maxima must reach what collect looks for; 0: no list.
__device__ __forceinline__ int wanted_parts(const SampleParams& p, const Row& r, const Active& on) {
  const int parts = min(p.maxima_count, kParts);
  if (on.top_k) return p.top_k[r.row] <= parts ? p.top_k[r.row] : 0;
  return on.top_p ? parts : 0;
}

template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksPerSM) collect_kernel(const __grid_constant__ SampleParams p) {
  __shared__ float parts[kParts];
  __shared__ Scratch<float> scratch[2];
  __shared__ Scratch<Weight> mass_scratch;
  begin_kernel();
  const Row r = this_piece(p);
  const float top = max_of_row(p, r, scratch[0]);
  const Active on = active(p, r, top);
  const int wanted = wanted_parts(p, r, on);
  if (wanted == 0) return;

  // The wanted-th largest of the maxima: the smallest that fewer than `wanted` exceed.
  const int tid = threadIdx.x;
  if (tid < kParts) {
    float largest = -INFINITY;
    for (int i = tid; i < p.maxima_count; i += kParts) largest = fmaxf(largest, p.maxima[r.row * p.maxima_count + i]);
    parts[tid] = largest;
  }
  __syncthreads();
  float level = INFINITY;
  if (tid < kParts) {
    int above = 0;
#pragma unroll 8
    for (int i = 0; i < kParts; ++i) above += parts[i] > parts[tid];
    if (above < wanted) level = parts[tid];
  }
  level = -row_reduce(-level, scratch[1], -INFINITY, Max{});
  level = exact_z(r, level);
  const float hardly = level - slack(level);

  const bool sum_all = !on.top_k;
  Weight mass = 0;
  for_each_item<T>(p, r, [&](int item, const Item<T>& v) {
    if (sum_all) {
#pragma unroll
      for (int i = 0; i < kItem; ++i) mass += mass_of(p, exact_z(r, entry(v, i)), top);
    }
    if (item_max<T>(v) * r.inverse < hardly) return;
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      const float z = exact_z(r, entry(v, i));
      if (!(z >= level) || item * kItem + i >= p.vocab) continue;
      const int at = atomicAdd(p.listed + r.row, 1);
      if (at < kList) p.list[r.row * kList + at] = Weight(order_key(z)) << 32 | uint32_t(item * kItem + i);
    }
  });
  if (!sum_all) return;
  mass = row_reduce(mass, mass_scratch, Weight(0), Sum{});
  if (tid == 0) atomicAdd(p.mass + r.row, mass);
}

// A digit's histogram: a bin's 64-bit weight is two words, since shared memory adds 32-bit integers natively, and the
// carry is known from the value that the add returns.
struct Histogram {
  uint32_t low[kBins], high[kBins];
};
__device__ __forceinline__ void add_weight(Histogram& h, uint32_t bin, Weight weight) {
  const uint32_t low = uint32_t(weight);
  uint32_t high = uint32_t(weight >> 32);
  if (low) {
    const uint32_t old = atomicAdd(&h.low[bin], low);
    high += old + low < old;
  }
  if (high) atomicAdd(&h.high[bin], high);
}

// What is known of a threshold: the weight still to find at or above it inside the digits found, and those digits, at
// their place in the key.
struct Step {
  Weight need;
  uint32_t prefix;
};
__device__ __forceinline__ int digit_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// Finds the largest bin with `need` weight at or above it, which for the first digit of a threshold follows from the
// row's option and, for top-p, the total. Every thread returns the same.
__device__ __forceinline__ Step pick_digit(const SampleParams& p, const Row& r, bool top_p, int digit, Step before,
                                           const Histogram& histogram) {
  constexpr int kOwn = kBins / kBlock;
  __shared__ Weight warp_total[kWarps];
  __shared__ Step found;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;

  // thread t owns bins [t * kOwn, (t + 1) * kOwn); `above` is the weight of all higher threads
  Weight own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    sum += own[i] = Weight(histogram.high[tid * kOwn + i]) << 32 | histogram.low[tid * kOwn + i];
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
  if (digit == 0) need = top_p ? needed_mass(p, r, total) : Weight(p.top_k[r.row]);
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

// The key of the smallest entry that a filter keeps, among those at or above `floor`.
template <class T>
__device__ __forceinline__ uint32_t find_threshold(const SampleParams& p, const Row& r, bool top_p, float top,
                                                   uint32_t floor, Histogram& histogram) {
  Step step{};
  for (int digit = 0; digit < kDigits; ++digit) {
    for (int i = threadIdx.x; i < kBins; i += kBlock) histogram.low[i] = histogram.high[i] = 0;
    __syncthreads();
    const int found_shift = digit == 0 ? 32 : digit_shift(digit - 1);  // the digits above are found
    const uint64_t prefix = uint64_t(step.prefix) >> found_shift;
    for_each_item<T>(p, r, [&](int item, const Item<T>& v) {
      const int count = min(kItem, p.vocab - item * kItem);
#pragma unroll
      for (int i = 0; i < kItem; ++i) {
        const float z = exact_z(r, entry(v, i));
        const uint32_t key = order_key(z);
        if (i >= count || key < floor || uint64_t(key) >> found_shift != prefix) continue;
        const uint32_t bin = (key >> digit_shift(digit)) & (digit == 2 ? 0x3ffu : 0x7ffu);
        add_weight(histogram, bin, top_p ? mass_of(p, z, top) : Weight(1));
      }
    });
    __syncthreads();
    step = pick_digit(p, r, top_p, digit, step, histogram);
  }
  return step.prefix;
}

template <class T>
__global__ void __launch_bounds__(kBlock) select_kernel(const __grid_constant__ SampleParams p) {
  constexpr int kOwn = kList / kBlock;
  __shared__ Histogram histogram;
  __shared__ Weight list[kList], masses[kList];
  __shared__ Scratch<float> scratch;
  __shared__ Scratch<Weight> weights[3];
  begin_kernel();
  const Row r = this_row(p, blockIdx.x, 0, p.items);
  const float top = max_of_row(p, r, scratch);
  const Active on = active(p, r, top);
  const int listed = p.listed[r.row];
  Verdict verdict{};
  bool ranked = wanted_parts(p, r, on) > 0 && listed <= kList;
  if (ranked) {
    for (int i = threadIdx.x; i < listed; i += kBlock) list[i] = p.list[r.row * kList + i];
    __syncthreads();
    Weight mass = 0;
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int i = o * kBlock + threadIdx.x;
      if (i >= listed) break;
      const uint32_t key = uint32_t(list[i] >> 32);
      int above = 0;
#pragma unroll 4
      for (int j = 0; on.top_k && j < listed; ++j) above += uint32_t(list[j] >> 32) > key;
      const bool kept = !on.top_k || above < p.top_k[r.row];
      mass += masses[i] = kept ? mass_of(p, key_float(key), top) : 0;
    }
    mass = row_reduce(mass, weights[0], Weight(0), Sum{});  // its barrier makes `masses` visible
    const Weight total = on.top_k ? mass : p.mass[r.row];
    const Weight need = on.top_p ? needed_mass(p, r, total) : total;
    ranked = mass >= need;
    if (ranked) {
      const Keep keep = keep_of(p, r, top, 0);
      const PhiloxStream stream = philox_stream(p.seeds[r.row], p.offsets[r.row]);
      Weight best = 0;
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        const int i = o * kBlock + threadIdx.x;
        if (i >= listed) break;
        const uint32_t key = uint32_t(list[i] >> 32), index = uint32_t(list[i]);
        int above = 0;
        Weight mass_above = 0;
#pragma unroll 4
        for (int j = 0; j < listed; ++j) {
          const bool higher = uint32_t(list[j] >> 32) > key;
          above += higher;
          mass_above += higher ? masses[j] : 0;
        }
        const float z = key_float(key);
        if ((on.top_k && above >= p.top_k[r.row]) || (on.top_p && mass_above >= need) || !is_kept(keep, z)) continue;
        best = max(best, candidate(false, score_of(z, entry_word(stream, int(index))), int(index)));
      }
      best = row_reduce(best, weights[1], Weight(0), Max{});
      if (threadIdx.x == 0) p.out[r.row] = token_of(best);
      verdict.done = true;
    }
  }
  if (!ranked && (on.top_k || on.top_p)) {
    if (on.top_k) verdict.key = find_threshold<T>(p, r, false, top, 0, histogram);
    if (on.top_p) verdict.key = max(verdict.key, find_threshold<T>(p, r, true, top, verdict.key, histogram));
  }
  if (threadIdx.x == 0) p.verdicts[r.row] = verdict;
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
  if (p.maxima) launch_kernel(maxima_kernel<T>, grid, kBlock, 0, stream, p);
  if (p.verdicts) {
    launch_kernel(collect_kernel<T>, grid, kBlock, 0, stream, p);
    launch_kernel(select_kernel<T>, unsigned(rows), kBlock, 0, stream, p);
  }
  launch_kernel(p.seeds ? race_kernel<T, true> : race_kernel<T, false>, grid, kBlock, 0, stream, p);
  if (p.pieces > 1) launch_kernel(pick_kernel, ceil_div(rows, kWarps), kBlock, 0, stream, p, rows);
}

Tensor run(const char* op, const Tensor& logits, SampleParams p) {
  const int64_t rows = logits.size(0);
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  if (rows == 0) return out;
  p.logits = logits.const_data_ptr();
  p.stride_bytes = logits.stride(0) * int64_t(logits.element_size());
  p.vocab = int(logits.size(1));
  p.items = int(ceil_div(p.vocab, kItem));
  p.whole = is_aligned(logits, {0}) ? p.vocab / kItem : 0;
  p.out = out.mutable_data_ptr<int64_t>();

  int sms = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, logits.get_device_index()));
  const int64_t wanted = std::clamp<int64_t>(int64_t(sms) * kBlocksPerSM / rows, 1,
                                             std::min<int64_t>(kMaxPieces, ceil_div(p.items, kBlock)));
  p.items_per_piece = int(ceil_div(p.items, wanted));
  p.pieces = int(ceil_div(p.items, p.items_per_piece));
  p.maxima_lanes = 32;
  while (p.maxima_lanes > 1 && p.pieces * (kBlock / p.maxima_lanes) < kParts) p.maxima_lanes /= 2;
  p.maxima_count = p.pieces * (kBlock / p.maxima_lanes);

  int bits = 0;
  while ((int64_t(1) << bits) < p.vocab) ++bits;
  p.mass_unit = float(int64_t(1) << (62 - bits));
  const bool filters = p.top_k || p.top_p;

  auto place = [&](char* base) {
    Arena arena{base};
    if (p.pieces > 1) p.piece_best = arena.take<Weight>(rows * p.pieces);
    if (filters || p.min_p) p.maxima = arena.take<float>(rows * p.maxima_count);
    if (!filters) return arena.used;
    p.listed = arena.take<int>(rows);
    p.list = arena.take<Weight>(rows * kList);
    p.mass = arena.take<Weight>(rows);
    p.verdicts = arena.take<Verdict>(rows);
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
