#include "rows.inl"

const pagedkv::RowKernels* pagedkv::rows_generic() { return &kTable; }
