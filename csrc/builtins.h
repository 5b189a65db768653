// Functions that Python calls without a detour: builtins made of Python's stable ABI, which own what they are given
// back and turn every C++ exception into Python's.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "dlpack.h"
#include "python_abi.h"
#include "views.h"

namespace fastclip::python {

struct DecRef {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Owned = std::unique_ptr<PyObject, DecRef>;

// A reference of our own.
inline Owned retain(PyObject* object) {
  Py_IncRef(object);
  return Owned(object);
}
inline PyObject* none() { return &_Py_NoneStruct; }

// A Python error is set: whoever catches this returns null.
struct Raised {};

inline Owned checked(PyObject* object) {
  if (object == nullptr) throw Raised();
  return Owned(object);
}
inline void check(int status) {
  if (status < 0) throw Raised();
}

// What a builtin was given.
struct Arguments {
  PyObject* const* values;
  intptr_t count;

  PyObject* operator[](intptr_t i) const {
    if (i < count) return values[i];
    PyErr_SetString(PyExc_TypeError, ("fastclip: argument " + std::to_string(i) + " is missing").c_str());
    throw Raised();
  }
  double to_double(intptr_t i) const {
    const double value = PyFloat_AsDouble((*this)[i]);
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw Raised();
    return value;
  }
  int64_t to_index(intptr_t i) const {
    const int64_t value = PyLong_AsLongLong((*this)[i]);
    if (value == -1 && PyErr_Occurred() != nullptr) throw Raised();
    return value;
  }
  bool to_bool(intptr_t i) const {
    const int value = PyObject_IsTrue((*this)[i]);
    check(value);
    return value != 0;
  }
};

using Function = Owned (*)(const Arguments&);

// What the body returns, for Python: or null and its error.
template <class Body>
PyObject* given(const Body& body) {
  try {
    return body().release();
  } catch (const Raised&) {
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError, "fastclip: out of memory");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The function that Python calls for ours.
template <Function kFunction>
PyObject* call(PyObject*, PyObject* const* values, intptr_t count) {
  return given([&] { return kFunction({values, count}); });
}

template <Function kFunction>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<void (*)()>(call<kFunction>), METH_FASTCALL, nullptr};
}

// A dict with these builtins, too; the methods have to stay where they are.
template <size_t kCount>
Owned functions(PyMethodDef (&methods)[kCount], Owned dict = checked(PyDict_New())) {
  for (PyMethodDef& method : methods) {
    const Owned function = checked(PyCFunction_NewEx(&method, nullptr, nullptr));
    check(PyDict_SetItemString(dict.get(), method.name, function.get()));
  }
  return dict;
}

// While one lives, other Python threads run.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// While one lives, no collection runs, whose finalizers may be anybody's code.
class WithoutCollection {
 public:
  WithoutCollection() : was_enabled_(PyGC_Disable() != 0) {}
  ~WithoutCollection() {
    if (was_enabled_) PyGC_Enable();
  }
  WithoutCollection(const WithoutCollection&) = delete;
  WithoutCollection& operator=(const WithoutCollection&) = delete;

 private:
  const bool was_enabled_;
};

// Views of Python tensors, as a Python object. It owns the tensors, but a tensor can be given other memory: where a
// collection ran since they were read, the addresses are compared before they are used.
struct Read {
  Tensors tensors;
  Owned list;  // the tensors themselves
  const long* counter;
  long collections;  // what it counted
};
constexpr const char* kReadName = "fastclip.Read";

// Throws std::runtime_error where a tensor no longer has the memory that was read.
inline void check_addresses(const Read& read) {
  const WithoutCollection guard;
  const Tensors& tensors = read.tensors;
  for (size_t i = 0; i < tensors.views.size(); ++i) {
    PyObject* const tensor = PyList_GetItem(read.list.get(), static_cast<intptr_t>(i));
    dlpack::Tensor dl;
    if (tensor == nullptr || dlpack::exchange->from_object(tensor, &dl) != 0) throw Raised();
    const int64_t count = tensors.count_of(i);
    if (count == 0) continue;  // nothing of it is read or written
    int64_t numel = 1;
    for (int32_t d = 0; d < dl.ndim; ++d) numel *= dl.shape[d];
    if (dl.data() != tensors.views[i].data || numel != count * tensors.views[i].numel)
      throw std::runtime_error("fastclip: a finalizer gave gradient " + std::to_string(i) +
                               " other memory while it was clipped");
  }
}

inline Owned to_python(std::unique_ptr<Read> read) {
  Owned capsule = checked(PyCapsule_New(
      read.get(), kReadName, [](PyObject* self) { delete static_cast<Read*>(PyCapsule_GetPointer(self, kReadName)); }));
  read.release();
  return capsule;
}
// What was read: for a pass over each tensor, or unit, alone.
inline const Tensors& to_each(PyObject* capsule) {
  Read* const read = static_cast<Read*>(PyCapsule_GetPointer(capsule, kReadName));
  if (read == nullptr) throw Raised();
  if (read->collections != *read->counter) {
    check_addresses(*read);
    read->collections = *read->counter;
  }
  return read->tensors;
}
// The same for a pass over all tensors together, which knows no units.
inline const Tensors& to_tensors(PyObject* capsule) {
  const Tensors& tensors = to_each(capsule);
  if (!tensors.units.empty()) throw std::runtime_error("fastclip: expected tensors, got units of them");
  return tensors;
}

}  // namespace fastclip::python
