// The CUDA core: plain C, device pointers, a stream; no torch, no Python, no allocation, no sync.
// Everything is enqueued on `stream` (a cudaStream_t) of the current device. Pointer tables travel as
// kernel arguments, by value, so nothing has to outlive a call and a CUDA graph may capture it.
#pragma once
#include "core/drivekd_core.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DRIVEKD_CUDA_MAX_COUNT = 8 };  // gradients of one tensor

// Doubles of device memory that drivekd_cuda_gram needs as `partials`.
int64_t drivekd_cuda_gram_partials(const struct drivekd_lists* lists);

// As drivekd_gram, with `grads`, `partials` and `gram` in device memory. Bitwise repeatable.
// Returns 0, a cudaError_t, or -1 where a tensor has more than DRIVEKD_CUDA_MAX_COUNT gradients.
int32_t drivekd_cuda_gram(const struct drivekd_lists* lists, int64_t num_rows, double* partials,
                          double* gram, void* stream);

// As drivekd_combine, with `grads`, `weights` and `out` in device memory; returns as above.
int32_t drivekd_cuda_combine(const struct drivekd_lists* lists, const double* weights,
                             int32_t accumulate, void* const* out, void* stream);

// CUDART_VERSION of the build.
int32_t drivekd_cuda_version(void);

// What a positive status means.
const char* drivekd_cuda_message(int32_t status);

#ifdef __cplusplus
}
#endif
