// y = x W^T for few rows of x: dot products of whole weight rows, each weight read once for up to 8 rows of x.
//
// A block is B rows of W times R rows of x, B * R <= W accumulators of W lanes (W: floats in a vector), so that one
// transposed sum folds them all. Rows of W stream from memory; the same offset of the next block is prefetched, which
// is far enough ahead (B rows) and no work where the weights are in the cache already. x is packed first: as float32 in
// the order in which the weights come apart (bfloat16 as even and odd elements, one shift and one mask), or, for
// vdpbf16ps, as it is.
//
// Floor: bytes of W / memory bandwidth.
#include "attention_vec.h"
#include "linear_kernel.h"

namespace pagedkv {
namespace {

// Weights come apart into two vectors of floats for 2 W elements.
template <class L>
struct Floats {
  using E = typename L::E;
  struct Pair {
    vf a, b;
  };
  static constexpr int kStep = 2 * W;
  static int64_t packed_bytes(int64_t k) { return round_up(round_up(k, kStep) * int64_t(sizeof(float)), 64); }
  static void pack(const void* x, int64_t k, char* packed) {
    float* out = reinterpret_cast<float*>(packed);
    for (int64_t i = 0; i < k; i += kStep) {
      const Pair p =
          i + kStep <= k ? weights(static_cast<const E*>(x) + i) : weights(static_cast<const E*>(x) + i, int(k - i));
      store(out + i, p.a);
      store(out + i + W, p.b);
    }
  }
  static INLINE Pair weights(const E* p) {
    Pair w;
    L::load2(p, w.a, w.b);
    return w;
  }
  static INLINE Pair weights(const E* p, int n) {
    Pair w{};
    for (int i = 0; i < n; ++i) {  // the end of a row: any number of elements, one by one
      E one[2 * W] = {};
      one[i] = p[i];
      vf a, b;
      L::load2(one, a, b);
      w.a += a, w.b += b;
    }
    return w;
  }
  static INLINE Pair input(const char* packed, int64_t i) {
    const float* x = reinterpret_cast<const float*>(packed) + i;
    return {load(x), load(x + W)};
  }
  static INLINE vf dot(Pair w, Pair x, vf sum) { return fma(w.b, x.b, fma(w.a, x.a, sum)); }
};

#if defined(__AVX512BF16__)
struct Products {  // of pairs of bfloat16
  using E = BF16;
  using Pair = __m512bh;
  static constexpr int kStep = 2 * W;
  static int64_t packed_bytes(int64_t k) { return round_up(k, kStep) * 2; }
  static void pack(const void* x, int64_t k, char* packed) {
    memcpy(packed, x, size_t(2 * k));
    memset(packed + 2 * k, 0, size_t(packed_bytes(k) - 2 * k));
  }
  static INLINE Pair weights(const E* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE Pair weights(const E* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
  }
  static INLINE Pair input(const char* packed, int64_t i) { return (__m512bh)_mm512_loadu_si512(packed + 2 * i); }
  static INLINE vf dot(Pair w, Pair x, vf sum) { return _mm512_dpbf16_ps(sum, w, x); }
};
using BF16Policy = Products;
#else
using BF16Policy = Floats<Woven>;
#endif

template <class P, int R, int B>
INLINE void block(const LinearTask& t, int64_t row, int64_t n) {
  using E = typename P::E;
  const E* w = static_cast<const E*>(t.weight) + n * t.weight_stride;
  const char* x = t.x + row * t.x_bytes;
  vf sum[W] = {};  // of (r, b) at r * B + b
  int64_t i = 0;
  for (; i + P::kStep <= t.k; i += P::kStep) {
    typename P::Pair in[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) in[r] = P::input(x + r * t.x_bytes, i);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const E* p = w + b * t.weight_stride + i;
      __builtin_prefetch(p + B * t.weight_stride);
      const typename P::Pair weights = P::weights(p);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * B + b] = P::dot(weights, in[r], sum[r * B + b]);
    }
  }
  if (i < t.k) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const typename P::Pair weights = P::weights(w + b * t.weight_stride + i, int(t.k - i));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * B + b] = P::dot(weights, P::input(x + r * t.x_bytes, i), sum[r * B + b]);
    }
  }
  float each[2 * W] = {};
  store(each, sum_each(sum));
  const vf bias = t.bias ? load(static_cast<const E*>(t.bias) + n, Part{B}) : vf{};
  for (int r = 0; r < R; ++r) store(static_cast<E*>(t.y) + (row + r) * t.n + n, load(each + r * B) + bias, Part{B});
}

template <class P, int R>
void rows_of(const LinearTask& t, int64_t row, int64_t begin, int64_t end) {
  constexpr int B = R * 8 <= W ? 8 : W / R;  // 8 streams at most
  int64_t n = begin;
  for (; n + B <= end; n += B) block<P, R, B>(t, row, n);
  for (; n < end; ++n) block<P, R, 1>(t, row, n);
}

template <class P>
void run(const LinearTask& t, int64_t begin, int64_t end) {
  constexpr int kMost = W < 8 ? W : 8;
  int64_t row = 0;
  while (row < t.rows) {
    const int64_t left = min64(t.rows - row, kMost);
    switch (left) {
      case 1:
        rows_of<P, 1>(t, row, begin, end);
        break;
      case 2:
        rows_of<P, 2>(t, row, begin, end);
        break;
      case 3:
        rows_of<P, 3>(t, row, begin, end);
        break;
      case 4:
        rows_of<P, 4>(t, row, begin, end);
        break;
#if defined(__AVX2__)
      case 5:
        rows_of<P, 5>(t, row, begin, end);
        break;
      case 6:
        rows_of<P, 6>(t, row, begin, end);
        break;
      case 7:
        rows_of<P, 7>(t, row, begin, end);
        break;
      case 8:
        rows_of<P, 8>(t, row, begin, end);
        break;
#endif
    }
    row += left;
  }
}

}  // namespace

extern const LinearKernels PAGEDKV_LINEAR_TABLE;
const LinearKernels PAGEDKV_LINEAR_TABLE = {
    {Floats<Plain<float>>::packed_bytes, Floats<Plain<F16>>::packed_bytes, BF16Policy::packed_bytes},
    {Floats<Plain<float>>::pack, Floats<Plain<F16>>::pack, BF16Policy::pack},
    {run<Floats<Plain<float>>>, run<Floats<Plain<F16>>>, run<BF16Policy>},
};

}  // namespace pagedkv
