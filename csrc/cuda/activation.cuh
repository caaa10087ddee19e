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

__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }  // NaN stays NaN
template <bool kFast>
__device__ __forceinline__ float swish(float x, float beta) {  // x times the logistic function of beta x
  if constexpr (kFast) return __fdividef(x, 1.f + __expf(-beta * x));
  return x / (1.f + expf(-beta * x));
}
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.7071067811865476f)); }
__device__ __forceinline__ float gelu_tanh(float x) {
  return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));  // sqrt(2 / pi)
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
      map<N>(x, [](float v) { return swish<kFast>(v, 1.f); });
      break;
    case Act::kGelu:
      map<N>(x, [](float v) { return gelu(v); });
      break;
    case Act::kGeluTanh:
      map<N>(x, [](float v) { return gelu_tanh(v); });
      break;
    case Act::kQuickGelu:
      map<N>(x, [](float v) { return swish<kFast>(v, 1.702f); });
      break;
  }
}

}  // namespace
}  // namespace pagedkv
