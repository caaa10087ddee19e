#include "rows.h"

#include "simd.h"

namespace pagedkv {

const RowKernels& rows() {
  static const RowKernels* const table = [] {
#if defined(__x86_64__)
    if (cpu_isa() >= Isa::kAvx512) return rows_avx512();
    if (cpu_isa() >= Isa::kAvx2) return rows_avx2();
#endif
    return rows_generic();
  }();
  return *table;
}

}  // namespace pagedkv
