// The two ways into an engine, written once over its table: the boxed kernels of torch.ops.fastclip, and the builtins
// that fastclip/gradients/plain.py calls with tensors that reader.cpp has read.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "abi.h"
#include "builtins.h"
#include "clip.h"
#include "dlpack.h"
#include "engine.h"
#include "export.h"
#include "op_arguments.h"

namespace fastclip {

inline Nonfinite to_nonfinite(int64_t code) {
  if (code < 0 || code > static_cast<int64_t>(Nonfinite::kSanitize))
    throw std::runtime_error("fastclip: nonfinite: expected 0 (propagate), 1 (zero) or 2 (sanitize), got " +
                             std::to_string(code));
  return static_cast<Nonfinite>(code);
}

inline Number checked_found_inf(Number number) {
  if (number.dtype != Dtype::kFloat32) throw std::runtime_error("fastclip: found_inf: expected a float32 tensor");
  return number;
}

template <const Engine& kEngine>
struct Ops {
  using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

  // norm_partial(Tensor[] tensors, float norm_type) -> Tensor
  static void norm_partial(StableIValue* stack, uint64_t, uint64_t) {
    const TensorList list(stack[0]);
    OwnedTensor partial = new_tensor(kScalar, Dtype::kFloat64, list.tensors().device);
    kEngine.norm_partial(list.tensors(), from_stack<double>(stack[1]), {data_of(partial), Dtype::kFloat64});
    leave(stack, std::move(partial));
  }

  // tensor_norms(Tensor[] tensors, float norm_type) -> Tensor
  static void tensor_norms(StableIValue* stack, uint64_t, uint64_t) {
    const TensorList list(stack[0]);
    const int64_t size = list.tensors().count;
    OwnedTensor norms = new_tensor(size, Dtype::kFloat64, list.tensors().device);
    kEngine.norms(list.tensors(), from_stack<double>(stack[1]), static_cast<double*>(data_of(norms)));
    leave(stack, std::move(norms));
  }

  // tensor_stats(Tensor[] tensors) -> Tensor
  static void tensor_stats(StableIValue* stack, uint64_t, uint64_t) {
    const TensorList list(stack[0]);
    const int64_t size = list.tensors().count;
    OwnedTensor table = new_table(size, 4, Dtype::kFloat64, list.tensors().device);
    OwnedTensor partial = new_tensor(kScalar, Dtype::kFloat64, list.tensors().device);
    kEngine.stats(list.tensors(), static_cast<double*>(data_of(table)), {data_of(partial), Dtype::kFloat64});
    leave(stack, std::move(table));
  }

  // scale_each_(Tensor(a!)[] tensors, Tensor coefs) -> ()
  static void scale_each_(StableIValue* stack, uint64_t, uint64_t) {
    const OwnedTensor coefs = to_tensor(stack[1]);
    const TensorList list(stack[0]);
    list.check_writable();
    const int64_t size = list.tensors().count;
    kEngine.scale_each(list.tensors(), view_numbers(coefs, size, list.tensors().device, "coefs"));
  }

  // scale_(Tensor(a!)[] tensors, Tensor clip_coef, *, bool zero=False) -> ()
  static void scale_(StableIValue* stack, uint64_t, uint64_t) {
    const OwnedTensor coef = to_tensor(stack[1]);
    const TensorList list(stack[0]);
    list.check_writable();
    kEngine.scale(list.tensors(), view_number(coef, list.tensors().device, "clip_coef"), from_stack<bool>(stack[2]));
  }

  // sanitize_(Tensor(a!)[] tensors) -> ()
  static void sanitize_(StableIValue* stack, uint64_t, uint64_t) {
    const TensorList list(stack[0]);
    list.check_writable();
    kEngine.sanitize(list.tensors());
  }

  // clamp_(Tensor(a!)[] tensors, float min, float max) -> ()
  static void clamp_(StableIValue* stack, uint64_t, uint64_t) {
    const TensorList list(stack[0]);
    const double low = from_stack<double>(stack[1]), high = from_stack<double>(stack[2]);
    list.check_writable();
    check_bound(list.tensors().views, low);
    check_bound(list.tensors().views, high);
    kEngine.clamp(list.tensors(), low, high);
  }

  // clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type, int nonfinite=0, Tensor(b!)? found_inf=None,
  //                 Tensor? inv_scale=None, *, ScalarType? dtype=None) -> Tensor
  static void clip_grad_norm_(StableIValue* stack, uint64_t, uint64_t) {
    const std::unique_ptr<StableIValue> asked = to_optional(stack[6]);
    const OwnedTensor found_inf = to_optional_tensor(stack[4]), inv_scale = to_optional_tensor(stack[5]);
    const TensorList list(stack[0]);
    const Device device = list.tensors().device;
    Clip clip{from_stack<double>(stack[1]),
              from_stack<double>(stack[2]),
              to_nonfinite(from_stack<int64_t>(stack[3])),
              {},
              {}};
    if (found_inf != nullptr) clip.found_inf = checked_found_inf(view_number(found_inf, device, "found_inf"));
    if (inv_scale != nullptr) clip.inv_scale = view_number(inv_scale, device, "inv_scale");
    list.check_writable();
    const Dtype dtype = asked != nullptr ? to_dtype(*asked) : promoted_dtype(list.tensors().views);
    OwnedTensor norm = new_tensor(kScalar, dtype, device);
    kEngine.clip_grad_norm(list.tensors(), clip, {data_of(norm), dtype});
    leave(stack, std::move(norm));
  }

  // Registers the ops of a namespace, for as long as the process lives.
  static void enroll(const char* ns, const char* key) {
    TorchLibraryHandle library = nullptr;
    if (aoti_torch_library_init_impl(ns, key, __FILE__, __LINE__, &library) != 0 ||
        torch_library_impl(library, "norm_partial", norm_partial, kTorchAbi) != 0 ||
        torch_library_impl(library, "tensor_norms", tensor_norms, kTorchAbi) != 0 ||
        torch_library_impl(library, "tensor_stats", tensor_stats, kTorchAbi) != 0 ||
        torch_library_impl(library, "scale_", scale_, kTorchAbi) != 0 ||
        torch_library_impl(library, "scale_each_", scale_each_, kTorchAbi) != 0 ||
        torch_library_impl(library, "sanitize_", sanitize_, kTorchAbi) != 0 ||
        torch_library_impl(library, "clamp_", clamp_, kTorchAbi) != 0 ||
        torch_library_impl(library, "clip_grad_norm_", clip_grad_norm_, kTorchAbi) != 0)
      throw std::runtime_error("fastclip: registration with torch failed");
  }
};

template <const Engine& kEngine>
struct Builtins {
  // norm_partial(tensors, norm_type, partial): *partial = the norm before its root.
  static python::Owned norm_partial(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    const double norm_type = arguments.to_double(1);
    const Number partial = number_of(arguments[2]);
    return run(tensors, [&] { kEngine.norm_partial(tensors, norm_type, partial); });
  }

  // total_norm(tensors, norm_type, norm)
  static python::Owned total_norm(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    const double norm_type = arguments.to_double(1);
    const Number norm = number_of(arguments[2]);
    return run(tensors, [&] { kEngine.total_norm(tensors, norm_type, norm); });
  }

  // norms(tensors, norm_type, norms): norms[i] = the norm of tensor, or unit, i.
  static python::Owned norms(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_each(arguments[0]);
    const double norm_type = arguments.to_double(1);
    double* const norms = numbers_of(arguments[2], tensors.count);
    return run(tensors, [&] { kEngine.norms(tensors, norm_type, norms); });
  }

  // stats(tensors, table, partial): table[4 i] = sum |x|^2, max |x|, non-finite elements and zeros of tensor i, in a
  // row; *partial = norm_partial of order 2.
  static python::Owned stats(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    double* const table = numbers_of(arguments[1], 4 * tensors.count);
    const Number partial = number_of(arguments[2]);
    return run(tensors, [&] { kEngine.stats(tensors, table, partial); });
  }

