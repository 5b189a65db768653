// The short way in for plain tensors of one device: one pass over the Python objects of a list, instead of several
// through the dispatcher. Tensors are read through the DLPack C exchange table of torch.Tensor (DLPack 1.x, torch
// >= 2.10), Python through functions of its stable ABI, whose addresses fastclip/_plan.py hands over; so nothing here
// links to Python.
#include "plan.h"

#include <exception>
#include <memory>
#include <vector>

#include "clip.h"
#include "cpu/float_mode.h"
#include "cpu/passes.h"
#include "export.h"
#include "tensor_list.h"

namespace {

using namespace fastclip;

// The head of every object, which the stable ABI fixes for interpreters that have a GIL.
struct PyObject {
  intptr_t references;
  PyObject* type;
};

// Filled by fastclip/_plan.py, in this order.
struct Python {
  intptr_t (*list_size)(PyObject*);
  PyObject* (*list_get_item)(PyObject*, intptr_t);  // borrowed
  int (*list_append)(PyObject*, PyObject*);
  PyObject* (*object_get_attr)(PyObject*, PyObject*);
  void (*dec_ref)(PyObject*);
  void (*err_clear)();
  PyObject *tensor, *parameter, *none, *grad, *version;
};

// The parts of DLPack's structures that are read here.
struct DlTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*from_object)(PyObject*, DlTensor*);  // borrows; 0, or -1 and a Python error
  void* current_stream;
};

Python python;
const DlExchange* exchange = nullptr;

struct DecRef {
  void operator()(PyObject* object) const { python.dec_ref(object); }
};
using Owned = std::unique_ptr<PyObject, DecRef>;

bool is_plain(const PyObject* object) { return object->type == python.tensor || object->type == python.parameter; }

// Appends the view of a tensor; false where the kernels cannot take it. DLPack does not show the negative bit, under
// which memory holds -x: norms, scaling and symmetric bounds do not mind.
bool add(PyObject* tensor, bool gpus, Plan* plan) {
  constexpr int kCpu = 1, kCuda = 2, kPinned = 3, kFloat = 2, kBfloat = 4;
  DlTensor dl;
  if (exchange->from_object(tensor, &dl) != 0) return false;
  const bool on_gpu = gpus && dl.device.type == kCuda;
  if ((!on_gpu && dl.device.type != kCpu && dl.device.type != kPinned) || dl.dtype.lanes != 1) return false;
  const int32_t gpu = on_gpu ? dl.device.id : kNoGpu;
  if (plan->tensors.empty()) plan->gpu = gpu;
  if (plan->gpu != gpu) return false;
  Dtype dtype;
  if (dl.dtype.code == kFloat && dl.dtype.bits == 32)
    dtype = Dtype::kFloat32;
  else if (dl.dtype.code == kFloat && dl.dtype.bits == 64)
    dtype = Dtype::kFloat64;
  else if (dl.dtype.code == kFloat && dl.dtype.bits == 16)
    dtype = Dtype::kFloat16;
  else if (dl.dtype.code == kBfloat && dl.dtype.bits == 16)
    dtype = Dtype::kBFloat16;
  else
    return false;
  char* const data = static_cast<char*>(dl.data) + dl.byte_offset;
  plan->tensors.push_back(make_view(data, dtype, dl.ndim, dl.shape, dl.strides));
  return true;
}

bool read(PyObject* tensors, bool parameters, PyObject* grads, bool gpus, Plan* plan) {
  const intptr_t size = python.list_size(tensors);
  plan->tensors.reserve(static_cast<size_t>(size > 0 ? size : 0));
  for (intptr_t i = 0; i < size; ++i) {
    PyObject* tensor = python.list_get_item(tensors, i);
    if (tensor == nullptr || !is_plain(tensor)) return false;
    if (!parameters) {
      if (!add(tensor, gpus, plan)) return false;
      continue;
    }
    const Owned grad(python.object_get_attr(tensor, python.grad));
    if (grad == nullptr) return false;
    if (grad.get() == python.none) continue;
    // An inference tensor has no version, and only inference mode may write it.
    if (!is_plain(grad.get()) || Owned(python.object_get_attr(grad.get(), python.version)) == nullptr) return false;
    if (!add(grad.get(), gpus, plan) || python.list_append(grads, grad.get()) != 0) return false;
  }
  return size >= 0;
}

// An exception must not reach ctypes: false, and the caller takes the long way, which raises it again.
template <class Body>
bool caught(const Body& body) {
  try {
    body();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace

// Returns whether this torch's exchange table is one that we know.
FASTCLIP_EXPORT bool fastclip_plan_init(const Python* functions, const void* dlpack_exchange) {
  python = *functions;
  exchange = static_cast<const DlExchange*>(dlpack_exchange);
  return exchange->version.major == 1;
}

// With the GIL. The views of the tensors of a list, or of the gradients of its parameters, which are appended to grads;
// null where one of them is not a plain tensor that the kernels take. `gpus` tells whether there are CUDA kernels, too.
FASTCLIP_EXPORT Plan* fastclip_plan_new(PyObject* tensors, bool parameters, PyObject* grads, bool gpus) {
  std::unique_ptr<Plan> plan;
  bool done = false;
  caught([&] {
    plan = std::make_unique<Plan>();
    done = read(tensors, parameters, grads, gpus, plan.get());
  });
  if (done) return plan.release();
  python.err_clear();
  return nullptr;
}

FASTCLIP_EXPORT void fastclip_plan_delete(Plan* plan) { delete plan; }

// Without the GIL, from here on; the caller keeps the tensors alive. The last three are for what the CPU addresses.
FASTCLIP_EXPORT int fastclip_plan_gpu(const Plan* plan) { return plan->gpu; }

FASTCLIP_EXPORT int fastclip_plan_promoted_dtype(const Plan* plan) {
  return static_cast<int>(promoted_dtype(plan->tensors));
}

FASTCLIP_EXPORT bool fastclip_plan_is_writable(const Plan* plan, double bound) {
  return caught([&] {
    check_writable(plan->tensors);
    check_bound(plan->tensors, bound);
  });
}

FASTCLIP_EXPORT bool fastclip_plan_total_norm(const Plan* plan, double norm_type, double* result) {
  return caught([&] { *result = cpu::total_norm(plan->tensors, norm_type); });
}

FASTCLIP_EXPORT bool fastclip_plan_clip(const Plan* plan, double total_norm, double max_norm) {
  return caught([&] {
    const cpu::DefaultFloatMode mode;
    cpu::scale(plan->tensors, clip_coef(total_norm, max_norm));
  });
}

FASTCLIP_EXPORT bool fastclip_plan_clamp(const Plan* plan, double clip_value) {
  return caught([&] { cpu::clamp(plan->tensors, -clip_value, clip_value); });
}
