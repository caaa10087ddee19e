// Sampling without a sort (contract, distribution and random stream: torch_pagedkv/ops/sampling.py; csrc/philox.h).
//
// The logits are read once:
//     scan     of every group of 256 entries the largest logit and, for rows that need it, the mass, the sum of
//              exp((x - largest) / temperature). Eight lanes a group, four loads of 16 bytes each in flight.
//     choose   a block a row, which works on the groups' summaries and reads no more than a few groups again:
//       argmax        the best of the summaries, which hold the largest entry's index in that case
//       no filter     the heats: one random number a group, then one for each entry of the group that won
//       filters       where k groups reach a level, so do k entries: those that do, a few more than k of them, go from
//                     such groups into a list, which is ranked, filtered and raced. (top-p alone: the best 256 groups;
//                     min-p alone: the level is known.) Where the list is too long (kList), or has too little mass,
//                     the block finds the thresholds digit by digit (11, 11 and 10 bits of a uint32 key in the order
//                     of z, for top-k, then for top-p) in histograms over the row, and runs the race over all of it.
// Both in one kernel, a block a row, where rows fill the device; two kernels otherwise.
//
// A mass is summed in a fixed order inside its group. Beyond groups, top-p adds masses as fixed-point integers of
// 62 - log2(V) fractional bits (45 for 128k), an error below that of the float32 exponential. So no result depends on
// the order of atomics, on the grid or on the batch.
//
// Rows differ in their options: a row at temperature 0, or with an option off, skips what it does not need. If +inf
// occurs, only such entries count and all tie, so no filter can drop one: they alone are listed.
//
// Floor: one read of the logits / 4.28 TB/s (256 x 128256 bf16: 66 MB, 15.4 us). In it, 33M exponentials take 9 us of
// the special function units; about five instructions an entry 6 us.
//
// Measured, H200, vocabulary 128256, bf16, graph replay (us). Before: a race of all entries, whose Philox takes nine
// instructions an entry, and a second and third read for the filters.
//     rows                    1            32            256
//     temperature          9.2 -> 5.4   22.6 -> 8.6    59.8 -> 20.2
//     top-k 50, top-p 0.9 17.5 -> 8.4   24.1 -> 13.1   62.3 -> 24.6
//     min-p               10.3 -> 5.7   19.0 -> 9.3    49.7 -> 21.2
//     argmax               2.8 -> 2.9    6.2 -> 5.6    23.1 -> 17.5
// Tried at 256 rows: the next tile's loads ahead of a tile's work, 22.4 for 20.2 (registers are short then); three
// blocks an SM, 26.4 (spills); two kernels instead of one, 25.
//
// What filters cost is latency: each step waits for the one before. So the entries listed are counted by products
// first, one atomic a thread; their quotients are taken by a thread each; and their ranks by eight threads each, which
// puts them in order, so that a sum from the top down gives all masses at once. (Listed, divided and ranked by the few
// threads that had found them: 14.1, 18.3 and 29.7 us for 8.4, 13.1 and 24.6.) The logits that reach the level are read
// again one by one, from the first-level cache: kept in registers over the atomic, they made the whole kernel spill
// (28.7 us, and argmax 18.8 for 17.5). A row whose list is too long (top-k 1000, or top-p over flat logits) takes 165
// us, 256 of them 270 to 290.
#include <cfloat>

#include "../philox.h"
#include "reduce.cuh"

