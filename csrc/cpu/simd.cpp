#include "simd.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pagedkv {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

Isa detect() {
  int level = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) level = 1;
  if (level == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    level = 2;
  if (level == 2 && __builtin_cpu_supports("avx512bf16")) level = 3;
#endif
  if (const char* wanted = std::getenv("PAGEDKV_SIMD")) {
    int named = 0;
    while (named < 4 && std::strcmp(wanted, kNames[named])) ++named;
    if (named == 4)
      std::fprintf(stderr, "torch_pagedkv: PAGEDKV_SIMD=%s is ignored, it is none of generic, avx2, avx512\n", wanted);
    else if (named < level)
      level = named;
  }
  return Isa(level);
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace pagedkv

// Asked by torch_pagedkv/_native.py.
extern "C" __attribute__((visibility("default"))) const char* pagedkv_cpu_isa() {
  return pagedkv::kNames[int(pagedkv::cpu_isa())];
}
