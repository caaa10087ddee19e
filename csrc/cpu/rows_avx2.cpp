#include "rows.inl"

const pagedkv::RowKernels* pagedkv::rows_avx2() { return &kTable; }
