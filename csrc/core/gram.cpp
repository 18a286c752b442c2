// Gram matrices: inner products chunk by chunk, added up in the order of the chunks.
#include <algorithm>
#include <array>
#include <vector>

#include "chunks.h"
#include "kernels.h"

namespace drivekd {
namespace {

// More tasks than a kernel takes, while the chunk is in cache.
void two_at_a_time(const std::array<GramKernel, kMaxTasks>& kernels, const char* const* grads,
                   int tasks, const Chunk& chunk, double* sums) {
  for (int a = 0; a < tasks; ++a)
    for (int b = 0; b <= a; ++b) {
      const char* const pair[2] = {grads[b], grads[a]};
      double own[num_pairs(2)] = {};
      kernels[a == b ? 0 : 1](pair, chunk.begin, chunk.end, own);
      sums[num_pairs(a) + b] += own[a == b ? 0 : 1];
    }
}

}  // namespace
}  // namespace drivekd

extern "C" int32_t drivekd_gram(const drivekd_lists* lists, int64_t num_rows,
                                drivekd_parallel_for parallel_for, double* gram) {
  using namespace drivekd;
  const Kernels& kernels = current_kernels();
  const std::vector<Chunk> chunks = cut(*lists);
  std::vector<int64_t> offsets(chunks.size() + 1, 0);
  for (size_t i = 0; i < chunks.size(); ++i)
    offsets[i + 1] = offsets[i] + num_pairs(lists->tensors[chunks[i].tensor].count);
  std::vector<double> sums(offsets.back(), 0.0);

  const int32_t status = for_each_chunk(chunks, parallel_for, [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const drivekd_tensor& tensor = lists->tensors[chunk.tensor];
    const auto* grads = reinterpret_cast<const char* const*>(lists->grads + tensor.first);
    const auto& own = kernels.gram[tensor.dtype];
    double* pairs = &sums[offsets[i]];
    if (tensor.count <= kMaxTasks)
      own[tensor.count - 1](grads, chunk.begin, chunk.end, pairs);
    else
      two_at_a_time(own, grads, tensor.count, chunk, pairs);
  });

  const int64_t tasks = lists->num_tasks;
  std::fill(gram, gram + num_rows * tasks * tasks, 0.0);
  for (size_t i = 0; i < chunks.size(); ++i) {
    const drivekd_tensor& tensor = lists->tensors[chunks[i].tensor];
    const int64_t* own = lists->tasks + tensor.first;
    double* matrix = gram + tensor.row * tasks * tasks;
    const double* pair = &sums[offsets[i]];
    for (int a = 0; a < tensor.count; ++a)
      for (int b = 0; b <= a; ++b) matrix[own[a] * tasks + own[b]] += *pair++;
  }
  for (int64_t row = 0; row < num_rows; ++row)
    for (int64_t a = 0; a < tasks; ++a)
      for (int64_t b = 0; b < a; ++b)
        gram[(row * tasks + b) * tasks + a] = gram[(row * tasks + a) * tasks + b];
  return status;
}
