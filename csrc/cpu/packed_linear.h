// What the layers over packed weights share on the CPU: int4_linear, q4k_linear, int8_linear. Defined in int4.cpp.
#pragma once

#include "../ops.h"
#include "int4_kernel.h"

namespace pagedkv {

constexpr const char* kPackedActivations[] = {"none", "silu", "gelu", "gelu_tanh"};
constexpr Act kPackedActs[] = {Act::kNone, Act::kSilu, Act::kGelu, Act::kGeluTanh};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// activation(x W^T + bias) + residual, for checked arguments. `order`: the input of x that each of the weight's k
// inputs takes, -1: 0; null: its own.
Tensor packed_linear(const Tensor& x, const Tensor& packed, WeightBits bits, const Int4Scales& s, const int32_t* order,
                     int64_t k, const OptTensor& bias, const OptTensor& residual, Act act);

}  // namespace pagedkv
