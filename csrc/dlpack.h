// torch.Tensor's DLPack C exchange table (DLPack 1.x, torch >= 2.10): a Python tensor as its pointer, sizes and
// strides.
#pragma once

#include <cstdint>

#include "clip.h"
#include "python_abi.h"

namespace fastclip::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct DType {
  uint8_t code, bits;
  uint16_t lanes;
};

// The parts of DLPack's structures that are read here.
struct Tensor {
  void* memory;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  DType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  void* data() const { return memory == nullptr ? nullptr : static_cast<char*>(memory) + byte_offset; }
};

struct Exchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*from_object)(PyObject*, Tensor*);  // borrows; 0, or -1 and a Python error
  void* current_stream;
};

// The table of the running torch; null until a library is told of it.
inline const Exchange* exchange = nullptr;

// Our dtype; false where there is none.
inline bool to_dtype(DType type, Dtype* dtype) {
  if (type.lanes != 1) return false;
  if (type.code == kBfloat && type.bits == 16)
    *dtype = Dtype::kBFloat16;
  else if (type.code == kFloat && type.bits == 32)
    *dtype = Dtype::kFloat32;
  else if (type.code == kFloat && type.bits == 64)
    *dtype = Dtype::kFloat64;
  else if (type.code == kFloat && type.bits == 16)
    *dtype = Dtype::kFloat16;
  else
    return false;
  return true;
}

}  // namespace fastclip::dlpack