namespace pagedkv {
namespace {

using Weight = unsigned long long;

constexpr int kBlock = 512, kWarps = kBlock / 32;
constexpr int kScanBlock = 128;
constexpr int kScanBlocks = 8;                // on an SM at once
constexpr int kBlocksPerSM = 2;               // of kBlock threads, resident at once
constexpr int kItem = 8;                      // logits of one thread's load: two Philox blocks
constexpr int kGroup = 256;                   // entries: the contract's
constexpr int kGroupItems = kGroup / kItem;   // 32
constexpr int kLanes = 8;                     // that share a group
constexpr int kLoads = kGroupItems / kLanes;  // of a lane, in flight at once
constexpr int kTileGroups = 32 / kLanes;      // of a warp at once
constexpr int kTileItems = kTileGroups * kGroupItems;
constexpr int kShared = 2048;  // groups whose summaries fit into a block
constexpr int kParts = 256;    // whose maxima top-p takes the list's level from
constexpr int kList = 1024;    // entries
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kDigits = 3;

struct alignas(8) Summary {
  float top;   // the group's largest logit, NaN aside
  float mass;  // of exp((x - top) / temperature); +inf alone counts where there is one. Greedy: the bits of top's index
};

struct SampleParams {
  const void* logits;    // [B, V], unit stride in V
  int64_t stride_bytes;  // of a row
  int vocab, items, groups, tiles;
  int pieces, piece_tiles;   // of a row, where its scan has blocks of its own
  int whole;                 // items that one aligned load can take
  const int64_t* seeds;      // [B], null: argmax of every row
  const int64_t* offsets;    // [B]
  const float* temperature;  // [B] or null, as the rest
  const int* top_k;
  const float* top_p;
  const float* min_p;
  float mass_unit;     // fixed-point units of a mass of 1
  Summary* summaries;  // [B, groups]; null: in shared memory
  int64_t* out;        // [B]
};

// reading a row ------------------------------------------------------------------------------------------------------

struct Row {
  int64_t row;
  const void* logits;
  float temperature, inverse;  // 1: no division
  bool greedy;
  bool top_k, top_p, min_p;  // what is on
  __device__ __forceinline__ bool filtered() const { return top_k || top_p || min_p; }
  // Whether the groups' masses are asked for.
  __device__ __forceinline__ bool weighed() const { return !greedy && (!filtered() || (top_p && !top_k)); }
};
__device__ __forceinline__ Row this_row(const SampleParams& p, int64_t row) {
  Row r;
  r.row = row;
  r.logits = static_cast<const char*>(p.logits) + row * p.stride_bytes;
  r.temperature = p.temperature ? p.temperature[row] : 1.f;
  const int k = p.top_k ? p.top_k[row] : 0;  // all loads before the first use
  const float top_p = p.top_p ? p.top_p[row] : 1.f, min_p = p.min_p ? p.min_p[row] : 0.f;
  r.greedy = p.seeds == nullptr || fabsf(r.temperature) < 1e-30f;  // a quotient could overflow: its limit
  if (r.greedy) r.temperature = 1.f;
  r.inverse = 1.f / r.temperature;
  r.top_k = k > 0 && k < p.vocab;
  r.top_p = top_p < 1.f;
  r.min_p = min_p > 0.f;
  return r;
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

// One item of the row; -inf beyond its end.
template <class T>
__device__ __forceinline__ Item<T> load_item(const SampleParams& p, const Row& r, int item) {
  if (item < p.whole) return static_cast<const Item<T>*>(r.logits)[item];
  Item<T> v;
#pragma unroll
  for (uint32_t& word : v.word) word = sizeof(T) == 4 ? kNothing<T> : kNothing<T> * 0x10001u;
  if (item >= p.items) return v;
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

template <class T>
__device__ __forceinline__ float load_entry(const Row& r, int i) {
  return to_float(static_cast<const T*>(r.logits)[i]);
}

// The larger of each two entries, of an item's entries; NaN does not count.
__device__ __forceinline__ __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
template <class T>
using Word =
    std::conditional_t<sizeof(T) == 4, float, std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>>;
template <class T>
__device__ __forceinline__ Item<T> larger(const Item<T>& a, const Item<T>& b) {
  constexpr int n = sizeof(Item<T>) / 4;
  Word<T> x[n], y[n];
  memcpy(x, a.word, sizeof x);
  memcpy(y, b.word, sizeof y);
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = larger(x[i], y[i]);
  Item<T> most;
  memcpy(most.word, x, sizeof x);
  return most;
}
template <class T>
__device__ __forceinline__ float item_max(const Item<T>& v) {
  if constexpr (sizeof(T) == 2) {
    Word<T> x[kItem / 2];
    memcpy(x, v.word, sizeof x);
    const Word<T> best = larger(larger(x[0], x[1]), larger(x[2], x[3]));
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
// z - z_top of a logit and one that is not smaller, also where both are infinite; NaN is -inf.
__device__ __forceinline__ float below(const Row& r, float x, float top) {
  return x == top ? 0.f : x < top ? (x - top) * r.inverse : -INFINITY;
}
// How far z and a product with the inverse temperature, or two roundings of a score, may be apart.
__device__ __forceinline__ float slack(float z) { return 1e-3f + 1e-6f * fabsf(z); }
// No such product is below it where the quotient is z or more.
__device__ __forceinline__ float bound_of(float z) {
  z = fminf(z, 3e38f);
  return z - slack(z);
}

// uint32 in the order of the floats; -0 counts as +0, so that equal floats have equal keys
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t u = __float_as_uint(__fadd_rn(x, 0.f));
  return u ^ (u >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float key_float(uint32_t key) {
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// the scan -----------------------------------------------------------------------------------------------------------

// exp2 with flush of denormals; exp2(-inf) = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A tile's logits, by one warp: kLanes lanes a group.
template <class T>
struct Tile {
  Item<T> v[kLoads];
};
template <class T>
__device__ __forceinline__ Tile<T> load_tile(const SampleParams& p, const Row& r, int tile) {
  const int lane = threadIdx.x % 32;
  const int first = tile * kTileItems + lane / kLanes * kGroupItems + lane % kLanes;
  Tile<T> t;
  if ((tile + 1) * kTileItems <= p.whole) {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) t.v[j] = static_cast<const Item<T>*>(r.logits)[first + j * kLanes];
  } else {
#pragma unroll
    for (int j = 0; j < kLoads; ++j) t.v[j] = load_item<T>(p, r, first + j * kLanes);
  }
  return t;
}

// Its groups' summaries.
template <class T>
__device__ __forceinline__ void summarize(const SampleParams& p, const Row& r, int tile, const Tile<T>& t,
                                          Summary* summaries) {
  constexpr float kLog2e = 1.44269504f;
  const int lane = threadIdx.x % 32, group = tile * kTileGroups + lane / kLanes;
  const float top = group_reduce(item_max(larger(larger(t.v[0], t.v[1]), larger(t.v[2], t.v[3]))), kLanes, Max{});
  float mass = 0.f;
  if (r.weighed()) {
    const float scale = r.inverse * kLog2e, bias = -top * scale;
    float part[4]{};
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int i = 0; i < kItem; ++i) part[i % 4] += exp2_fast(fmaf(entry(t.v[j], i), scale, bias));
    mass = (part[0] + part[1]) + (part[2] + part[3]);
    if (!(mass < 2.f * kGroup)) {  // NaN and infinities
      mass = 0.f;
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
#pragma unroll
        for (int i = 0; i < kItem; ++i)
          if (top > -INFINITY) mass += exp2_fast(below(r, entry(t.v[j], i), top) * kLog2e);
    }
    mass = group_reduce(mass, kLanes, Sum{});
  } else if (r.greedy) {
    int index = kGroup;
#pragma unroll
    for (int j = kLoads - 1; j >= 0; --j)
#pragma unroll
      for (int i = kItem - 1; i >= 0; --i)
        if (entry(t.v[j], i) == top) index = j * kLanes * kItem + i;
    index = -group_reduce(-index - lane % kLanes * kItem, kLanes, Max{});
    mass = __uint_as_float(uint32_t(group * kGroup + index));
  }
  if (lane % kLanes == 0 && group < p.groups) summaries[group] = {top, mass};
}

// Tiles [first, end), the block's warps in turn.
template <class T>
__device__ __forceinline__ void scan(const SampleParams& p, const Row& r, int first, int end, Summary* summaries) {
  const int step = blockDim.x / 32;
  for (int tile = first + threadIdx.x / 32; tile < end; tile += step)
    summarize<T>(p, r, tile, load_tile<T>(p, r, tile), summaries);
}

// the race -----------------------------------------------------------------------------------------------------------

// (score, lowest index) in the order in which candidates win; 0: none. Scores are above -inf.
__device__ __forceinline__ Weight candidate(float score, int index) {
  return Weight(order_key(score)) << 31 | Weight(0x7fffffff - index);
}
__device__ __forceinline__ int token_of(Weight best) { return best == 0 ? -1 : 0x7fffffff - int(best & 0x7fffffff); }
// z - log(E), E = -log1p(-w)
__device__ __forceinline__ float score_of(float z, uint32_t word) { return z - logf(-log1pf(-philox_uniform(word))); }

__device__ __forceinline__ uint32_t pick_word(const PhiloxWords& words, int i) {
  return i == 0 ? words.x[0] : i == 1 ? words.x[1] : i == 2 ? words.x[2] : words.x[3];
}
__device__ __forceinline__ uint32_t entry_word(const PhiloxStream& stream, int index) {
  return pick_word(philox4(stream, uint32_t(index) / 4), index % 4);
}
__device__ __forceinline__ uint32_t group_word(const PhiloxStream& stream, int group) {
  return pick_word(philox4(stream, uint32_t(group) / 4, 1), group % 4);
}

// A digit's histogram: a bin's 64-bit weight is two words, since shared memory adds 32-bit integers natively, and the
// carry is known from the value that the add returns.
struct Histogram {
  uint32_t low[kBins], high[kBins];
};

// The largest over the block, in all of its threads: two reductions of a warp in hardware instead of ten shuffles.
__device__ __forceinline__ uint32_t block_max(uint32_t x, uint32_t (&scratch)[kWarps]) {
  x = __reduce_max_sync(kFullWarp, x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return __reduce_max_sync(kFullWarp, scratch[threadIdx.x % kWarps]);
}
__device__ __forceinline__ Weight warp_max(Weight x) {
  const uint32_t high = __reduce_max_sync(kFullWarp, uint32_t(x >> 32));
  return Weight(high) << 32 | __reduce_max_sync(kFullWarp, uint32_t(x >> 32) == high ? uint32_t(x) : 0u);
}
__device__ __forceinline__ Weight block_max(Weight x, Weight (&scratch)[kWarps]) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(scratch[threadIdx.x % kWarps]);
}

// What the threads of a row's block share.
struct Shared {
  uint32_t keys[2][kWarps];
  Weight best[2][kWarps];
  Weight masses_of_warps[kList / kBlock][kWarps];
  Scratch<Weight> groups_mass;
  int marked, listed;  // groups, entries
  uint32_t score;      // the race's best
  union {
    struct {
      int groups[kList];                  // that reach the level
      Weight list[kList], sorted[kList];  // (key, index); key 0: below the level after all
    };
    Histogram histogram;
  };
};

struct Keep {
  uint32_t key;         // top-k, top-p: at or above it
  float top, min_mass;  // min-p: exp(z - top) at or above it; 0: off
};
__device__ __forceinline__ bool is_kept(const Keep& k, float z) {
  return z > -INFINITY && order_key(z) >= k.key && !(k.min_mass > 0.f && expf(z - k.top) < k.min_mass);
}

// f(item, its logits) for this thread's items of the whole row, with kAhead loads that run ahead.
template <class T, class F>
__device__ __forceinline__ void for_each_item(const SampleParams& p, const Row& r, F f) {
  constexpr int kAhead = 2;
  Item<T> ahead[kAhead];
#pragma unroll
  for (int a = 0; a < kAhead; ++a) ahead[a] = load_item<T>(p, r, int(threadIdx.x) + a * kBlock);
  for (int item = threadIdx.x; item < p.items;) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a, item += kBlock) {
      const Item<T> now = ahead[a];
      ahead[a] = load_item<T>(p, r, item + kAhead * kBlock);
      if (item < p.items) f(item, now);
    }
  }
}

// The race over all that is kept, however much that is; this thread's best candidate. E >= w, so an entry can win only
// if w <= exp(z - best) for the best score so far in the block: neither logarithms nor the quotient by the temperature
// are taken for most entries.
template <class T>
__device__ __forceinline__ Weight run_race(const SampleParams& p, const Row& r, const Keep& keep, Shared& shared) {
  const PhiloxStream stream = philox_stream(p.seeds[r.row], p.offsets[r.row]);
  const bool infinite = isinf(keep.top);
  float lowest = keep.key == 0 ? -INFINITY : key_float(keep.key);  // of what is kept
  if (keep.min_mass > 0.f) lowest = fmaxf(lowest, keep.top + logf(keep.min_mass));
  const float hardly = bound_of(lowest);
  __syncthreads();
  if (threadIdx.x == 0) shared.score = order_key(-INFINITY);
  __syncthreads();
  Weight best = 0;
  for_each_item<T>(p, r, [&](int item, const Item<T>& v) {
    const float z = item_max<T>(v) * r.inverse;
    if (z < hardly || z == -INFINITY) return;
    const PhiloxWords words[2] = {philox4(stream, uint32_t(item) * 2), philox4(stream, uint32_t(item) * 2 + 1)};
    const float d = z - key_float(*const_cast<volatile uint32_t*>(&shared.score)) + slack(z);
    // The largest word with w <= exp(d); any where d is not below 0, or not a number.
    const uint32_t limit = d < 0.f ? __float2uint_rz(exp2f(fmaf(d, 1.44269504f, 32.f))) : 0xffffffffu;
    int mask = 0;
#pragma unroll
    for (int i = 0; i < kItem; ++i) mask |= int(words[i / 4].x[i % 4] <= limit) << i;
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {  // few: one copy of the code, its operands picked from registers
      const int e = __ffs(mask) - 1;
      float x = entry(v, 0);
#pragma unroll
      for (int i = 1; i < kItem; ++i) x = e == i ? entry(v, i) : x;
      x = exact_z(r, x);
      if (!is_kept(keep, x)) continue;
      const float score = score_of(infinite ? 0.f : x, pick_word(e < 4 ? words[0] : words[1], e % 4));
      if (!infinite) atomicMax(&shared.score, order_key(score));
      best = max(best, candidate(score, item * kItem + e));
    }
  });
  return best;
}

// Without filters: the best group, and the best of its entries.
template <class T>
__device__ __forceinline__ int run_heats(const SampleParams& p, const Row& r, const Summary* summaries, float top,
                                         Shared& shared) {
  const PhiloxStream stream = philox_stream(p.seeds[r.row], p.offsets[r.row]);
  Weight best = 0;
  for (int g = threadIdx.x; g < p.groups; g += kBlock) {
    const float z = below(r, summaries[g].top, top) + logf(summaries[g].mass);
    if (z > -INFINITY) best = max(best, candidate(score_of(z, group_word(stream, g)), g));
  }
  const int group = token_of(block_max(best, shared.best[0])), i = group * kGroup + int(threadIdx.x);
  best = 0;
  if (group >= 0 && threadIdx.x < kGroup && i < p.vocab) {  // none: a temperature that is not a number
    const float z = below(r, load_entry<T>(r, i), summaries[group].top);
    if (z > -INFINITY) best = candidate(score_of(z, entry_word(stream, i)), i);
  }
  return token_of(block_max(best, shared.best[1]));
}

// the filters --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Weight mass_of(const SampleParams& p, float z, float top) {
  return __float2ull_rn(expf(z - top) * p.mass_unit);
}
// The weight that top-p's kept set must reach, of `total`.
__device__ __forceinline__ Weight needed_mass(const SampleParams& p, const Row& r, Weight total) {
  const double mass = fmax(0.0, double(p.top_p[r.row])) * double(total);
  return max(Weight(1), min(total, Weight(ceil(mass))));
}

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

// A z that `wanted` parts of the row reach, so that as many entries do, a few more at most: bisection between the
// smallest and the largest of the parts' maxima. This thread's part has the maximum `best`, and parts there are
// `parts`.
__device__ __forceinline__ float level_of(const Row& r, float best, float top, int parts, int wanted, Shared& shared) {
  const bool has = int(threadIdx.x) < parts;
  const uint32_t key = has ? order_key(best) : 0;
  uint32_t low = ~block_max(has ? ~key : 0, shared.keys[1]);
  uint32_t high = order_key(top) + 1;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int reach = __syncthreads_count(key >= middle);
    (reach >= wanted ? low : high) = middle;
    if (reach >= wanted && reach <= wanted + wanted / 4) break;
  }
  return exact_z(r, key_float(low));
}

// Raises keep.key to what top-k (k > 0) and top-p leave of the list, of which all that they keep is part, if it has the
// mass; false: it has not.
template <class T>
__device__ __forceinline__ bool find_in_list(const SampleParams& p, const Row& r, const Summary* summaries,
                                             float top_logit, float top, int k, bool top_p, Shared& shared,
                                             Keep& keep) {
  constexpr int kOwn = kList / kBlock, kSharers = 8;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, listed = shared.listed;

  // In descending order: each entry's place is counted by eight threads.
  for (int first = 0; first < listed; first += kBlock / kSharers) {
    const int i = first + tid / kSharers;
    const Weight mine = i < listed ? shared.list[i] : 0;
    int above = 0;
#pragma unroll 4
    for (int j = tid % kSharers; j < listed; j += kSharers) above += shared.list[j] > mine;
    above = group_reduce(above, kSharers, Sum{});
    if (i < listed && tid % kSharers == 0) shared.sorted[above] = mine;
  }
  __syncthreads();
  if (k > 0 && k <= listed) keep.key = uint32_t(shared.sorted[k - 1] >> 32);
  if (!top_p) return true;

  // Masses from the top down to each place.
  Weight sum[kOwn], total = 0;
#pragma unroll
  for (int o = 0; o < kOwn; ++o) {
    const int i = o * kBlock + tid;
    const uint32_t key = i < listed ? uint32_t(shared.sorted[i] >> 32) : 0;
    sum[o] = key > 0 && key >= keep.key ? mass_of(p, key_float(key), top) : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const Weight other = __shfl_up_sync(kFullWarp, sum[o], d);
      if (lane >= d) sum[o] += other;
    }
    if (lane == 31) shared.masses_of_warps[o][warp] = sum[o];
  }
  __syncthreads();
#pragma unroll
  for (int o = 0; o < kOwn; ++o)
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Weight other = shared.masses_of_warps[o][w];
      total += other;
#pragma unroll
      for (int mine = o; mine < kOwn; ++mine)
        if (mine > o || w < warp) sum[mine] += other;
    }
  const Weight mass = total;
  if (k == 0) {
    total = 0;  // of all groups
    for (int g = tid; g < p.groups; g += kBlock) {
      const Summary s = summaries[g];
      if (s.mass > 0.f) total += __float2ull_rn(expf(below(r, s.top, top_logit)) * s.mass * p.mass_unit);
    }
    total = row_reduce(total, shared.groups_mass, Weight(0), Sum{});
  }
  const Weight need = needed_mass(p, r, total);
  if (mass < need) return false;
  int place = 0;
#pragma unroll
  for (int o = 0; o < kOwn; ++o) place += __syncthreads_count(sum[o] < need);
  keep.key = uint32_t(shared.sorted[place] >> 32);
  return true;
}

