#include "tensor_list.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/half.h"

namespace fastclip {
namespace {

void check(AOTITorchError error, const char* call) {
  if (error != 0) throw std::runtime_error(std::string("fastclip: torch's ") + call + " failed");
}
#define FASTCLIP_CALL(function, ...) check(function(__VA_ARGS__), #function)

// The codes of our dtypes in the running torch, in the order of Dtype.
const int32_t* torch_dtypes() {
  static const int32_t codes[kNumDtypes] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                            aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return codes;
}

int find_dtype(int32_t code) {
  const int32_t* codes = torch_dtypes();
  for (int d = 0; d < kNumDtypes; ++d)
    if (codes[d] == code) return d;
  return -1;
}

template <class T>
T from_stack(StableIValue value) {
  T out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
}

bool is_contiguous(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1;
  for (int64_t d = dim; d-- > 0; expected *= sizes[d])
    if (sizes[d] != 1 && strides[d] != expected) return false;
  return true;
}

// Sorted by stride, dimensions merge to a single run of stride 1 exactly when the memory is dense in some order.
std::unique_ptr<const std::vector<Dim>> merged_dims(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  if (is_contiguous(dim, sizes, strides)) return nullptr;
  std::vector<Dim> dims;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != 1) dims.push_back({sizes[d], strides[d]});
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  std::vector<Dim> merged;
  for (const Dim& inner : dims) {
    if (!merged.empty() && merged.back().stride == inner.stride * inner.size)
      merged.back() = {merged.back().size * inner.size, inner.stride};
    else
      merged.push_back(inner);
  }
  if (merged.size() == 1 && merged[0].stride == 1) return nullptr;
  return std::make_unique<const std::vector<Dim>>(std::move(merged));
}

bool may_overlap_itself(const std::vector<Dim>& dims) {
  int64_t reach = 1;  // one past the furthest element that the inner dimensions touch
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->stride < reach) return true;
    reach += (dim->size - 1) * dim->stride;
  }
  return false;
}

}  // namespace

TensorView make_view(void* data, Dtype dtype, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  TensorView view{static_cast<char*>(data), 1, nullptr, dtype};
  for (int64_t d = 0; d < dim; ++d) view.numel *= sizes[d];
  if (view.numel > 0) view.dims = merged_dims(dim, sizes, strides);
  return view;
}

void check_writable(const std::vector<TensorView>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].dims != nullptr && may_overlap_itself(*tensors[i].dims))
      throw std::runtime_error("fastclip: tensors[" + std::to_string(i) +
                               "]: unsupported operation: more than one element of the written-to tensor refers to a "
                               "single memory location. Please clone() the tensor before performing the operation.");
}

Dtype promoted_dtype(const std::vector<TensorView>& tensors) {
  Dtype dtype = tensors.empty() ? Dtype::kFloat32 : tensors.front().dtype;
  for (const TensorView& view : tensors) dtype = promote(dtype, view.dtype);
  return dtype;
}

TensorList::TensorList(StableIValue list) : list_(from_stack<StableListHandle>(list)) {
  const auto read = [this] {
    size_t size = 0;
    FASTCLIP_CALL(torch_list_size, list_, &size);
    views_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item = 0;
      FASTCLIP_CALL(torch_list_get_item, list_, i, &item);
      const OwnedTensor tensor(from_stack<AtenTensorHandle>(item));
      int32_t code = 0;
      FASTCLIP_CALL(aoti_torch_get_dtype, tensor.get(), &code);
      const int dtype = find_dtype(code);
      if (dtype < 0)
        throw std::runtime_error("fastclip: tensors[" + std::to_string(i) +
                                 "]: expected float32, float64, bfloat16 or float16, got dtype code " +
                                 std::to_string(code));
      void* data = nullptr;
      int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
      FASTCLIP_CALL(aoti_torch_get_data_ptr, tensor.get(), &data);
      FASTCLIP_CALL(aoti_torch_get_dim, tensor.get(), &dim);
      FASTCLIP_CALL(aoti_torch_get_sizes, tensor.get(), &sizes);
      FASTCLIP_CALL(aoti_torch_get_strides, tensor.get(), &strides);
      views_.push_back(make_view(data, static_cast<Dtype>(dtype), dim, sizes, strides));
    }
  };
  try {
    read();
  } catch (...) {
    torch_delete_list(list_);
    throw;
  }
}

TensorList::~TensorList() { torch_delete_list(list_); }

OwnedTensor new_scalar(double value, Dtype dtype) {
  AtenTensorHandle handle = nullptr;
  FASTCLIP_CALL(aoti_torch_empty_strided, 0, nullptr, nullptr, torch_dtypes()[static_cast<int>(dtype)],
                aoti_torch_device_type_cpu(), 0, &handle);
  OwnedTensor tensor(handle);
  void* data = nullptr;
  FASTCLIP_CALL(aoti_torch_get_data_ptr, handle, &data);
  switch (dtype) {
    case Dtype::kFloat64:
      *static_cast<double*>(data) = value;
      break;
    case Dtype::kFloat32:
      *static_cast<float*>(data) = static_cast<float>(value);
      break;
    case Dtype::kBFloat16:
      cpu::from_float(static_cast<float>(value), static_cast<cpu::bfloat16*>(data));
      break;
    case Dtype::kFloat16:
      cpu::from_float(static_cast<float>(value), static_cast<cpu::float16*>(data));
      break;
  }
  return tensor;
}

double read_scalar(const OwnedTensor& tensor, const char* argument) {
  int64_t dim = 0;
  int32_t code = 0, device = 0;
  FASTCLIP_CALL(aoti_torch_get_dim, tensor.get(), &dim);
  FASTCLIP_CALL(aoti_torch_get_dtype, tensor.get(), &code);
  FASTCLIP_CALL(aoti_torch_get_device_type, tensor.get(), &device);
  const int dtype = find_dtype(code);
  if (dim != 0 || dtype < 0 || device != aoti_torch_device_type_cpu())
    throw std::runtime_error(std::string("fastclip: ") + argument +
                             ": expected a 0-dim floating-point CPU tensor, got one of " + std::to_string(dim) +
                             " dimensions, dtype code " + std::to_string(code) + ", device type code " +
                             std::to_string(device));
  void* data = nullptr;
  FASTCLIP_CALL(aoti_torch_get_data_ptr, tensor.get(), &data);
  switch (static_cast<Dtype>(dtype)) {
    case Dtype::kFloat64:
      return *static_cast<double*>(data);
    case Dtype::kFloat32:
      return *static_cast<float*>(data);
    case Dtype::kBFloat16:
      return cpu::to_float(*static_cast<cpu::bfloat16*>(data));
    case Dtype::kFloat16:
      return cpu::to_float(*static_cast<cpu::float16*>(data));
  }
  return 0.0;
}

Dtype to_dtype(StableIValue code) {
  const int dtype = find_dtype(from_stack<int32_t>(code));
  if (dtype < 0)
    throw std::runtime_error("fastclip: dtype: expected float32, float64, bfloat16 or float16, got dtype code " +
                             std::to_string(from_stack<int32_t>(code)));
  return static_cast<Dtype>(dtype);
}

}  // namespace fastclip
