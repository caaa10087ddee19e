// The kernels of int4.cpp, q4k.cpp and int8.cpp, one table for each instruction set. C only: see simd.h.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace pagedkv {

// Inputs come in chunks, over which sums are taken before they are scaled; all of a chunk is in one group.
constexpr int64_t kInt4Chunk = 128;
// Rows of x that are worked on at once: their chunk, totals and the panel of weights just about fit a first-level
// cache.
constexpr int64_t kInt4Rows = 128;

struct Int4Scales {
  const void* scales;    // [groups, n]
  const uint8_t* zeros;  // [groups, n] or null: 8
  const void* offsets;   // [groups, n] or null
  // Of Q4_K, else null: 6-bit scales and minima [groups, n]. scales and offsets are then d and dmin, float16 [groups /
  // 8, n]: w = scale * sub_scale * q - offset * sub_min.
  const uint8_t *sub_scales, *sub_mins;
  int dtype;         // of scales and offsets, as in rows.h
  int64_t n, group;  // outputs, inputs of a group
};

enum WeightBits { kFourBits, kEightBits };

struct Int4Task {
  const uint32_t* packed;  // see int4.h
  Int4Scales s;
  const char* x;      // packed rows: [chunks][rows][inputs of the chunk]
  const float* sums;  // [chunks][rows]: of the rows' chunks; null with neither zeros nor offsets
  int64_t rows, k_padded, chunk;
  const void* bias;                      // [n] or null
  const void* residual;                  // [rows, n] or null
  void* y;                               // [rows, n]
  void (*activate)(Act, const ActRow&);  // float32
  Act act;
};

// Indices are those of rows.h: float32, float16, bfloat16.
struct Int4Kernels {
  int64_t x_bytes[3];  // of a packed element
  // Row `row` of x [k] -> t.x, zeros up to t.k_padded, and its sums; `packed` and `sums` are t.x and t.sums.
  void (*pack[3])(const Int4Task& t, const void* x, int64_t k, int64_t row, char* packed, float* sums);
  // Outputs 32 begin .. 32 end of all rows, for weights of WeightBits.
  void (*run[2][3])(const Int4Task& t, int64_t begin, int64_t end);
};

extern const Int4Kernels int4_generic, int4_avx2, int4_avx512, int4_avx512bf16;

}  // namespace pagedkv
