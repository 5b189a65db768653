#include "tensor_list.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
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

template <class T>
T from_stack(StableIValue value) {
  T out;
  std::memcpy(&out, &value, sizeof(out));
  return out;
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

// The memory of a tensor, from its first element to one past its last.
struct Span {
  const char *begin, *end;
};
Span span_of(const TensorView& tensor) {
  int64_t reach = tensor.numel;
  if (tensor.dims != nullptr) {
    reach = 1;
    for (const Dim& dim : *tensor.dims) reach += (dim.size - 1) * dim.stride;
  }
  return {tensor.data, tensor.data + reach * element_size(tensor.dtype)};
}

}  // namespace

void check_torch(AOTITorchError error, const char* function) {
  if (error != 0) throw std::runtime_error(std::string("fastclip: torch's ") + function + " failed");
}

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

void check_bound(const std::vector<TensorView>& tensors, double bound) {
  static constexpr double kLargest[kNumDtypes] = {0x1.fffffep127, std::numeric_limits<double>::max(), 0x1.fep127,
                                                  65504.0};
  for (size_t i = 0; i < tensors.size(); ++i)
    if (std::isfinite(bound) && std::fabs(bound) > kLargest[static_cast<int>(tensors[i].dtype)])
      throw std::runtime_error("fastclip: tensors[" + std::to_string(i) +
                               "]: value cannot be converted to its dtype without overflow: " + std::to_string(bound));
}

Dtype promoted_dtype(const std::vector<TensorView>& tensors) {
  Dtype dtype = tensors.empty() ? Dtype::kFloat32 : tensors.front().dtype;
  for (const TensorView& view : tensors) dtype = promote(dtype, view.dtype);
  return dtype;
}

TensorViews nonempty(const std::vector<TensorView>& tensors) {
  TensorViews out;
  out.reserve(tensors.size());
  for (const TensorView& tensor : tensors)
    if (tensor.numel > 0) out.push_back(&tensor);
  return out;
}

bool powers_may_leave_float64(const TensorViews& tensors, double norm_type) {
  return norm_kind(norm_type) == NormKind::kPow &&
         std::any_of(tensors.begin(), tensors.end(), [norm_type](const TensorView* tensor) {
           return !powers_stay_in_float64(tensor->dtype, norm_type);
         });
}

std::vector<TensorViews> write_rounds(const TensorViews& tensors) {
  struct Place {
    Span span;
    size_t index;
  };
  std::vector<Place> places;
  places.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) places.push_back({span_of(*tensors[i]), i});
  const auto before = [](const Place& a, const Place& b) { return a.span.begin < b.span.begin; };
  if (!std::is_sorted(places.begin(), places.end(), before)) std::sort(places.begin(), places.end(), before);
  // Tensors whose spans are connected go one after the other; the first of them, like all others, in the first round.
  std::vector<size_t> round(tensors.size(), 0), cluster;
  size_t rounds = 1;
  for (size_t i = 0; i < places.size();) {
    const char* end = places[i].span.end;
    cluster = {places[i].index};
    for (++i; i < places.size() && places[i].span.begin < end; ++i) {
      end = std::max(end, places[i].span.end);
      cluster.push_back(places[i].index);
    }
    if (cluster.size() == 1) continue;
    std::sort(cluster.begin(), cluster.end());
    for (size_t r = 0; r < cluster.size(); ++r) round[cluster[r]] = r;
    rounds = std::max(rounds, cluster.size());
  }
  std::vector<TensorViews> out(rounds);
  out[0].reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) out[round[i]].push_back(tensors[i]);
  return out;
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
      const Device device = device_of(tensor);
      if (i == 0) device_ = device;
      if (!same(device, device_))
        throw std::runtime_error("fastclip: tensors[" + std::to_string(i) + "]: expected the device of tensors[0], " +
                                 to_string(device_) + ", got " + to_string(device));
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

OwnedTensor new_tensor(int64_t size, Dtype dtype, Device device) {
  const int64_t stride = 1;
  AtenTensorHandle handle = nullptr;
  FASTCLIP_CALL(aoti_torch_empty_strided, size == kScalar ? 0 : 1, &size, &stride,
                torch_dtypes()[static_cast<int>(dtype)], device.type, device.index, &handle);
  return OwnedTensor(handle);
}

void* data_of(const OwnedTensor& tensor) {
  void* data = nullptr;
  FASTCLIP_CALL(aoti_torch_get_data_ptr, tensor.get(), &data);
  return data;
}

Scalar view_scalar(const OwnedTensor& tensor, Device device, const char* argument) {
  int64_t dim = 0;
  int32_t code = 0;
  FASTCLIP_CALL(aoti_torch_get_dim, tensor.get(), &dim);
  FASTCLIP_CALL(aoti_torch_get_dtype, tensor.get(), &code);
  const int dtype = find_dtype(code);
  const Device found = device_of(tensor);
  if (dim != 0 || dtype < 0 || !same(found, device))
    throw std::runtime_error(std::string("fastclip: ") + argument + ": expected a 0-dim floating-point tensor on " +
                             to_string(device) + ", got one of " + std::to_string(dim) + " dimensions, dtype code " +
                             std::to_string(code) + ", on " + to_string(found));
  return {data_of(tensor), static_cast<Dtype>(dtype)};
}

Dtype to_dtype(StableIValue code) {
  const int dtype = find_dtype(from_stack<int32_t>(code));
  if (dtype < 0)
    throw std::runtime_error("fastclip: dtype: expected float32, float64, bfloat16 or float16, got dtype code " +
                             std::to_string(from_stack<int32_t>(code)));
  return static_cast<Dtype>(dtype);
}

}  // namespace fastclip
