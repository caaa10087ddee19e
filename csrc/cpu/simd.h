// The instruction set chosen for this process.
//
// Each *_<isa>.cpp is compiled with its own -m flags and includes nothing but C headers, intrinsics and headers like
// this one: an inline C++ function compiled there with AVX-512 could be the copy the linker keeps for everybody.
#pragma once

namespace pagedkv {

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The best that this CPU runs; the environment's PAGEDKV_SIMD=generic|avx2|avx512 lowers it.
Isa cpu_isa();

}  // namespace pagedkv
