// Kernels over one row of a tensor, in a table per instruction set. C-like on purpose: see simd.h.
#pragma once

#include <stdint.h>

namespace pagedkv {

// Index of a table entry: the row's dtype.
enum { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8 };

enum class Act { kNone, kRelu, kRelu2, kSilu, kGelu, kGeluTanh, kQuickGelu };

struct NormRow {
  const void* x;         // [n]
  const void* residual;  // [n] or null
  void* h;               // [n]: x + residual; null without a residual
  void* y;               // [n]
  const void* weight;    // [n] or null, x's dtype or float32
  const void* bias;      // [n] or null, layer_norm only
  bool weight_float32, bias_float32;
  int64_t n;
  float eps, weight_offset;
  bool round_before_weight;
};

// All heads of one token; strides in elements.
struct RotateToken {
  const void* x;  // [heads, d]
  void* out;      // [heads, d], may be x itself
  int64_t x_stride, out_stride, heads, d;
  const void *cos, *sin;  // [half], x's dtype or float32
  bool cos_float32, interleaved;
  int64_t half;
};

struct ActRow {
  const void* x;     // [n]
  const void* bias;  // [n] or null
  const void* up;    // [n] or null: the product's other factor
  void* y;           // [n]
  int64_t n;
};

// Elements that sampling looks at together. A row of z is padded to a multiple of it with -inf.
constexpr int kChunk = 64;

struct RaceChunk {
  const float* z;          // [kChunk]
  int64_t block;           // Philox block of z[0]: its index in the row / 4
  uint64_t seed, offset;   // the row's stream
  float keep;              // elements with z below do not take part
  float best;              // score to beat
  uint32_t index[kChunk];  // out: elements that may beat it ...
  uint32_t word[kChunk];   // ... and their random words
};

struct RowKernels {
  void (*rms_norm[3])(const NormRow&);
  void (*layer_norm[3])(const NormRow&);
  void (*rotate[3])(const RotateToken&);
  void (*activate[3])(Act, const ActRow&);
  // x [n] of the first index's dtype -> y [n] of the second's (int8, float8); returns the scale.
  float (*quantize[3][2])(const void* x, void* y, int64_t n);
  // x [n] of the first index's dtype, times scale if it is int8 or float8 -> y [n] of the second's.
  void (*convert[5][3])(const void* x, float scale, void* y, int64_t n);
  // First index of the largest element, NaN skipped; -1 if nothing is above -inf.
  int64_t (*argmax[3])(const void* x, int64_t n);
  // z = x / temperature, NaN as -inf, padded; chunk_max: the largest of each chunk.
  void (*prepare[3])(const void* x, float temperature, float* z, float* chunk_max, int64_t n);
  // e = exp(z - max) where z >= keep, else 0; returns the sum. n: a multiple of kChunk.
  double (*softmax_terms)(const float* z, float max, float keep, float* e, int64_t n);
  // Fills index and word, returns how many.
  int (*race)(RaceChunk*);
};

const RowKernels* rows_generic();
const RowKernels* rows_avx2();
const RowKernels* rows_avx512();
const RowKernels& rows();  // the one for cpu_isa()

}  // namespace pagedkv
