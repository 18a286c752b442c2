// Work items of a fixed size, whatever the number of threads, so that results do not depend on it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "drivekd_core.h"

namespace drivekd {

// Elements per item: what K = 4 gradients of it fill stays in the second-level cache.
constexpr int64_t kChunk = 1 << 14;
// Fewer elements than this are not worth a second thread.
constexpr int64_t kParallelElements = 1 << 15;

struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

inline std::vector<Chunk> cut(const drivekd_lists& lists) {
  std::vector<Chunk> chunks;
  for (int64_t t = 0; t < lists.num_tensors; ++t)
    for (int64_t begin = 0; begin < lists.tensors[t].size; begin += kChunk)
      chunks.push_back({t, begin, std::min(begin + kChunk, lists.tensors[t].size)});
  return chunks;
}

// Runs body(index) for every chunk. Threads take the next index from a shared counter: tensors are
// ragged, and cores are rarely alone.
template <class Body>
int32_t for_each_chunk(const std::vector<Chunk>& chunks, drivekd_parallel_for parallel_for,
                       const Body& body) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t elements = 0;
  for (const Chunk& chunk : chunks) elements += chunk.end - chunk.begin;
  if (elements < kParallelElements) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return 0;
  }
  struct Queue {
    const Body& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } queue{body, count};
  const auto drain = [](int64_t, int64_t, void* context) {
    Queue& own = *static_cast<Queue*>(context);
    for (int64_t i = own.next++; i < own.count; i = own.next++) own.body(i);
  };
  return parallel_for(0, count, 1, drain, &queue);
}

}  // namespace drivekd
