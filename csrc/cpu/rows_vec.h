// Vectors of floats for the row kernels: one definition, as wide as the instruction set that the unit is compiled for.
//
// Arithmetic, comparison and selection are the compiler's own vector extensions; only what they cannot say (fused
// multiply-add, float16, unsigned 32 x 32 -> 64 products, masks) is intrinsics, with a portable form beside.
// Everything is in an anonymous namespace and nothing of the C++ library is included: see simd.h.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pagedkv {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using vf = float __attribute__((vector_size(4 * W)));
using vi = int32_t __attribute__((vector_size(4 * W)));
using vu = uint32_t __attribute__((vector_size(4 * W)));
using vd = double __attribute__((vector_size(4 * W)));    // W / 2 lanes
using vq = uint64_t __attribute__((vector_size(4 * W)));  // W / 2 lanes
using v16 = uint16_t __attribute__((vector_size(2 * W)));
using v8 = uint8_t __attribute__((vector_size(W)));
using vs8 = int8_t __attribute__((vector_size(W)));

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
struct I8 {
  int8_t bits;
};
struct F8 {  // float8_e4m3fn
  uint8_t bits;
};

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
inline vf splat(float x) { return x - vf{}; }
inline vf zero() { return vf{}; }
inline vf if_else(vi mask, vf a, vf b) { return mask ? a : b; }
inline vu if_else(vi mask, vu a, vu b) { return mask ? a : b; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline vf sqrt1(float x) {  // in every lane; the library's sqrtf would be a call
#if defined(__x86_64__)
  return splat(_mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))));
#else
  return splat(__builtin_sqrtf(x));
#endif
}

// ---- integers of other widths, and float64: the compiler's own conversion would go through halves -------------------

inline vu widen(v16 x) {
#if defined(__AVX512F__)
  return as<vu>(_mm512_cvtepu16_epi32(as<__m256i>(x)));
#elif defined(__AVX2__)
  return as<vu>(_mm256_cvtepu16_epi32(as<__m128i>(x)));
#else
  return __builtin_convertvector(x, vu);
#endif
}
inline vi widen(vs8 x) {
#if defined(__AVX512F__)
  return as<vi>(_mm512_cvtepi8_epi32(as<__m128i>(x)));
#elif defined(__AVX2__)
  return as<vi>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(as<int64_t>(x))));
#else
  return __builtin_convertvector(x, vi);
#endif
}
inline v16 narrow16(vu x) {  // lanes below 2^16
#if defined(__AVX512F__)
  return as<v16>(_mm512_cvtepi32_epi16(as<__m512i>(x)));
#elif defined(__AVX2__)
  const __m256i y = as<__m256i>(x);
  return as<v16>(_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)));
#else
  return __builtin_convertvector(x, v16);
#endif
}
inline v8 narrow8(vu x) {
#if defined(__AVX512F__)
  return as<v8>(_mm512_cvtepi32_epi8(as<__m512i>(x)));
#else
  return __builtin_convertvector(x, v8);
#endif
}
inline vd low_double(vf x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_castps512_ps256(x));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_castps256_ps128(x));
#else
  return vd{x[0], x[1]};
#endif
}
inline vd high_double(vf x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  return vd{x[2], x[3]};
#endif
}

// ---- float16, bfloat16, float8 --------------------------------------------------------------------------------------

inline vf from_half(v16 h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(as<__m256i>(h));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(as<__m128i>(h));
#else
  const vu bits = widen(h);
  const vu sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  const vf finite = as<vf>(rest) * 0x1p112f;  // the exponents' biases differ by 112; makes subnormals right as well
  const vu special = rest | 0x7f800000u;      // inf and NaN
  return as<vf>(if_else((bits & 0x7c00u) == 0x7c00u, special, as<vu>(finite)) | sign);
#endif
}
inline v16 to_half(vf x) {
#if defined(__AVX512F__)
  return as<v16>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return as<v16>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const vu bits = as<vu>(x), sign = (bits >> 16) & 0x8000u, a = bits & 0x7fffffffu;
  const vu normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;  // ties to even; overflows into inf by itself
  const vu subnormal = as<vu>(as<vf>(a) + 0.5f) - 0x3f000000u;             // the spacing at 0.5 is float16's smallest
  const vu special = if_else(a > 0x7f800000u, vu{} + 0x7e00u, vu{} + 0x7c00u);
  const vu r = if_else(a >= 0x47800000u, special, if_else(a < 0x38800000u, subnormal, normal));
  return narrow16(r | sign);
#endif
}
inline vf from_bfloat(v16 h) { return as<vf>(widen(h) << 16); }
inline v16 to_bfloat(vf x) {
  const vu bits = as<vu>(x);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow16(if_else(x != x, vu{} + 0x7fc0u, rounded));
}
inline vf from_float8(v8 b) {
  const v16 h = __builtin_convertvector(b, v16);
  const vf x = from_half(((h & 0x7f) << 7) | ((h & 0x80) << 8)) * 256.f;  // the exponents' biases differ by 8
  const vu wide = __builtin_convertvector(b, vu);
  return if_else((wide & 0x7fu) == 0x7fu, splat(__builtin_nanf("")), x);
}
inline v8 to_float8(vf x) {  // |x| <= 448 or NaN
  const vu bits = as<vu>(x), sign = (bits >> 24) & 0x80u, a = bits & 0x7fffffffu;
  const vu normal = (a + 0x7ffffu + ((a >> 20) & 1u) - (120u << 23)) >> 20;
  const vu subnormal = as<vu>(as<vf>(a) + 0x1p14f) - 0x46800000u;  // the spacing at 2^14 is float8's smallest, 2^-9
  const vu r = if_else(a > 0x7f800000u, vu{} + 0x7fu, if_else(a < 0x3c800000u, subnormal, normal));
  return narrow8(r | sign);
}

