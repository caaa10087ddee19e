// Shared by every native file: the stable-ABI types, error checks that name the argument, and dtype dispatch.
//
// Only libtorch's stable ABI is used: TORCH_TARGET_VERSION (set by the builder) turns any include of at:: or c10::
// headers into a compile error, so one binary serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>  // 2.11 does not pull it in by itself
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace pagedkv {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// The text of a message, put together with <<. Not a std::ostringstream: some toolchains link libstdc++ statically into
// a shared library, and a stream of that copy, printing a number, looks for a facet in the locale of the process's own
// copy and crashes.
struct Text {
  std::string str;
  Text& operator<<(std::string_view s) {
    str += s;
    return *this;
  }
  template <class N>
    requires std::is_arithmetic_v<N>
  Text& operator<<(N n) {
    if constexpr (std::is_integral_v<N>) return *this << std::string_view(std::to_string(n));
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", double(n));
    return *this << digits;
  }
  Text& operator<<(const void* address) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%p", address);
    return *this << digits;
  }
  Text& operator<<(const char* s) { return *this << std::string_view(s); }
};

inline std::string shape_of(const Tensor& t) {
  Text s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str;
}

// A dtype as Python writes it.
inline std::string name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    default:
      return torch::headeronly::toString(t);
  }
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}
inline bool is_quantized(ScalarType t) { return t == ScalarType::Char || t == ScalarType::Float8_e4m3fn; }

template <class... Args>
[[noreturn]] inline void fail(const Args&... args) {
  Text s;
  (s << ... << args);
  throw std::runtime_error(s.str);
}
// Every message reads "op: argument: got X, needs Y" (STD_TORCH_CHECK would put a source path in front of it). `got`
// may be a chain of <<.
#define PAGEDKV_CHECK(cond, op, arg, got, ...)               \
  do {                                                       \
    if (!(cond)) {                                           \
      ::pagedkv::Text message;                               \
      message << op << ": " << arg << ": got " << got;       \
      ::pagedkv::fail(message.str, ", needs ", __VA_ARGS__); \
    }                                                        \
  } while (0)

// Calls f with a value of the C++ type behind a float32 / float16 / bfloat16 dtype.
template <class F>
inline void dispatch_float(ScalarType t, const char* op, F&& f) {
  switch (t) {
    case ScalarType::Float:
      f(float{});
      return;
    case ScalarType::Half:
      f(Half{});
      return;
    case ScalarType::BFloat16:
      f(BFloat16{});
      return;
    default:
      fail(op, ": got dtype ", name_of(t), ", needs float32, float16 or bfloat16");
  }
}

}  // namespace pagedkv
