// The only file that knows torch: checks, pointer tables and registration on the stable ABI.
// Python owns the `drivekd::` operators and uses these as one of their backends. With DRIVEKD_CUDA
// the same operators take CUDA tensors; no CUDA header is needed here.
#if defined(DRIVEKD_CUDA) && !defined(USE_CUDA)
#define USE_CUDA  // torch's stable headers then declare what returns the current stream
#endif
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <vector>

#include "core/drivekd_core.h"
#ifdef DRIVEKD_CUDA
#include "cuda/drivekd_cuda.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int32_t dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DRIVEKD_F64;
    case ScalarType::Float: return DRIVEKD_F32;
    case ScalarType::BFloat16: return DRIVEKD_BF16;
    case ScalarType::Half: return DRIVEKD_F16;
    default: STD_TORCH_CHECK(false, "expected float64, float32, bfloat16 or float16 tensors");
  }
}

// The flat lists of drivekd/ops/gradient_layout.py as pointer tables.
struct Lists {
  std::vector<drivekd_tensor> tensors;
  std::vector<const void*> pointers;
  std::vector<int64_t> tasks;
  drivekd_lists view;
};

Lists make_lists(const std::vector<Tensor>& grads, std::vector<int64_t> tasks,
                 const std::vector<int64_t>& offsets, const std::vector<int64_t>& rows,
                 int64_t num_tasks, int64_t num_rows) {
  const int64_t num_grads = static_cast<int64_t>(grads.size());
  STD_TORCH_CHECK(num_grads > 0 && tasks.size() == grads.size(), "one task per gradient");
  STD_TORCH_CHECK(offsets.size() == rows.size() + 1 && offsets.front() == 0 &&
                      offsets.back() == num_grads,
                  "offsets must run from 0 to the number of gradients");
  const bool on_cpu = grads[0].is_cpu();
  const auto device = grads[0].get_device_index();
  for (int64_t task : tasks)
    STD_TORCH_CHECK(0 <= task && task < num_tasks, "task ", task, " is out of range");
  Lists lists;
  lists.pointers.reserve(num_grads);
  for (size_t t = 0; t < rows.size(); ++t) {
    const int64_t begin = offsets[t], end = offsets[t + 1];
    STD_TORCH_CHECK(0 <= begin && begin < end && end <= num_grads, "tensor ", t,
                    " has no gradients");
    STD_TORCH_CHECK(0 <= rows[t] && rows[t] < num_rows, "row ", rows[t], " is out of range");
    const Tensor& first = grads[begin];
    const drivekd_tensor tensor{first.numel(), begin, static_cast<int32_t>(end - begin),
                                static_cast<int32_t>(rows[t]), dtype_of(first)};
    for (int64_t i = begin; i < end; ++i) {
      const Tensor& grad = grads[i];
      STD_TORCH_CHECK(grad.is_cpu() == on_cpu && grad.get_device_index() == device,
                      "gradients must be on one device");
      STD_TORCH_CHECK(grad.numel() == tensor.size && dtype_of(grad) == tensor.dtype,
                      "gradients of tensor ", t, " must agree in size and dtype");
      lists.pointers.push_back(grad.const_data_ptr());
    }
    lists.tensors.push_back(tensor);
  }
  lists.tasks = std::move(tasks);
  lists.view = {lists.tensors.data(), static_cast<int64_t>(lists.tensors.size()),
                lists.pointers.data(), lists.tasks.data(), num_tasks};
  return lists;
}

Tensor gram(std::vector<Tensor> grads, std::vector<int64_t> tasks, std::vector<int64_t> offsets,
            std::vector<int64_t> rows, int64_t num_tasks, int64_t num_patterns) {
  const Lists lists = make_lists(grads, std::move(tasks), offsets, rows, num_tasks, num_patterns);
  Tensor values = torch::stable::new_empty(grads[0], {num_patterns, num_tasks, num_tasks},
                                           std::make_optional(ScalarType::Double));
  const int32_t status = drivekd_gram(&lists.view, num_patterns, torch_parallel_for,
                                      static_cast<double*>(values.mutable_data_ptr()));
  STD_TORCH_CHECK(status == 0, "parallel_for failed");
  return values;
}

// Lists, and where their outputs are.
struct Combination {
  Lists lists;
  std::vector<void*> out;
};

Combination make_combination(const std::vector<Tensor>& out, const std::vector<Tensor>& grads,
                             std::vector<int64_t> tasks, const std::vector<int64_t>& offsets,
                             const std::vector<int64_t>& rows, const Tensor& weights) {
  STD_TORCH_CHECK(weights.dim() == 2 && weights.scalar_type() == ScalarType::Double &&
                      weights.is_contiguous(),
                  "weights must be a contiguous (S, K) float64 tensor");
  Combination result;
  result.lists =
      make_lists(grads, std::move(tasks), offsets, rows, weights.size(1), weights.size(0));
  const bool on_cpu = grads[0].is_cpu();
  const auto device = grads[0].get_device_index();
  STD_TORCH_CHECK(weights.is_cpu() == on_cpu && weights.get_device_index() == device,
                  "weights must be on the device of the gradients");
  STD_TORCH_CHECK(out.size() == rows.size(), "one output per tensor");
  for (size_t t = 0; t < out.size(); ++t) {
    const drivekd_tensor& tensor = result.lists.tensors[t];
    STD_TORCH_CHECK(out[t].is_cpu() == on_cpu && out[t].get_device_index() == device &&
                        out[t].numel() == tensor.size && dtype_of(out[t]) == tensor.dtype,
                    "output ", t, " must agree with its gradients in device, size and dtype");
    result.out.push_back(out[t].mutable_data_ptr());
  }
  return result;
}