// ---- loads and stores: a full vector, or the first n lanes (the others are 0) ---------------------------------------

struct Full {};
struct Part {
  int n;
};

template <class V>
inline V raw(const void* p, Full) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline V raw(const void* p, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return as<V>(_mm512_maskz_loadu_epi32((1u << part.n) - 1, p));
  if constexpr (sizeof(V) == 32) return as<V>(_mm256_maskz_loadu_epi16((1u << part.n) - 1, p));
#endif
  V v{};
  __builtin_memcpy(&v, p, part.n * (sizeof v / W));
  return v;
}
template <class V>
inline void put(void* p, V v, Full) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class V>
inline void put(void* p, V v, Part part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_epi32(p, (1u << part.n) - 1, as<__m512i>(v));
  if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_epi16(p, (1u << part.n) - 1, as<__m256i>(v));
#endif
  __builtin_memcpy(p, &v, part.n * (sizeof v / W));
}

template <class P>
inline vf load(const float* p, P part) {
  return raw<vf>(p, part);
}
template <class P>
inline vf load(const F16* p, P part) {
  return from_half(raw<v16>(p, part));
}
template <class P>
inline vf load(const BF16* p, P part) {
  return from_bfloat(raw<v16>(p, part));
}
template <class P>
inline vf load(const I8* p, P part) {
  return __builtin_convertvector(widen(raw<vs8>(p, part)), vf);
}
template <class P>
inline vf load(const F8* p, P part) {
  return from_float8(raw<v8>(p, part));
}
template <class P>
inline void store(float* p, vf x, P part) {
  put(p, x, part);
}
template <class P>
inline void store(F16* p, vf x, P part) {
  put(p, to_half(x), part);
}
template <class P>
inline void store(BF16* p, vf x, P part) {
  put(p, to_bfloat(x), part);
}
template <class P>
inline void store(F8* p, vf x, P part) {
  put(p, to_float8(x), part);
}
template <class P>
inline void store(I8* p, vf x, P part) {  // |x| <= 127, already a whole number
  put(p, narrow8(as<vu>(__builtin_convertvector(x, vi))), part);
}

// x as it would be after a store and a load.
inline vf rounded(float, vf x) { return x; }
inline vf rounded(F16, vf x) { return from_half(to_half(x)); }
inline vf rounded(BF16, vf x) { return from_bfloat(to_bfloat(x)); }

// Calls f(i, part) for i = 0, W, 2 W ...; part is Full, and Part at the end of a row that is no multiple of W.
template <class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, Full{});
  if (i < n) f(i, Part{int(n - i)});
}
inline int count(Full) { return W; }
inline int count(Part part) { return part.n; }

// Lanes past the row's end become `fill`.
inline vf ended(vf x, Full, float) { return x; }
inline vf ended(vf x, Part part, float fill) {
  for (int i = part.n; i < W; ++i) x[i] = fill;
  return x;
}

// ---- across lanes ---------------------------------------------------------------------------------------------------

// Sums in float64, which costs little beside the memory traffic and leaves the rounding to the rest of the formula.
struct Sum {
  vd a{}, b{};
  void add(vd p, vd q) {
    a += p;
    b += q;
  }
  void add_square(vd p, vd q) {
    a += p * p;
    b += q * q;
  }
  void add_square(vf x) { add_square(low_double(x), high_double(x)); }
  double total() const {
    const vd s = a + b;
    double t = 0;
    for (int i = 0; i < W / 2; ++i) t += s[i];
    return t;
  }
};

