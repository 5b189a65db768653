// The part of torch that csrc/ calls, faked: tensors, lists, threads and a registry of kernels. It lets the kernels run
// under the sanitizers; it proves nothing about torch itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/abi.h"

namespace fake {

enum DtypeCode : int32_t { kInt64 = 4, kFloat16 = 5, kFloat32 = 6, kFloat64 = 7, kBFloat16 = 15 };

struct Tensor {
  std::shared_ptr<std::vector<char>> storage;  // of exactly the bytes it needs: the sanitizer sees one too many
  char* data = nullptr;
  int32_t dtype = kFloat32;
  int32_t device = 0;
  std::vector<int64_t> sizes = {}, strides = {};  // in elements

  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    return n;
  }
};

inline int64_t element_size(int32_t dtype) {
  return dtype == kFloat64 || dtype == kInt64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

inline std::map<std::string, void (*)(StableIValue*, uint64_t, uint64_t)> kernels;
inline std::atomic<int64_t> live_handles{0};
inline int threads = 1;
inline int calls_until_failure = -1;        // below zero: no call fails
inline int allocations_until_failure = -1;  // of what is not torch's; the program's operator new counts them

inline AOTITorchError status() {
  if (calls_until_failure < 0) return 0;
  return calls_until_failure-- == 0 ? 1 : 0;
}

// What torch itself allocates is not counted.
class Uncounted {
 public:
  Uncounted() { std::swap(was_, allocations_until_failure); }
  ~Uncounted() { std::swap(was_, allocations_until_failure); }

 private:
  int was_ = -1;
};

}  // namespace fake

struct AtenTensorOpaque {
  fake::Tensor tensor;
};
// As in torch, a list holds handles and owns none: reading an item hands its handle over, deleting the list deletes no
// tensor.
struct StableListOpaque {
  std::vector<AtenTensorHandle> items;
  std::vector<AtenTensorHandle> kept;  // what a failing call did not hand over: torch's calls here cannot fail
};
struct TorchLibraryOpaque {};

namespace fake {

template <class Opaque>
StableIValue new_handle(Opaque* handle) {
  ++live_handles;
  StableIValue value = 0;
  std::memcpy(&value, &handle, sizeof(handle));
  return value;
}
inline StableIValue handle_of(Tensor tensor) { return new_handle(new AtenTensorOpaque{std::move(tensor)}); }
inline StableIValue handle_of(std::vector<Tensor> tensors) {
  auto* list = new StableListOpaque;
  for (Tensor& tensor : tensors) {
    list->items.push_back(new AtenTensorOpaque{std::move(tensor)});
    ++live_handles;
  }
  return new_handle(list);
}

}  // namespace fake

extern "C" {

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle* out) {
  static TorchLibraryOpaque library;
  *out = &library;
  return fake::status();
}
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t) {
  fake::kernels[name] = fn;
  return fake::status();
}

AOTITorchError torch_list_size(StableListHandle list, size_t* size) {
  const fake::Uncounted uncounted;
  *size = list->items.size();
  const AOTITorchError error = fake::status();
  if (error != 0) list->kept = list->items;
  return error;
}
AOTITorchError torch_list_get_item(StableListHandle list, size_t index, StableIValue* element) {
  const fake::Uncounted uncounted;
  const AtenTensorHandle item = list->items.at(index);
  if (const AOTITorchError error = fake::status()) {
    list->kept.push_back(item);
    return error;
  }
  *element = 0;
  std::memcpy(element, &item, sizeof(item));
  return 0;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  fake::live_handles -= 1 + static_cast<int64_t>(list->kept.size());
  for (const AtenTensorHandle item : list->kept) delete item;
  delete list;
  return 0;
}

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle handle) {
  delete handle;
  --fake::live_handles;
  return 0;
}
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle handle, void** out) {
  *out = handle->tensor.data;
  return fake::status();
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle handle, int64_t* out) {
  *out = static_cast<int64_t>(handle->tensor.sizes.size());
  return fake::status();
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle handle, int64_t** out) {
  *out = handle->tensor.sizes.data();
  return fake::status();
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle handle, int64_t** out) {
  *out = handle->tensor.strides.data();
  return fake::status();
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle handle, int32_t* out) {
  *out = handle->tensor.dtype;
  return fake::status();
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle handle, int32_t* out) {
  *out = handle->tensor.device;
  return fake::status();
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) {
  *out = 0;
  return fake::status();
}
AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t dtype, int32_t, int32_t,
                                        AtenTensorHandle* out) {
  const fake::Uncounted uncounted;
  if (const AOTITorchError error = fake::status()) return error;
  const auto storage = std::make_shared<std::vector<char>>(fake::element_size(dtype));
  const StableIValue value = fake::handle_of({storage, storage->data(), dtype});
  std::memcpy(out, &value, sizeof(*out));
  return 0;
}

int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_dtype_float32() { return fake::kFloat32; }
int32_t aoti_torch_dtype_float64() { return fake::kFloat64; }
int32_t aoti_torch_dtype_bfloat16() { return fake::kBFloat16; }
int32_t aoti_torch_dtype_float16() { return fake::kFloat16; }

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*func)(int64_t, int64_t, void*),
                                  void* context) {
  const fake::Uncounted uncounted;
  if (const AOTITorchError error = fake::status()) return error;
  const int64_t length = end - begin;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(fake::threads, (length + grain - 1) / grain));
  std::vector<std::thread> workers;
  for (int64_t t = 0; t < count; ++t)
    workers.emplace_back(func, begin + length * t / count, begin + length * (t + 1) / count, context);
  for (std::thread& worker : workers) worker.join();
  return 0;
}
}