void combine(std::vector<Tensor> out, std::vector<Tensor> grads, std::vector<int64_t> tasks,
             std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor weights,
             bool accumulate) {
  const Combination own = make_combination(out, grads, std::move(tasks), offsets, rows, weights);
  const int32_t status =
      drivekd_combine(&own.lists.view, static_cast<const double*>(weights.const_data_ptr()),
                      accumulate, torch_parallel_for, own.out.data());
  STD_TORCH_CHECK(status == 0, "parallel_for failed");
}

#ifdef DRIVEKD_CUDA

void* current_stream(int32_t device) {
  void* stream = nullptr;
  // Torch 2.11 has no STABLE_TORCH_ERROR_CODE_CHECK yet.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check_cuda(int32_t status) {
  STD_TORCH_CHECK(status >= 0, "a tensor has more than ", int(DRIVEKD_CUDA_MAX_COUNT),
                  " gradients; use backend='triton' or 'torch'");
  STD_TORCH_CHECK(status == 0, "CUDA: ", drivekd_cuda_message(status));
}

Tensor gram_cuda(std::vector<Tensor> grads, std::vector<int64_t> tasks,
                 std::vector<int64_t> offsets, std::vector<int64_t> rows, int64_t num_tasks,
                 int64_t num_patterns) {
  const Lists lists = make_lists(grads, std::move(tasks), offsets, rows, num_tasks, num_patterns);
  const auto device = grads[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto float64 = std::make_optional(ScalarType::Double);
  Tensor values =
      torch::stable::new_empty(grads[0], {num_patterns, num_tasks, num_tasks}, float64);
  Tensor partials =
      torch::stable::new_empty(grads[0], {drivekd_cuda_gram_partials(&lists.view)}, float64);
  check_cuda(drivekd_cuda_gram(&lists.view, num_patterns,
                               static_cast<double*>(partials.mutable_data_ptr()),
                               static_cast<double*>(values.mutable_data_ptr()),
                               current_stream(device)));
  return values;
}

void combine_cuda(std::vector<Tensor> out, std::vector<Tensor> grads, std::vector<int64_t> tasks,
                  std::vector<int64_t> offsets, std::vector<int64_t> rows, Tensor weights,
                  bool accumulate) {
  const Combination own = make_combination(out, grads, std::move(tasks), offsets, rows, weights);
  const auto device = grads[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(drivekd_cuda_combine(&own.lists.view,
                                  static_cast<const double*>(weights.const_data_ptr()), accumulate,
                                  own.out.data(), current_stream(device)));
}

// The toolkit's version, as CUDART_VERSION has it. Only a build for CUDA has this operator.
int64_t cuda_version() { return drivekd_cuda_version(); }

#endif  // DRIVEKD_CUDA

// 0 base, 1 AVX2, 2 AVX-512: use at most this one, where the processor has it.
int64_t limit_isa(int64_t limit) {
  STD_TORCH_CHECK(DRIVEKD_BASE <= limit && limit <= DRIVEKD_AVX512, "limit must be 0, 1 or 2");
  drivekd_limit_isa(static_cast<drivekd_isa>(limit));
  return drivekd_current_isa();
}

// The one in use, as above.
int64_t cpu_isa() { return drivekd_current_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY(drivekd_native, m) {
  m.def(
      "gram(Tensor[] grads, int[] tasks, int[] offsets, int[] rows, int num_tasks, "
      "int num_patterns) -> Tensor");
  m.def(
      "combine(Tensor(a!)[] out, Tensor[] grads, int[] tasks, int[] offsets, int[] rows, "
      "Tensor weights, bool accumulate) -> ()");
  m.def("limit_isa(int limit) -> int");
  m.def("cpu_isa() -> int");
#ifdef DRIVEKD_CUDA
  m.def("cuda_version() -> int");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(drivekd_native, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("combine", TORCH_BOX(&combine));
}

STABLE_TORCH_LIBRARY_IMPL(drivekd_native, CompositeExplicitAutograd, m) {
  m.impl("limit_isa", TORCH_BOX(&limit_isa));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
#ifdef DRIVEKD_CUDA
  m.impl("cuda_version", TORCH_BOX(&cuda_version));
#endif
}

#ifdef DRIVEKD_CUDA
STABLE_TORCH_LIBRARY_IMPL(drivekd_native, CUDA, m) {
  m.impl("gram", TORCH_BOX(&gram_cuda));
  m.impl("combine", TORCH_BOX(&combine_cuda));
}
#endif

// A module without contents: importing it runs the registrations above.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