inline float max_lane(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
inline uint32_t max_lane(vu x) {
  uint32_t m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
inline uint32_t to_mask(vi lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(as<__m512i>(lanes));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(as<__m256>(lanes));
#else
  uint32_t m = 0;
  for (int i = 0; i < W; ++i) m |= uint32_t(lanes[i] < 0) << i;
  return m;
#endif
}

// Pairs (x0, x1, x2, x3 ...) in a, b <-> the even and the odd elements.
inline void deinterleave(vf a, vf b, vf* even, vf* odd) {
#if defined(__AVX512F__)
  const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *even = _mm512_permutex2var_ps(a, e, b);
  *odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(e, _mm512_set1_epi32(1)), b);
#elif defined(__AVX2__)
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}
inline void interleave(vf even, vf odd, vf* a, vf* b) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *a = _mm512_permutex2var_ps(even, first, odd);
  *b = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
#elif defined(__AVX2__)
  *a = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
  *b = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  *a = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
  *b = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
#endif
}
inline void interleave(vq even, vq odd, vq* a, vq* b) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  *a = as<vq>(_mm512_permutex2var_epi64(as<__m512i>(even), first, as<__m512i>(odd)));
  *b = as<vq>(
      _mm512_permutex2var_epi64(as<__m512i>(even), _mm512_add_epi64(first, _mm512_set1_epi64(4)), as<__m512i>(odd)));
#elif defined(__AVX2__)
  *a = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
  *b = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
#else
  *a = __builtin_shufflevector(even, odd, 0, 2);
  *b = __builtin_shufflevector(even, odd, 1, 3);
#endif
}

// The low 32 bits of each lane times m, 64 bits; what is above in a lane of x is ignored.
inline vq mul32(vq x, uint32_t m) {
#if defined(__AVX512F__)
  return as<vq>(_mm512_mul_epu32(as<__m512i>(x), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return as<vq>(_mm256_mul_epu32(as<__m256i>(x), _mm256_set1_epi64x(m)));
#elif defined(__x86_64__)
  return as<vq>(_mm_mul_epu32(as<__m128i>(x), _mm_set1_epi64x(m)));
#else
  return (x & 0xffffffffu) * m;
#endif
}

// ---- functions ------------------------------------------------------------------------------------------------------

// e^x to about 1 ulp; 0 below e^-87. Cody-Waite reduction, then a minimax polynomial.
template <bool negative = false>  // whether x <= 0 is known, so that nothing can overflow
inline vf exp(vf x) {
  const vf top = negative ? x : if_else(x > 89.f, splat(89.f), x);
  const vf shifted = fma(top, splat(1.44269504f), splat(12582912.f));  // + 1.5 * 2^23: rounds to a whole number
  const vf n = shifted - 12582912.f;
  const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), top));
  vf p = fma(r, splat(1.3813143e-3f), splat(8.3694188e-3f));
  p = fma(p, r, splat(4.1668456e-2f));
  p = fma(p, r, splat(1.6666515e-1f));
  p = fma(p, r, splat(4.9999994e-1f));
  p = fma(p, r * r, r) + 1.f;
  const vu exponent = as<vu>(shifted) - 0x4b400000u;
  const vf y = negative ? p * as<vf>((exponent + 127u) << 23)
                        : p * as<vf>((exponent + 126u) << 23) * 2.f;  // 2^128 is out of range
  return if_else(x < -87.f, zero(), y);
}

// The standard normal's upper tail Q(t) = exp(-t^2 / 2) R(t), t >= 0; R is Mills' ratio / sqrt(2 pi), a minimax
// polynomial in s = 1 / (1 + 0.3 t), times s. Relative error 4e-9 before rounding, or 8e-6, which 16 bits cannot see.
constexpr float kTail[] = {1.19686633e-01f,  1.19572841e-01f, 1.10227324e-01f,  7.84255713e-02f, 9.60578620e-02f,
                           -7.92474076e-02f, 1.91581786e-01f, -2.28067577e-01f, 1.12375811e-01f, -2.06128359e-02f};
constexpr float kShortTail[] = {1.20074235e-01f,  1.13741919e-01f, 1.44196421e-01f,
                                -1.69481356e-02f, 2.16037109e-01f, -7.70974383e-02f};
template <int terms>
inline vf normal_tail(vf t, const float (&c)[terms]) {
  const vf s = 1.f / fma(t, splat(0.3f), splat(1.f));
  vf p = splat(c[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) p = fma(p, s, splat(c[i]));
  return exp<true>(-0.5f * t * t) * (p * s);
}

// Phi(x) - 1 / 2 over x for |x| < 1, a series in x^2 with a relative error of 1e-9: there the tail's roundings are
// twice as large as this sum's.
constexpr float kMiddle[] = {0.39894228f,      -0.0664903801f,  0.00997355701f,   -0.00118732822f, 0.000115434688f,
                             -9.44465626e-06f, 6.65969352e-07f, -4.12266741e-08f, 2.27352982e-09f};
inline vf normal_middle(vf x) {
  constexpr int terms = sizeof(kMiddle) / sizeof(float);
  const vf square = x * x;
  vf p = splat(kMiddle[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) p = fma(p, square, splat(kMiddle[i]));
  return p;
}

}  // namespace
}  // namespace pagedkv