// The token of a row with filters. `best`: the largest logit of this thread's groups; `top`: of all.
template <class T>
__device__ __forceinline__ int run_filters(const SampleParams& p, const Row& r, const Summary* summaries, float best,
                                           float top_logit, Shared& shared) {
  constexpr int kOwn = kList / kBlock;
  const int tid = threadIdx.x;
  const float top = exact_z(r, top_logit);
  const bool infinite = isinf(top), top_k = r.top_k && !infinite, top_p = r.top_p && !infinite;
  const int k = top_k ? p.top_k[r.row] : 0;
  Keep keep{0, top, 0.f};
  if (infinite) keep.key = order_key(top);
  if (r.min_p && !infinite) keep.min_mass = fminf(p.min_p[r.row], 1.f);

  // Entries that reach a level are listed: all that can be kept, where top-p does not ask for the others' mass.
  float level = infinite ? top : -INFINITY;
  bool complete = infinite || (!top_k && !top_p);
  if (top_k || top_p) {
    const int parts = min(p.groups, kBlock);
    level = level_of(r, best, top_logit, parts, min(parts, top_k ? k : kParts), shared);
  }
  if (keep.min_mass > 0.f && !top_p) {
    const float least = top + logf(keep.min_mass);
    complete = complete || least - slack(least) >= level;
    level = fmaxf(level, least - slack(least));
  }
  const float hardly = fmaxf(bound_of(level), -FLT_MAX);  // -inf is never kept
  if (tid == 0) shared.marked = shared.listed = 0;
  __syncthreads();
  for (int g = tid; g < p.groups; g += kBlock) {
    const float x = summaries[g].top;
    if (!(x * r.inverse >= hardly)) continue;
    const int at = atomicAdd(&shared.marked, 1);
    if (at < kList) shared.groups[at] = g;
  }
  __syncthreads();
  const int marked = shared.marked;
  if (marked <= kList) {
    constexpr int kUnroll = 4;
    for (int first = tid / 32; first < marked; first += kUnroll * kWarps) {
      Item<T> v[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = first + u * kWarps;
        v[u] = load_item<T>(p, r, i < marked ? shared.groups[i] * kGroupItems + tid % 32 : p.items);
      }
      uint32_t reach = 0;  // a bit an entry
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int i = 0; i < kItem; ++i) reach |= uint32_t(entry(v[u], i) * r.inverse >= hardly) << (u * kItem + i);
      if (reach == 0) continue;
      int at = atomicAdd(&shared.listed, __popc(reach));
#pragma unroll 1
      for (; reach != 0 && at < kList; reach &= reach - 1, ++at) {  // few; read again: from L1, with no registers
        const int bit = __ffs(reach) - 1, group = shared.groups[first + bit / kItem * kWarps];
        const int i = (group * kGroupItems + tid % 32) * kItem + bit % kItem;
        shared.list[at] = Weight(order_key(load_entry<T>(r, i))) << 32 | uint32_t(i);
      }
    }
  }
  __syncthreads();
  const int listed = shared.listed;
  bool ranked = marked <= kList && listed <= kList;
  if (ranked) {  // from logits to z, each quotient by a thread of its own
    int valid = 0;
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int i = o * kBlock + tid;
      bool reaches = false;
      if (i < listed) {
        const Weight x = shared.list[i];
        const float z = exact_z(r, key_float(uint32_t(x >> 32)));
        reaches = z >= level && z > -INFINITY;
        shared.list[i] = Weight(reaches ? order_key(z) : 0) << 32 | uint32_t(x);
      }
      valid += __syncthreads_count(reaches);
    }
    ranked = valid > 0 && (complete || level == -INFINITY || valid >= k);
  }
  const bool ordered = top_k || top_p;
  if (ranked && ordered) ranked = find_in_list<T>(p, r, summaries, top_logit, top, top_k ? k : 0, top_p, shared, keep);
  Weight winner = 0;
  if (ranked) {
    const PhiloxStream stream = philox_stream(p.seeds[r.row], p.offsets[r.row]);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int i = o * kBlock + tid;
      if (i >= listed) break;
      const uint32_t key = uint32_t(shared.list[i] >> 32), index = uint32_t(shared.list[i]);
      const float z = key_float(key);
      if (key > 0 && is_kept(keep, z))
        winner = max(winner, candidate(score_of(infinite ? 0.f : z, entry_word(stream, int(index))), int(index)));
    }
  }
  if (!ranked) {
    if (top_k) keep.key = find_threshold<T>(p, r, false, top, 0, shared.histogram);
    if (top_p) keep.key = max(keep.key, find_threshold<T>(p, r, true, top, keep.key, shared.histogram));
    winner = run_race<T>(p, r, keep, shared);
  }
  return token_of(block_max(winner, shared.best[0]));
}

