// The row kernels, compiled once per instruction set: rows_<isa>.cpp includes this file and names its table.

// Products and sums below are rounded one by one, as PyTorch's elementwise kernels do: a rotated float32 query or a
// normalised row then has the same bits as the model's own formula. Where fusing helps, fma() says so.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "rows.h"
#include "rows_vec.h"

namespace pagedkv {
namespace {

// ---- norm -----------------------------------------------------------------------------------------------------------

// Element i of a weight or bias that has the row's dtype T or is float32.
template <class T, class P>
inline vf load_either(const void* p, bool float32, int64_t i, P part) {
  return float32 ? load(static_cast<const float*>(p) + i, part) : load(static_cast<const T*>(p) + i, part);
}

template <class T>
void rms_norm(const NormRow& row) {
  const NormRow a = row;  // the compiler then knows that no store changes it
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  Sum sum;
  if (a.residual) {
    const T* residual = static_cast<const T*>(a.residual);
    T* h = static_cast<T*>(a.h);
    each(a.n, [&](int64_t i, auto part) {
      const vf s = rounded(T{}, load(x + i, part) + load(residual + i, part));
      store(h + i, s, part);
      sum.add_square(s);
    });
    x = h;
  } else {
    each(a.n, [&](int64_t i, auto part) { sum.add_square(load(x + i, part)); });
  }
  const vf r = 1.f / sqrt1(float(sum.total() / double(a.n)) + a.eps);
  each(a.n, [&](int64_t i, auto part) {
    vf v = load(x + i, part) * r;
    if (a.round_before_weight) v = rounded(T{}, v);
    if (a.weight) v = v * (load_either<T>(a.weight, a.weight_float32, i, part) + a.weight_offset);
    store(y + i, v, part);
  });
}

template <class T>
void layer_norm(const NormRow& row) {
  const NormRow a = row;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  // About the first element, so that a mean far from 0 cancels before the squares are added up.
  const float x0 = load(x, Part{1})[0];
  Sum sum, squares;
  each(a.n, [&](int64_t i, auto part) {
    const vf v = ended(load(x + i, part), part, x0);
    const vd p = low_double(v) - double(x0), q = high_double(v) - double(x0);
    sum.add(p, q);
    squares.add_square(p, q);
  });
  const double shifted = sum.total() / double(a.n), mean = x0 + shifted;
  const double variance = squares.total() / double(a.n) - shifted * shifted;
  // In two floats: where the mean is large beside the deviations, the first difference is exact.
  const float mean_high = float(mean), mean_low = float(mean - double(mean_high));
  // 1 / sqrt by a step of Newton's in double, and it and the normalised values in two floats as well: where weight and
  // bias cancel, every rounding before is seen.
  const double square = (variance < 0 ? 0 : variance) + double(a.eps), guess = (1.f / sqrt1(float(square)))[0];
  const double root = guess * (1.5 - 0.5 * square * guess * guess);
  const vf r = splat(float(root)), r_low = splat(float(root - double(float(root))));
  each(a.n, [&](int64_t i, auto part) {
    const vf d = load(x + i, part) - mean_high - mean_low;
    vf v = d * r;
    if (a.weight || a.bias) {
      const vf low = fma(d, r_low, fma(d, r, -v));
      const vf weight = a.weight ? load_either<T>(a.weight, a.weight_float32, i, part) : splat(1.f);
      const vf bias = a.bias ? load_either<T>(a.bias, a.bias_float32, i, part) : zero();
      v = fma(v, weight, fma(low, weight, bias));
    }
    store(y + i, v, part);
  });
}

// ---- rotary ---------------------------------------------------------------------------------------------------------

inline vf rotate_first(vf x1, vf x2, vf c, vf s) { return x1 * c - x2 * s; }
inline vf rotate_second(vf x1, vf x2, vf c, vf s) { return x2 * c + x1 * s; }

template <class T, class C>
void rotate_row(const RotateToken& a, const T* x, T* out) {
  const C *cos = static_cast<const C*>(a.cos), *sin = static_cast<const C*>(a.sin);
  each(a.half, [&](int64_t i, auto part) {
    const vf c = load(cos + i, part), s = load(sin + i, part);
    if (!a.interleaved) {
      const vf x1 = load(x + i, part), x2 = load(x + a.half + i, part);
      store(out + i, rotate_first(x1, x2, c, s), part);
      store(out + a.half + i, rotate_second(x1, x2, c, s), part);
    } else {
      T pairs[2 * W];  // a full vector at either end, whatever is left of the row
      __builtin_memcpy(pairs, x + 2 * i, 2 * count(part) * sizeof(T));
      vf x1, x2, y1, y2;
      deinterleave(load(pairs, Full{}), load(pairs + W, Full{}), &x1, &x2);
      interleave(rotate_first(x1, x2, c, s), rotate_second(x1, x2, c, s), &y1, &y2);
      store(pairs, y1, Full{});
      store(pairs + W, y2, Full{});
      __builtin_memcpy(out + 2 * i, pairs, 2 * count(part) * sizeof(T));
    }
  });
  if (out != x) __builtin_memcpy(out + 2 * a.half, x + 2 * a.half, (a.d - 2 * a.half) * sizeof(T));
}

template <class T>
void rotate(const RotateToken& a) {
  for (int64_t h = 0; h < a.heads; ++h) {
    const T* x = static_cast<const T*>(a.x) + h * a.x_stride;
    T* out = static_cast<T*>(a.out) + h * a.out_stride;
    a.cos_float32 ? rotate_row<T, float>(a, x, out) : rotate_row<T, T>(a, x, out);
  }
}

// ---- activation -----------------------------------------------------------------------------------------------------

template <Act act, class T>
inline vf apply(vf x) {
  if constexpr (act == Act::kRelu) return x < 0.f ? zero() : x;  // NaN stays
  if constexpr (act == Act::kRelu2) return x < 0.f ? zero() : x * x;
  if constexpr (act == Act::kSilu) return x / (1.f + exp(-x));
  if constexpr (act == Act::kGelu) {
    const vf t = as<vf>(as<vu>(x) & 0x7fffffffu);
    const vf q = sizeof(T) == 2 ? normal_tail(t, kShortTail) : normal_tail(t, kTail);
    vf part = x < 0.f ? q : 1.f - q;
    if constexpr (sizeof(T) == 4) part = t < 1.f ? fma(x, normal_middle(x), splat(0.5f)) : part;
    return x * part;
  }
  if constexpr (act == Act::kGeluTanh)  // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), without its cancellation
    return x / (1.f + exp(-1.59576912f * (x + 0.044715f * (x * x * x))));
  if constexpr (act == Act::kQuickGelu) return x / (1.f + exp(-1.702f * x));
  return x;
}

template <class T, Act act>
void activate_row(const ActRow& a) {
  const T *x = static_cast<const T*>(a.x), *bias = static_cast<const T*>(a.bias), *up = static_cast<const T*>(a.up);
  T* y = static_cast<T*>(a.y);
  each(a.n, [&](int64_t i, auto part) {
    vf v = load(x + i, part);
    if (bias) v = v + load(bias + i, part);
    v = apply<act, T>(v);
    if (up) v = v * load(up + i, part);
    store(y + i, v, part);
  });
}

template <class T>
void activate(Act act, const ActRow& a) {
  switch (act) {
    case Act::kNone:
      return activate_row<T, Act::kNone>(a);
    case Act::kRelu:
      return activate_row<T, Act::kRelu>(a);
    case Act::kRelu2:
      return activate_row<T, Act::kRelu2>(a);
    case Act::kSilu:
      return activate_row<T, Act::kSilu>(a);
    case Act::kGelu:
      return activate_row<T, Act::kGelu>(a);
    case Act::kGeluTanh:
      return activate_row<T, Act::kGeluTanh>(a);
    case Act::kQuickGelu:
      return activate_row<T, Act::kQuickGelu>(a);
  }
}

// ---- cache ----------------------------------------------------------------------------------------------------------

template <class Q>
constexpr float kQuantMax = 448.f;
template <>
constexpr float kQuantMax<I8> = 127.f;

inline vf to_quantum(I8, vf y) {
  const vf whole = (y + 12582912.f) - 12582912.f;  // to even, through the spacing at 1.5 * 2^23
  const vf top = whole > 127.f ? splat(127.f) : whole;
  const vf clamped = top < -127.f ? splat(-127.f) : top;
  return clamped == clamped ? clamped : zero();
}
inline vf to_quantum(F8, vf y) {
  const vf top = y > 448.f ? splat(448.f) : y;
  return top < -448.f ? splat(-448.f) : top;
}

template <class T, class Q>
float quantize(const void* x_, void* y_, int64_t n) {
  const T* x = static_cast<const T*>(x_);
  Q* y = static_cast<Q*>(y_);
  vu largest{};  // |x| as integers, which order as the floats do and let a NaN win
  each(n, [&](int64_t i, auto part) {
    const vu a = as<vu>(load(x + i, part)) & 0x7fffffffu;
    largest = a > largest ? a : largest;
  });
  const float scale = as<float>(max_lane(largest)) / kQuantMax<Q>;
  const float inverse = scale >= 1.17549435e-38f ? 1.f / scale : 0.f;  // that of a subnormal would be infinite
  each(n, [&](int64_t i, auto part) { store(y + i, to_quantum(Q{}, load(x + i, part) * inverse), part); });
  return scale;
}

template <class From, class To>
void convert(const void* x, float scale, void* y, int64_t n) {
  each(n, [&](int64_t i, auto part) {
    vf v = load(static_cast<const From*>(x) + i, part);
    if (sizeof(From) == 1) v = v * scale;
    store(static_cast<To*>(y) + i, v, part);
  });
}

// ---- sampling -------------------------------------------------------------------------------------------------------

const float kInf = __builtin_inff();

template <class T>
int64_t argmax(const void* x_, int64_t n) {
  constexpr int64_t kPiece = 512;  // scanned for its maximum; only the winner is looked at again
  const T* x = static_cast<const T*>(x_);
  float best = -kInf;
  int64_t start = -1;
  for (int64_t p = 0; p < n; p += kPiece) {
    vf m = splat(-kInf);
    each(n - p < kPiece ? n - p : kPiece, [&](int64_t i, auto part) {
      const vf v = ended(load(x + p + i, part), part, -kInf);
      m = v > m ? v : m;  // false for NaN
    });
    if (to_mask(m > best)) {
      best = max_lane(m);
      start = p;
    }
  }
  if (start < 0) return -1;
  int64_t found = -1;
  each(n - start < kPiece ? n - start : kPiece, [&](int64_t i, auto part) {
    const uint32_t equal = to_mask(ended(load(x + start + i, part), part, -kInf) == best);
    if (found < 0 && equal) found = start + i + __builtin_ctz(equal);
  });
  return found;
}

template <class T>
void prepare(const void* x_, float temperature, float* z, float* chunk_max, int64_t n) {
  const T* x = static_cast<const T*>(x_);
  for (int64_t p = 0; p < n; p += kChunk) {
    vf m = splat(-kInf);
    for (int64_t i = p; i < p + kChunk; i += W) {
      vf v = splat(-kInf);
      if (i + W <= n)
        v = load(x + i, Full{});
      else if (i < n)
        v = ended(load(x + i, Part{int(n - i)}), Part{int(n - i)}, -kInf);
      v = v / temperature;
      v = v == v ? v : splat(-kInf);
      m = v > m ? v : m;
      store(z + i, v, Full{});
    }
    chunk_max[p / kChunk] = max_lane(m);
  }
}

double softmax_terms(const float* z, float max, float keep, float* e, int64_t n) {
  Sum sum;
  for (int64_t i = 0; i < n; i += W) {
    const vf v = load(z + i, Full{});
    const vf term = if_else(v >= keep, exp(v - max), zero());
    store(e + i, term, Full{});
    sum.add(low_double(term), high_double(term));
  }
  return sum.total();
}

// Philox4x32-10, a block of four words in each 64-bit lane. Upper halves of the lanes collect garbage that neither the
// products nor the final packing look at.
inline void philox(int64_t block, uint64_t seed, uint64_t offset, vu words[2]) {
  vq c0, c1{}, c2 = vq{} + (offset & 0xffffffffu), c3 = vq{} + (offset >> 32);
  for (int i = 0; i < W / 2; ++i) c0[i] = uint64_t(block + i);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const vq p0 = mul32(c0, 0xD2511F53u), p1 = mul32(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0;
    c2 = (p0 >> 32) ^ c3 ^ k1;
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  vq a, b;
  interleave((c0 & 0xffffffffu) | (c1 << 32), (c2 & 0xffffffffu) | (c3 << 32), &a, &b);
  words[0] = as<vu>(a);
  words[1] = as<vu>(b);
}

// An element wins only if E < exp(z - best), and E = -log1p(-w) >= w: so w >= exp(z - best) rules it out. The margin
// covers the rounding here; the caller computes the score of what is left.
int race(RaceChunk* c) {
  int found = 0;
  for (int i = 0; i < kChunk; i += 2 * W) {
    vu words[2];
    philox(c->block + i / 4, c->seed, c->offset, words);
    for (int j = 0; j < 2; ++j) {
      const vf z = load(c->z + i + j * W, Full{});
      const vf bound = exp(z - c->best) * 1.001f;
      const vf w = __builtin_convertvector(words[j], vf) * 0x1p-32f;
      for (uint32_t mask = to_mask((w < bound) & (z >= c->keep)); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        c->index[found] = i + j * W + lane;
        c->word[found++] = words[j][lane];
      }
    }
  }
  return found;
}

#define PAGEDKV_FLOATS(f) {f<float>, f<F16>, f<BF16>}
#define PAGEDKV_TO_FLOATS(from) {convert<from, float>, convert<from, F16>, convert<from, BF16>}

constexpr RowKernels kTable = {
    PAGEDKV_FLOATS(rms_norm),
    PAGEDKV_FLOATS(layer_norm),
    PAGEDKV_FLOATS(rotate),
    PAGEDKV_FLOATS(activate),
    {{quantize<float, I8>, quantize<float, F8>},
     {quantize<F16, I8>, quantize<F16, F8>},
     {quantize<BF16, I8>, quantize<BF16, F8>}},
    {PAGEDKV_TO_FLOATS(float), PAGEDKV_TO_FLOATS(F16), PAGEDKV_TO_FLOATS(BF16), PAGEDKV_TO_FLOATS(I8),
     PAGEDKV_TO_FLOATS(F8)},
    PAGEDKV_FLOATS(argmax),
    PAGEDKV_FLOATS(prepare),
    softmax_terms,
    race,
};

}  // namespace
}  // namespace pagedkv
