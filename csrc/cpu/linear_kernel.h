// The kernels of linear.cpp, one table for each instruction set. C only: see simd.h.
#pragma once

#include <stdint.h>

namespace pagedkv {

struct LinearTask {
  const void* weight;     // [N, K]
  int64_t weight_stride;  // elements from row to row
  const void* bias;       // [N] or null
  const char* x;          // [rows] packed rows, x_bytes apart
  int64_t x_bytes;
  void* y;  // [rows, N]
  int64_t rows, n, k;
};

// Indices are those of rows.h: float32, float16, bfloat16.
struct LinearKernels {
  // Bytes of a packed row of k elements; a multiple of 64.
  int64_t (*packed_bytes[3])(int64_t k);
  // x [k] -> a packed row, padded with zeros to whole steps.
  void (*pack[3])(const void* x, int64_t k, char* packed);
  // Columns [begin, end) of y, for all rows.
  void (*run[3])(const LinearTask& task, int64_t begin, int64_t end);
};

extern const LinearKernels linear_generic, linear_avx2, linear_avx512, linear_avx512bf16;

}  // namespace pagedkv
