// The functions of Python's stable ABI (3.10) that fastclip calls, declared once: as for torch's (abi.h), nothing of
// Python is needed to build. They resolve as an extension module's do; weak, because the sanitizers' program has none.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// CI compiles the rest beside Python's own header, and compares what that has of these.
#ifndef Py_PYTHON_H
// The head of every object, which the stable ABI fixes for interpreters that have a GIL.
struct PyObject {
  intptr_t references;
  PyObject* type;
};
struct PyTypeObject;
struct PyThreadState;
struct PyMethodDef {
  const char* name;
  void (*function)();  // with METH_FASTCALL: PyObject* (*)(PyObject* self, PyObject* const* arguments, intptr_t count)
  int flags;
  const char* doc;
};
struct PyGetSetDef {
  const char* name;
  PyObject* (*get)(PyObject*, void* closure);
  int (*set)(PyObject*, PyObject*, void* closure);
  const char* doc;
  void* closure;
};
constexpr int METH_FASTCALL = 0x80;
constexpr int Py_tp_getset = 73;
#endif

#define FASTCLIP_PYTHON __attribute__((weak))

FASTCLIP_PYTHON extern PyObject _Py_NoneStruct;
FASTCLIP_PYTHON extern PyObject* PyExc_RuntimeError;
FASTCLIP_PYTHON extern PyObject* PyExc_MemoryError;
FASTCLIP_PYTHON extern PyObject* PyExc_TypeError;
FASTCLIP_PYTHON extern PyObject* PyExc_Exception;
FASTCLIP_PYTHON extern PyObject* PyExc_AttributeError;

FASTCLIP_PYTHON void Py_IncRef(PyObject*);
FASTCLIP_PYTHON void Py_DecRef(PyObject*);
FASTCLIP_PYTHON void PyErr_Clear();
FASTCLIP_PYTHON PyObject* PyErr_Occurred();
FASTCLIP_PYTHON int PyErr_ExceptionMatches(PyObject* type);
FASTCLIP_PYTHON void PyErr_SetString(PyObject* type, const char* message);

FASTCLIP_PYTHON PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
FASTCLIP_PYTHON PyObject* PyObject_CallObject(PyObject* callable, PyObject* arguments);
FASTCLIP_PYTHON int PyObject_IsTrue(PyObject*);

FASTCLIP_PYTHON void* PyType_GetSlot(PyTypeObject*, int slot);

FASTCLIP_PYTHON PyObject* PyList_New(intptr_t size);
FASTCLIP_PYTHON intptr_t PyList_Size(PyObject*);
FASTCLIP_PYTHON PyObject* PyList_GetItem(PyObject*, intptr_t);  // borrowed
FASTCLIP_PYTHON int PyList_Append(PyObject*, PyObject*);
FASTCLIP_PYTHON PyObject* PyTuple_New(intptr_t size);
FASTCLIP_PYTHON intptr_t PyTuple_Size(PyObject*);
FASTCLIP_PYTHON PyObject* PyTuple_GetItem(PyObject*, intptr_t);       // borrowed
FASTCLIP_PYTHON int PyTuple_SetItem(PyObject*, intptr_t, PyObject*);  // steals
FASTCLIP_PYTHON PyObject* PyDict_New();
FASTCLIP_PYTHON int PyDict_SetItemString(PyObject*, const char* key, PyObject*);

FASTCLIP_PYTHON PyObject* PyLong_FromLong(long);
FASTCLIP_PYTHON long long PyLong_AsLongLong(PyObject*);
FASTCLIP_PYTHON double PyFloat_AsDouble(PyObject*);
FASTCLIP_PYTHON PyObject* PyBytes_FromStringAndSize(const char*, intptr_t size);
FASTCLIP_PYTHON PyObject* PyUnicode_InternFromString(const char*);

FASTCLIP_PYTHON PyObject* PyCapsule_New(void*, const char* name, void (*destructor)(PyObject*));
FASTCLIP_PYTHON void* PyCapsule_GetPointer(PyObject*, const char* name);
FASTCLIP_PYTHON PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);

FASTCLIP_PYTHON int PyGC_Disable();
FASTCLIP_PYTHON int PyGC_Enable();

FASTCLIP_PYTHON PyThreadState* PyEval_SaveThread();
FASTCLIP_PYTHON void PyEval_RestoreThread(PyThreadState*);
}