// the kernels --------------------------------------------------------------------------------------------------------

// The token of a row whose groups are summarised.
template <class T>
__device__ __forceinline__ void choose(const SampleParams& p, const Row& r, const Summary* summaries, Shared& shared) {
  float best = -INFINITY;
  for (int g = threadIdx.x; g < p.groups; g += kBlock) best = fmaxf(best, summaries[g].top);
  const float top = key_float(block_max(order_key(best), shared.keys[0]));
  int token = -1;
  if (top == -INFINITY) {
  } else if (r.greedy) {
    Weight first = 0;
    for (int g = threadIdx.x; g < p.groups; g += kBlock)
      if (summaries[g].top == top) first = max(first, candidate(0.f, int(__float_as_uint(summaries[g].mass))));
    token = token_of(block_max(first, shared.best[0]));
  } else if (!r.filtered()) {
    token = run_heats<T>(p, r, summaries, top, shared);
  } else {
    token = run_filters<T>(p, r, summaries, best, top, shared);
  }
  if (threadIdx.x == 0) p.out[r.row] = token;
}

// A block a row.
template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksPerSM) row_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Summary own[kShared];
  __shared__ Shared shared;
  begin_kernel();
  const Row r = this_row(p, blockIdx.x);
  Summary* const summaries = p.summaries ? p.summaries + r.row * p.groups : own;
  scan<T>(p, r, 0, p.tiles, summaries);
  __syncthreads();
  choose<T>(p, r, summaries, shared);
}

