// The torch-free core: plain C, raw pointers. It allocates nothing that outlives a call, knows no
// Python and no thread pool of its own; the caller lends one. csrc/README.md is the manual.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum drivekd_dtype { DRIVEKD_F64 = 0, DRIVEKD_F32 = 1, DRIVEKD_BF16 = 2, DRIVEKD_F16 = 3 };
enum drivekd_isa { DRIVEKD_BASE = 0, DRIVEKD_AVX2 = 1, DRIVEKD_AVX512 = 2 };

// One tensor and its gradients: grads[first .. first + count), of the tasks tasks[first .. ].
struct drivekd_tensor {
  int64_t size;   // elements
  int64_t first;  // of its gradients
  int32_t count;  // of its gradients, at least 1
  int32_t row;    // its pattern: the matrix of the Gram, or the row of the weights
  int32_t dtype;  // of its gradients and of its output
};

// Any number of tensors; `grads` and `tasks` are indexed by drivekd_tensor.first. Gradients are
// dense, of any alignment, and equal positions belong together.
struct drivekd_lists {
  const struct drivekd_tensor* tensors;
  int64_t num_tensors;
  const void* const* grads;
  const int64_t* tasks;
  int64_t num_tasks;
};

typedef void (*drivekd_range)(int64_t begin, int64_t end, void* context);
// Calls `range` on disjoint parts of [begin, end), of at least `grain` each; 0 is success.
typedef int32_t (*drivekd_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                        drivekd_range range, void* context);

// gram[row][a][b] = sum over tensors of that row, and over elements, of grads_a * grads_b.
// `gram` holds num_rows * num_tasks^2 doubles, all of which are written. The result does not
// depend on the number of threads. Returns what `parallel_for` returned.
int32_t drivekd_gram(const struct drivekd_lists* lists, int64_t num_rows,
                     drivekd_parallel_for parallel_for, double* gram);

// out[t] = sum_k weights[row][k] * grads_k, plus the old out[t] if `accumulate`; rounded once.
// `weights` is rows x num_tasks. out[t] may be one of t's own gradients.
int32_t drivekd_combine(const struct drivekd_lists* lists, const double* weights, int accumulate,
                        drivekd_parallel_for parallel_for, void* const* out);

// The instruction set in use: the best that the processor has, or less after drivekd_limit_isa.
enum drivekd_isa drivekd_current_isa(void);
void drivekd_limit_isa(enum drivekd_isa limit);

#ifdef __cplusplus
}
#endif