  // scale_each_(tensors, coefs)
  static python::Owned scale_each_(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_each(arguments[0]);
    const double* const coefs = numbers_of(arguments[1], tensors.count);
    return run(tensors, [&] { kEngine.scale_each(tensors, coefs); });
  }

  // scale_(tensors, clip_coef, zero)
  static python::Owned scale_(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    const Number coef = number_of(arguments[1]);
    const bool zero = arguments.to_bool(2);
    return run(tensors, [&] { kEngine.scale(tensors, coef, zero); });
  }

  // sanitize_(tensors)
  static python::Owned sanitize_(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    return run(tensors, [&] { kEngine.sanitize(tensors); });
  }

  // clip_with_norm_(tensors, max_norm, norm)
  static python::Owned clip_with_norm_(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    const double max_norm = arguments.to_double(1);
    const Number norm = number_of(arguments[2]);
    return run(tensors, [&] { kEngine.clip_with_norm(tensors, max_norm, norm); });
  }

  // clamp_(tensors, min, max)
  static python::Owned clamp_(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    const double low = arguments.to_double(1), high = arguments.to_double(2);
    check_bound(tensors.views, low);
    check_bound(tensors.views, high);
    return run(tensors, [&] { kEngine.clamp(tensors, low, high); });
  }

  // clip_grad_norm_(tensors, norm, *clip)
  static python::Owned clip_grad_norm_(const python::Arguments& arguments) {
    const Tensors& tensors = python::to_tensors(arguments[0]);
    const Number norm = number_of(arguments[1]);
    Clip clip{arguments.to_double(2), arguments.to_double(3), to_nonfinite(arguments.to_index(4)), {}, {}};
    if (arguments[5] != python::none()) clip.found_inf = checked_found_inf(number_of(arguments[5]));
    if (arguments[6] != python::none()) clip.inv_scale = number_of(arguments[6]);
    return run(tensors, [&] { kEngine.clip_grad_norm(tensors, clip, norm); });
  }

  // So many float64 numbers in a row, in the memory of the engine's device.
  static double* numbers_of(PyObject* row, int64_t size) {
    dlpack::Tensor dl;
    python::check(dlpack::exchange->from_object(row, &dl));
    Dtype dtype{};
    if (dl.ndim != 1 || dl.shape[0] != size || (size > 1 && dl.strides[0] != 1) || (size > 0 && dl.data() == nullptr) ||
        !dlpack::to_dtype(dl.dtype, &dtype) || dtype != Dtype::kFloat64)
      throw std::runtime_error("fastclip: expected a contiguous float64 tensor of " + std::to_string(size) +
                               " elements that has memory");
    return static_cast<double*>(dl.data());
  }

  template <class Pass>
  static python::Owned run(const Tensors& tensors, const Pass& pass) {
    if (tensors.bytes < kShort) {
      pass();
    } else {
      const python::WithoutGil released;
      pass();
    }
    return python::retain(python::none());
  }

  static python::Owned all() {
    static PyMethodDef methods[] = {
        python::method<norm_partial>("norm_partial"),
        python::method<total_norm>("total_norm"),
        python::method<norms>("norms"),
        python::method<stats>("stats"),
        python::method<scale_>("scale_"),
        python::method<scale_each_>("scale_each_"),
        python::method<sanitize_>("sanitize_"),
        python::method<clip_with_norm_>("clip_with_norm_"),
        python::method<clamp_>("clamp_"),
        python::method<clip_grad_norm_>("clip_grad_norm_"),
    };
    return python::functions(methods);
  }

 private:
  // A 0-dim tensor of the engine's device, whose memory is read or written.
  static Number number_of(PyObject* tensor) {
    dlpack::Tensor dl;
    python::check(dlpack::exchange->from_object(tensor, &dl));
    Number number{dl.data(), Dtype::kFloat64};
    if (dl.ndim != 0 || number.data == nullptr || !dlpack::to_dtype(dl.dtype, &number.dtype))
      throw std::runtime_error("fastclip: expected a 0-dim floating-point tensor that has memory");
    return number;
  }

  // Taking the GIL back from a busy thread costs more than to pass over this many bytes.
  static constexpr int64_t kShort = 1 << 20;
};

}  // namespace fastclip