// Several blocks a row, then one.
template <class T>
__global__ void __launch_bounds__(kScanBlock) scan_kernel(const __grid_constant__ SampleParams p) {
  begin_kernel();
  const Row r = this_row(p, blockIdx.x / p.pieces);
  const int first = blockIdx.x % p.pieces * p.piece_tiles, end = min(first + p.piece_tiles, p.tiles);
  scan<T>(p, r, first, end, p.summaries + r.row * p.groups);
}
template <class T>
__global__ void __launch_bounds__(kBlock, kBlocksPerSM) choose_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Shared shared;
  begin_kernel();
  const Row r = this_row(p, blockIdx.x);
  choose<T>(p, r, p.summaries + r.row * p.groups, shared);
}

// host ---------------------------------------------------------------------------------------------------------------

template <class T>
void launch(const SampleParams& p, int64_t rows, cudaStream_t stream) {
  if (p.pieces == 0) return launch_kernel(row_kernel<T>, unsigned(rows), kBlock, 0, stream, p);
  launch_kernel(scan_kernel<T>, unsigned(rows * p.pieces), kScanBlock, 0, stream, p);
  launch_kernel(choose_kernel<T>, unsigned(rows), kBlock, 0, stream, p);
}

Tensor run(const char* op, const Tensor& logits, SampleParams p) {
  const int64_t rows = logits.size(0);
  Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  if (rows == 0) return out;
  p.logits = logits.const_data_ptr();
  p.stride_bytes = logits.stride(0) * int64_t(logits.element_size());
  p.vocab = int(logits.size(1));
  p.items = int(ceil_div(p.vocab, kItem));
  p.groups = int(ceil_div(p.vocab, kGroup));
  p.tiles = int(ceil_div(p.groups, kTileGroups));
  p.whole = is_aligned(logits, {0}) ? p.vocab / kItem : 0;
  p.out = out.mutable_data_ptr<int64_t>();
  int bits = 0;
  while ((int64_t(1) << bits) < p.vocab) ++bits;
  p.mass_unit = float(int64_t(1) << (62 - bits));

  // A block a row, where a warp has one tile to scan or rows fill the device evenly.
  int sms = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, logits.get_device_index()));
  const int64_t resident = int64_t(sms) * kBlocksPerSM, waves = ceil_div(rows, resident);
  if (p.tiles > kWarps && rows * 10 < waves * resident * 9) {
    constexpr int kScanWarps = kScanBlock / 32;
    const int64_t each = ceil_div(rows * p.tiles, int64_t(sms) * kScanBlocks * kScanWarps);
    p.piece_tiles = int(each) * kScanWarps;
    p.pieces = int(ceil_div(p.tiles, p.piece_tiles));
  }
  Tensor workspace = out;
  if (p.pieces > 0 || p.groups > kShared) {
    workspace = torch::stable::new_empty(logits, {rows * p.groups * int64_t(sizeof(Summary))}, ScalarType::Byte);
    p.summaries = static_cast<Summary*>(workspace.mutable_data_ptr());
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
