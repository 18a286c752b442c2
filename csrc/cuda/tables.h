// Tensors as kernel arguments: tables by value, and how a list is cut into them.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "cuda/drivekd_cuda.h"

namespace drivekd_cuda {

constexpr int kThreads = 256;
// Elements of an item, the work of one block.
constexpr int kChunk = 1 << 15;
// Kernel arguments may have 32,764 bytes from compute capability 7.0 on; some are for the rest.
constexpr int kTableBytes = 32000;

__host__ __device__ constexpr int num_pairs(int count) { return count * (count + 1) / 2; }
inline int64_t num_items(int64_t size) { return (size + kChunk - 1) / kChunk; }

// Tensors of one dtype and number of gradients. `first_item[t]` is t's first item in this launch.
template <class Entry>
struct Table {
  static constexpr int kCapacity = kTableBytes / (sizeof(Entry) + sizeof(int32_t));
  Entry entries[kCapacity];
  int32_t first_item[kCapacity];
  int32_t num_entries;
};

// The tensor that an item belongs to.
template <class Entry>
__device__ __forceinline__ int entry_of(const Table<Entry>& table, int item) {
  int low = 0, high = table.num_entries;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_item[middle] <= item)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Calls launch(table, items) for every full table of the tensors of (dtype, count), and for the last
// one. fill(entry, tensor index) writes an entry. Stops at the first status that is not 0.
template <class Entry, class Fill, class Launch>
int32_t for_each_table(const drivekd_lists& lists, int32_t dtype, int32_t count, const Fill& fill,
                       const Launch& launch) {
  constexpr int64_t kMostItems = INT32_MAX;
  std::unique_ptr<Table<Entry>> table;
  int64_t items = 0;
  for (int64_t t = 0; t < lists.num_tensors; ++t) {
    const drivekd_tensor& tensor = lists.tensors[t];
    if (tensor.dtype != dtype || tensor.count != count || tensor.size == 0) continue;
    if (!table) table = std::make_unique<Table<Entry>>();
    const int64_t own = num_items(tensor.size);
    if (table->num_entries == Table<Entry>::kCapacity || items + own > kMostItems) {
      if (const int32_t status = launch(*table, static_cast<int32_t>(items))) return status;
      items = table->num_entries = 0;
    }
    fill(table->entries[table->num_entries], t);
    table->first_item[table->num_entries++] = static_cast<int32_t>(items);
    items += own;
  }
  return items == 0 ? 0 : launch(*table, static_cast<int32_t>(items));
}

inline bool counts_fit(const drivekd_lists& lists) {
  for (int64_t t = 0; t < lists.num_tensors; ++t)
    if (lists.tensors[t].count > DRIVEKD_CUDA_MAX_COUNT) return false;
  return true;
}

}  // namespace drivekd_cuda
