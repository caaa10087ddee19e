#include "rows.inl"

const pagedkv::RowKernels* pagedkv::rows_avx512() { return &kTable; }
