#include "op_arguments.h"

#include <stdexcept>
#include <string>

namespace fastclip {
namespace {

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

Device device_of(const OwnedTensor& tensor) {
  Device device{};
  FASTCLIP_CALL(aoti_torch_get_device_type, tensor.get(), &device.type);
  FASTCLIP_CALL(aoti_torch_get_device_index, tensor.get(), &device.index);
  return device;
}

bool same(Device a, Device b) { return a.type == b.type && a.index == b.index; }

std::string to_string(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device.index);
  return "device type code " + std::to_string(device.type);
}

[[noreturn]] void refuse(size_t i, const std::string& reason) {
  throw std::runtime_error("fastclip: tensors[" + std::to_string(i) + "]: " + reason);
}

// The handles of a list, which nobody else frees: those that were not taken go with it.
struct Items {
  const StableListHandle list;
  size_t next = 0, size = 0;

  explicit Items(StableListHandle handle) : list(handle) {}
  ~Items() {
    while (next < size) {
      StableIValue item = 0;
      if (torch_list_get_item(list, next++, &item) == 0) to_tensor(item);
    }
    torch_delete_list(list);
  }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;

  void count() {
    size_t found = 0;
    FASTCLIP_CALL(torch_list_size, list, &found);
    size = found;
  }
  OwnedTensor take() {
    StableIValue item = 0;
    FASTCLIP_CALL(torch_list_get_item, list, next++, &item);
    return to_tensor(item);
  }
};

TensorView view_of(const OwnedTensor& tensor, size_t i) {
  int32_t code = 0;
  FASTCLIP_CALL(aoti_torch_get_dtype, tensor.get(), &code);
  const int dtype = find_dtype(code);
  if (dtype < 0) refuse(i, "expected float32, float64, bfloat16 or float16, got dtype code " + std::to_string(code));
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  FASTCLIP_CALL(aoti_torch_get_dim, tensor.get(), &dim);
  FASTCLIP_CALL(aoti_torch_get_sizes, tensor.get(), &sizes);
  FASTCLIP_CALL(aoti_torch_get_strides, tensor.get(), &strides);
  TensorView view = make_view(data_of(tensor), static_cast<Dtype>(dtype), dim, sizes, strides);
  if (lacks_memory(view)) refuse(i, "has " + std::to_string(view.numel) + " elements and no memory for them");
  return view;
}

}  // namespace

void check_torch(AOTITorchError error, const char* function) {
  if (error != 0) throw std::runtime_error(std::string("fastclip: torch's ") + function + " failed");
}

OwnedTensor new_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, Dtype dtype, Device device) {
  AtenTensorHandle handle = nullptr;
  FASTCLIP_CALL(aoti_torch_empty_strided, dim, sizes, strides, torch_dtypes()[static_cast<int>(dtype)], device.type,
                device.index, &handle);
  return OwnedTensor(handle);
}

OwnedTensor new_tensor(int64_t size, Dtype dtype, Device device) {
  const int64_t stride = 1;
  return new_strided(size == kScalar ? 0 : 1, &size, &stride, dtype, device);
}

OwnedTensor new_table(int64_t rows, int64_t columns, Dtype dtype, Device device) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return new_strided(2, sizes, strides, dtype, device);
}

void* data_of(const OwnedTensor& tensor) {
  void* data = nullptr;
  FASTCLIP_CALL(aoti_torch_get_data_ptr, tensor.get(), &data);
  return data;
}

Number view_number(const OwnedTensor& tensor, Device device, const char* argument) {
  int64_t dim = 0;
  int32_t code = 0;
  FASTCLIP_CALL(aoti_torch_get_dim, tensor.get(), &dim);
  FASTCLIP_CALL(aoti_torch_get_dtype, tensor.get(), &code);
  const int dtype = find_dtype(code);
  const Device found = device_of(tensor);
  void* const data = data_of(tensor);
  if (dim != 0 || dtype < 0 || data == nullptr || !same(found, device))
    throw std::runtime_error(std::string("fastclip: ") + argument + ": expected a 0-dim floating-point tensor on " +
                             to_string(device) + ", got one of " + std::to_string(dim) + " dimensions, dtype code " +
                             std::to_string(code) + ", on " + to_string(found) +
                             (data == nullptr ? ", without memory" : ""));
  return {data, static_cast<Dtype>(dtype)};
}

const double* view_numbers(const OwnedTensor& tensor, int64_t size, Device device, const char* argument) {
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t code = 0;
  FASTCLIP_CALL(aoti_torch_get_dim, tensor.get(), &dim);
  FASTCLIP_CALL(aoti_torch_get_sizes, tensor.get(), &sizes);
  FASTCLIP_CALL(aoti_torch_get_strides, tensor.get(), &strides);
  FASTCLIP_CALL(aoti_torch_get_dtype, tensor.get(), &code);
  const Device found = device_of(tensor);
  const bool is_row = dim == 1 && sizes[0] == size && (size <= 1 || strides[0] == 1);
  void* const data = data_of(tensor);
  if (!is_row || find_dtype(code) != static_cast<int>(Dtype::kFloat64) || (size > 0 && data == nullptr) ||
      !same(found, device))
    throw std::runtime_error(std::string("fastclip: ") + argument + ": expected a contiguous float64 tensor of " +
                             std::to_string(size) + " elements on " + to_string(device) + ", got one of " +
                             std::to_string(dim) + " dimensions" +
                             (dim == 1 ? ", " + std::to_string(sizes[0]) + " elements" : "") + ", dtype code " +
                             std::to_string(code) + ", on " + to_string(found));
  return static_cast<const double*>(data);
}

Dtype to_dtype(StableIValue code) {
  const int dtype = find_dtype(from_stack<int32_t>(code));
  if (dtype < 0)
    throw std::runtime_error("fastclip: dtype: expected float32, float64, bfloat16 or float16, got dtype code " +
                             std::to_string(from_stack<int32_t>(code)));
  return static_cast<Dtype>(dtype);
}

TensorList::TensorList(StableIValue value) {
  Items items(from_stack<StableListHandle>(value));
  items.count();
  owned_.reserve(items.size);
  tensors_.views.reserve(items.size);
  while (items.next < items.size) owned_.push_back(items.take());
  for (size_t i = 0; i < owned_.size(); ++i) {
    const Device device = device_of(owned_[i]);
    if (i == 0) tensors_.device = device;
    if (!same(device, tensors_.device))
      refuse(i, "expected the device of tensors[0], " + to_string(tensors_.device) + ", got " + to_string(device));
    tensors_.add(view_of(owned_[i], i));
  }
}

void TensorList::check_writable() const {
  for (size_t i = 0; i < tensors_.views.size(); ++i)
    if (may_overlap_itself(tensors_.views[i]))
      refuse(i,
             "unsupported operation: more than one element of the written-to tensor refers to a single memory "
             "location. Please clone() the tensor before performing the operation.");
}

}  // namespace fastclip
