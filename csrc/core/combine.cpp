// Linear combinations, chunk by chunk.
#include <vector>

#include "chunks.h"
#include "kernels.h"

extern "C" int32_t drivekd_combine(const drivekd_lists* lists, const double* weights,
                                   int accumulate, drivekd_parallel_for parallel_for,
                                   void* const* out) {
  using namespace drivekd;
  const Kernels& kernels = current_kernels();
  const std::vector<Chunk> chunks = cut(*lists);
  // One weight per gradient, in the order of the gradients.
  std::vector<double> own;
  std::vector<int64_t> first(lists->num_tensors);
  for (int64_t t = 0; t < lists->num_tensors; ++t) {
    const drivekd_tensor& tensor = lists->tensors[t];
    first[t] = static_cast<int64_t>(own.size());
    for (int32_t k = 0; k < tensor.count; ++k)
      own.push_back(weights[tensor.row * lists->num_tasks + lists->tasks[tensor.first + k]]);
  }
  return for_each_chunk(chunks, parallel_for, [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const drivekd_tensor& tensor = lists->tensors[chunk.tensor];
    const Terms terms{reinterpret_cast<const char* const*>(lists->grads + tensor.first),
                      &own[first[chunk.tensor]], tensor.count, accumulate != 0,
                      static_cast<char*>(out[chunk.tensor])};
    kernels.combine[tensor.dtype](terms, chunk.begin, chunk.end);
  });
}
