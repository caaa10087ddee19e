// What this library was compiled for; the builder defines PAGEDKV_CUDA_ARCHS for this unit alone.
#ifndef PAGEDKV_CUDA_ARCHS
#error "compile with torch_pagedkv/build.py"
#endif

extern "C" __attribute__((visibility("default"))) const char* pagedkv_cuda_archs() { return PAGEDKV_CUDA_ARCHS; }
