// Functions that Python calls without a detour: builtins made of Python's stable ABI, which own what they are given
// back and turn every C++ exception into Python's.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "python_abi.h"
#include "views.h"

namespace fastclip::python {

struct DecRef {
  void operator()(PyObject* object) const { Py_DecRef(object); }
};
using Owned = std::unique_ptr<PyObject, DecRef>;

inline Owned share(PyObject* object) {
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
  double number(intptr_t i) const {
    const double value = PyFloat_AsDouble((*this)[i]);
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw Raised();
    return value;
  }
  int64_t index(intptr_t i) const {
    const int64_t value = PyLong_AsLongLong((*this)[i]);
    if (value == -1 && PyErr_Occurred() != nullptr) throw Raised();
    return value;
  }
  bool truth(intptr_t i) const {
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

// A dict of builtins; the methods have to stay where they are.
template <size_t kCount>
Owned functions(PyMethodDef (&methods)[kCount]) {
  Owned dict = checked(PyDict_New());
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

constexpr const char* kTensorsName = "fastclip.Tensors";

// Tensors as a Python object, which frees them.
inline Owned to_python(std::unique_ptr<Tensors> tensors) {
  Owned capsule = checked(PyCapsule_New(tensors.get(), kTensorsName, [](PyObject* self) {
    delete static_cast<Tensors*>(PyCapsule_GetPointer(self, kTensorsName));
  }));
  tensors.release();
  return capsule;
}
inline const Tensors& to_tensors(PyObject* capsule) {
  void* const tensors = PyCapsule_GetPointer(capsule, kTensorsName);
  if (tensors == nullptr) throw Raised();
  return *static_cast<const Tensors*>(tensors);
}

}  // namespace fastclip::python
