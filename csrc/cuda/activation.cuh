// The activations, by name and on N floats in registers. The switch is uniform: outside the loop over the elements.
// kFast: for results of 16 bits. The logistic function's approximate exponential and quotient are off by a few steps of
// float32, at a fifth of the instructions; the exact ones took longer than memory (117 us for 97 at 4096 x 14336).
#pragma once

#include "cuda_common.h"

namespace pagedkv {
namespace {

enum class Act { kNone, kRelu, kRelu2, kSilu, kGelu, kGeluTanh, kQuickGelu };

struct ActName {
  const char* name;
  Act act;
};
constexpr ActName kActivations[] = {{"none", Act::kNone},           {"relu", Act::kRelu}, {"relu2", Act::kRelu2},
                                    {"silu", Act::kSilu},           {"gelu", Act::kGelu}, {"gelu_tanh", Act::kGeluTanh},
                                    {"quick_gelu", Act::kQuickGelu}};

Act find_activation(const char* op, const std::string& name) {
  std::string known;
  for (const ActName& a : kActivations) {
    if (name == a.name) return a.act;
    known += (known.empty() ? "" : ", ") + std::string(a.name);
  }
  fail(op, ": activation: got \"", name, "\", needs one of ", known);
}

// The hardware's own, denormals flushed: the intrinsics rescale their arguments for them, six instructions for one.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }  // NaN stays NaN
template <bool kFast>
__device__ __forceinline__ float times_logistic(float x, float y) {  // x times the logistic function of y
  if constexpr (kFast) return __fdividef(x, 1.f + __expf(-y));
  return x / (1.f + expf(-y));
}
// x times the normal distribution up to x. Fast: of the tail up to -|x|, exp(x^2 / 2) times which is a polynomial in
// 1 / (1 + 0.36 |x|) within 1.3e-5 of itself, everywhere (fitted to the smallest relative error).
template <bool kFast>
__device__ __forceinline__ float gelu(float x) {
  if constexpr (!kFast) return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
  const float t = reciprocal_approx(fmaf(0.36f, fabsf(x), 1.f));
  float tail = fmaf(-0.09851895926705198f, t, 0.2543962205437542f);
  tail = fmaf(tail, t, 0.03510770168615007f);
  tail = fmaf(tail, t, 0.16869978549593057f);
  tail = fmaf(tail, t, 0.1401232177402751f);
  tail = fmaf(tail, t, 0.0001913566404724361f) * exp2_approx(-0.7213475204444817f * x * x);
  return x * (x > 0.f ? 1.f - tail : tail);
}
template <bool kFast>
__device__ __forceinline__ float gelu_tanh(float x) {  // sqrt(2 / pi) = 0.797...; (1 + tanh y) / 2 is logistic of 2 y
  if constexpr (kFast) return times_logistic<true>(x, x * fmaf(0.07135481627260025f, x * x, 1.5957691216057308f));
  return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

template <int N, class F>
__device__ __forceinline__ void map(float* x, F f) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = f(x[i]);
}
template <int N, bool kFast = false>
__device__ __forceinline__ void apply(Act act, float* x) {
  switch (act) {
    case Act::kNone:
      break;
    case Act::kRelu:
      map<N>(x, [](float v) { return relu(v); });
      break;
    case Act::kRelu2:
      map<N>(x, [](float v) { return relu(v) * relu(v); });
      break;
    case Act::kSilu:
      map<N>(x, [](float v) { return times_logistic<kFast>(v, v); });
      break;
    case Act::kGelu:
      map<N>(x, [](float v) { return gelu<kFast>(v); });
      break;
    case Act::kGeluTanh:
      map<N>(x, [](float v) { return gelu_tanh<kFast>(v); });
      break;
    case Act::kQuickGelu:
      map<N>(x, [](float v) { return times_logistic<kFast>(v, 1.702f * v); });
      break;
  }
}

}  // namespace
}  // namespace pagedkv
