// A Python list of tensors, or of parameters that have gradients, sorted into sections: those that a compiled engine
// takes as they are, by device, and the rest by the reason why not. Of DTensors the local tensors are read, by the mesh
// and the placements that they share.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"
#include "builtins.h"
#include "dlpack.h"
#include "export.h"
#include "views.h"

namespace fastclip::reader {
namespace {

using namespace python;

// Why no compiled engine takes a tensor; in this order in fastclip/gradients/reading.py.
enum class Reason { kNone, kDevice, kLayout, kDtype, kOverlap, kMemory, kInference };

struct Names {
  PyObject *tensor, *parameter, *grad, *local_tensor, *spec, *mesh, *placements, *trigger_wait;
};
Names names;

// A property of torch's own tensors, without the look-up by name. A subclass may have another of that name.
struct Property {
  const PyGetSetDef* definition = nullptr;

  PyObject* operator()(PyObject* tensor) const { return definition->get(tensor, definition->closure); }
};
Property grad_of, version_of;

Property find_property(PyObject* tensor_base, const char* name) {
  auto* const type = reinterpret_cast<PyTypeObject*>(tensor_base);
  const auto* definition = static_cast<const PyGetSetDef*>(PyType_GetSlot(type, Py_tp_getset));
  while (definition != nullptr && definition->name != nullptr && std::strcmp(definition->name, name) != 0) ++definition;
  if (definition == nullptr || definition->name == nullptr)
    throw std::runtime_error(std::string("fastclip: torch's tensors have no ") + name);
  return {definition};
}

constexpr int32_t kNoShare = -1;
// Collections since the library was told of the first.
long collections = 0;
// Objects lie anywhere in memory: they are asked for so many places ahead.
constexpr size_t kAhead = 4;

// DTensors that share a mesh and the types of their placements.
struct Share {
  Owned mesh, placements;
  Owned owner;  // the first of them
  Owned slots;  // a list: the gradient of each parameter, None where there is none
};

struct Section {
  Owned list;                        // of the tensors themselves
  std::unique_ptr<Tensors> tensors;  // null where they are refused
  int32_t share;
  Reason reason;
  int dtypes = 0;  // bit d is set where there is one of Dtype d
};

struct Request {
  bool gradients, writes, versions, cpu, cuda;
  PyObject *dtensor, *skip;  // None, or the type; None, or a list of truths
};

bool is_plain(const PyObject* object) { return object->type == names.tensor || object->type == names.parameter; }

PyObject* checked_borrowed(PyObject* object) {
  if (object == nullptr) throw Raised();
  return object;
}

// Whether an attribute is there: the error of one that is not is cleared, every other is raised.
bool has(PyObject* attribute, PyObject* error) {
  if (Owned(attribute) != nullptr) return true;
  if (PyErr_ExceptionMatches(error) == 0) throw Raised();
  PyErr_Clear();
  return false;
}

// An inference tensor has no version.
bool is_inference(PyObject* tensor) { return !has(version_of(tensor), PyExc_RuntimeError); }

// Whether DLPack can describe a tensor.
bool is_strided(PyObject* tensor, dlpack::Tensor* dl) {
  if (dlpack::exchange->from_object(tensor, dl) == 0) return true;
  if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw Raised();
  PyErr_Clear();
  return false;
}

// Where the compiled engines reach a tensor: the CPU has index -1.
bool find_device(const dlpack::Tensor& dl, Device* device) {
  const bool on_cpu = dl.device.type == dlpack::kCpu || dl.device.type == dlpack::kCudaHost;
  *device = on_cpu ? Device{aoti_torch_device_type_cpu(), -1} : Device{aoti_torch_device_type_cuda(), dl.device.id};
  return on_cpu || dl.device.type == dlpack::kCuda;
}

void set(const Owned& tuple, intptr_t i, Owned value) { check(PyTuple_SetItem(tuple.get(), i, value.release())); }
Owned to_long(int64_t value) { return checked(PyLong_FromLong(static_cast<long>(value))); }

class Reader {
 public:
  explicit Reader(const Request& request) : request_(request) {}

  // (sections, shares), or None where a tensor is of a type that is not known here.
  Owned read(PyObject* list) {
    if (!gather(list)) return python::retain(none());
    // No Python code runs from here on.
    const WithoutCollection guard;
    for (size_t i = 0; i < items_.size(); ++i) {
      if (i + kAhead < items_.size()) __builtin_prefetch(items_[i + kAhead].tensor.get());
      sort(items_[i]);
    }
    return result();
  }

 private:
  struct Item {
    Owned tensor;
    int32_t share;
    bool is_inference;
  };

  // Everything that may run Python code, before any address is taken.
  bool gather(PyObject* list) {
    const intptr_t size = PyList_Size(list);
    check(size < 0 ? -1 : 0);
    items_.reserve(static_cast<size_t>(size));
    for (intptr_t i = 0; i < size; ++i) {
      const Owned given = python::retain(checked_borrowed(PyList_GetItem(list, i)));
      if (i + static_cast<intptr_t>(kAhead) < size)
        __builtin_prefetch(PyList_GetItem(list, i + static_cast<intptr_t>(kAhead)));
      Owned tensor = request_.gradients ? gradient_of(given.get()) : python::retain(given.get());
      const bool skipped = request_.skip != none() && is_true(PyList_GetItem(request_.skip, i));
      const bool missing = skipped || (request_.gradients && tensor.get() == none());
      // A parameter stands for the gradient that this rank does not have.
      const PyObject* type = (missing ? given : tensor)->type;
      if (type == request_.dtensor) {
        const int32_t share = find_share(missing ? given.get() : tensor.get());
        check(PyList_Append(shares_[share].slots.get(), missing ? none() : tensor.get()));
        if (missing) continue;
        Owned local = local_of(tensor.get());
        if (!is_plain(local.get())) return false;
        add(std::move(local), share);
      } else if (!missing) {
        if (!is_plain(tensor.get())) return false;
        add(std::move(tensor), kNoShare);
      }
    }
    return true;
  }

  void add(Owned tensor, int32_t share) {
    const bool is_refused = request_.versions && is_inference(tensor.get());
    items_.push_back({std::move(tensor), share, is_refused});
  }

  Owned gradient_of(PyObject* parameter) const {
    return checked(is_plain(parameter) || parameter->type == request_.dtensor
                       ? grad_of(parameter)
                       : PyObject_GetAttr(parameter, names.grad));
  }
  static bool is_true(PyObject* object) {
    const int truth = PyObject_IsTrue(checked_borrowed(object));
    check(truth);
    return truth != 0;
  }

  static Owned local_of(PyObject* dtensor) {
    Owned local = checked(PyObject_GetAttr(dtensor, names.local_tensor));
    if (is_plain(local.get())) return local;
    // A functional collective may still be filling it.
    PyObject* const wait = PyObject_GetAttr(local.get(), names.trigger_wait);
    if (wait == nullptr) {
      if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw Raised();
      PyErr_Clear();
      return local;
    }
    return checked(PyObject_CallObject(Owned(wait).get(), nullptr));
  }

  int32_t find_share(PyObject* dtensor) {
    const Owned spec = checked(PyObject_GetAttr(dtensor, names.spec));
    Owned mesh = checked(PyObject_GetAttr(spec.get(), names.mesh));
    Owned placements = checked(PyObject_GetAttr(spec.get(), names.placements));
    // Neighbours in a list are mostly alike: the last one first.
    const auto is_same = [&](const Share& share) {
      return share.mesh == mesh && are_of_same_types(share.placements.get(), placements.get());
    };
    if (last_share_ != kNoShare && is_same(shares_[last_share_])) return last_share_;
    for (size_t i = 0; i < shares_.size(); ++i)
      if (is_same(shares_[i])) return last_share_ = static_cast<int32_t>(i);
    shares_.push_back({std::move(mesh), std::move(placements), python::retain(dtensor), checked(PyList_New(0))});
    return last_share_ = static_cast<int32_t>(shares_.size()) - 1;
  }

  // Whether a dimension is sharded, replicated or partial is a matter of the placement's type.
  static bool are_of_same_types(PyObject* a, PyObject* b) {
    if (a == b) return true;
    const intptr_t size = PyTuple_Size(a);
    check(size < 0 ? -1 : 0);
    if (PyTuple_Size(b) != size) return false;
    for (intptr_t i = 0; i < size; ++i)
      if (PyTuple_GetItem(a, i)->type != PyTuple_GetItem(b, i)->type) return false;
    return true;
  }

  void sort(const Item& item) {
    dlpack::Tensor dl;
    TensorView view{};
    Device device{};
    Reason reason = view_of(item.tensor.get(), &dl, &view, &device);
    if (reason == Reason::kNone && item.is_inference) reason = Reason::kInference;
    Section& section = find_section(item.share, device, reason);
    check(PyList_Append(section.list.get(), item.tensor.get()));
    if (reason != Reason::kNone) return;
    section.dtypes |= 1 << static_cast<int>(view.dtype);
    section.tensors->add(std::move(view));
  }

  // DLPack does not show the negative bit, under which memory holds -x: norms, scaling and symmetric bounds do not
  // mind.
  Reason view_of(PyObject* tensor, dlpack::Tensor* dl, TensorView* view, Device* device) const {
    if (!is_strided(tensor, dl)) return Reason::kLayout;
    if (!find_device(*dl, device) || !(device->index < 0 ? request_.cpu : request_.cuda)) return Reason::kDevice;
    Dtype dtype;
    if (!dlpack::to_dtype(dl->dtype, &dtype)) return Reason::kDtype;
    *view = make_view(dl->data(), dtype, dl->ndim, dl->shape, dl->strides);
    if (lacks_memory(*view)) return Reason::kMemory;
    if (request_.writes && may_overlap_itself(*view)) return Reason::kOverlap;
    return Reason::kNone;
  }

  Section& find_section(int32_t share, Device device, Reason reason) {
    const auto fits = [&](const Section& section) {
      if (section.share != share || section.reason != reason) return false;
      return reason != Reason::kNone ||
             (section.tensors->device.type == device.type && section.tensors->device.index == device.index);
    };
    if (last_section_ < sections_.size() && fits(sections_[last_section_])) return sections_[last_section_];
    for (last_section_ = 0; last_section_ < sections_.size(); ++last_section_)
      if (fits(sections_[last_section_])) return sections_[last_section_];
    sections_.push_back({checked(PyList_New(0)), nullptr, share, reason});
    if (reason == Reason::kNone) {
      sections_.back().tensors = std::make_unique<Tensors>();
      sections_.back().tensors->device = device;
      if (sections_.size() == 1) sections_.back().tensors->views.reserve(items_.size());
    }
    return sections_.back();
  }

  Owned result() {
    const Owned sections = checked(PyList_New(0)), shares = checked(PyList_New(0));
    for (Section& section : sections_) {
      const Owned tuple = checked(PyTuple_New(6));
      const bool taken = section.tensors != nullptr;
      set(tuple, 2, to_long(taken ? section.tensors->device.index : -1));
      set(tuple, 3, to_long(section.dtypes));
      set(tuple, 4, to_long(static_cast<int>(section.reason)));
      set(tuple, 5, to_long(section.share));
      set(tuple, 1, python::retain(section.list.get()));
      set(tuple, 0,
          taken ? to_python(std::unique_ptr<Read>(
                      new Read{std::move(*section.tensors), std::move(section.list), &collections, collections}))
                : python::retain(none()));
      check(PyList_Append(sections.get(), tuple.get()));
    }
    for (Share& share : shares_) {
      const Owned tuple = checked(PyTuple_New(4));
      set(tuple, 0, std::move(share.mesh));
      set(tuple, 1, std::move(share.placements));
      set(tuple, 2, std::move(share.owner));
      set(tuple, 3, std::move(share.slots));
      check(PyList_Append(shares.get(), tuple.get()));
    }
    Owned both = checked(PyTuple_New(2));
    set(both, 0, python::retain(sections.get()));
    set(both, 1, python::retain(shares.get()));
    return both;
  }

  const Request request_;
  std::vector<Item> items_;
  std::vector<Section> sections_;
  std::vector<Share> shares_;
  size_t last_section_ = 0;
  int32_t last_share_ = kNoShare;
};

// read(list, gradients, writes, versions, cpu, cuda, dtensor, skip)
Owned read(const Arguments& arguments) {
  const Request request{arguments.to_bool(1), arguments.to_bool(2), arguments.to_bool(3), arguments.to_bool(4),
                        arguments.to_bool(5), arguments[6],         arguments[7]};
  return Reader(request).read(arguments[0]);
}

// Adds the units of a tensor: one for every index into the dimensions of `kept`, bit d for dimension d, in the order of
// those indices. False where the elements of one are not a run of memory, which the engines would read element by
// element, or units may share memory.
bool add_units(const dlpack::Tensor& dl, Dtype dtype, uint64_t kept, Tensors* tensors) {
  if (may_overlap_itself(make_view(dl.data(), dtype, dl.ndim, dl.shape, dl.strides))) return false;
  std::vector<int64_t> sizes, strides;
  Units units{1, {}};
  for (int32_t d = 0; d < dl.ndim; ++d) {
    const Dim dim{dl.shape[d], dl.strides[d]};
    if ((kept >> d & 1) == 0) {
      sizes.push_back(dim.size);
      strides.push_back(dim.stride);
      continue;
    }
    units.count *= dim.size;
    if (!units.dims.empty() && units.dims.back().stride == dim.stride * dim.size)
      units.dims.back() = {units.dims.back().size * dim.size, dim.stride};
    else
      units.dims.push_back(dim);
  }
  TensorView first = make_view(dl.data(), dtype, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data());
  if (units.count > 0 && (first.dims != nullptr || lacks_memory(first))) return false;
  tensors->add(std::move(first), std::move(units));
  return true;
}

// units(list, kept, versions) -> (views, their number, index of the GPU or -1), or None where they are not all strided
// tensors of one device whose units are runs of memory, or with `versions` one has none: kept[i] says by its bits which
// dimensions of tensor i number its units.
Owned units(const Arguments& arguments) {
  const intptr_t size = PyList_Size(arguments[0]);
  check(size < 0 ? -1 : 0);
  const bool versions = arguments.to_bool(2);
  auto read = std::make_unique<Read>(Read{{}, python::retain(arguments[0]), &collections, collections});
  Tensors& tensors = read->tensors;
  tensors.views.reserve(static_cast<size_t>(size));
  tensors.units.reserve(static_cast<size_t>(size));
  // As in Reader, no Python code runs while addresses are taken.
  const WithoutCollection guard;
  for (intptr_t i = 0; i < size; ++i) {
    PyObject* const tensor = checked_borrowed(PyList_GetItem(arguments[0], i));
    const long long kept = PyLong_AsLongLong(checked_borrowed(PyList_GetItem(arguments[1], i)));
    if (kept == -1 && PyErr_Occurred() != nullptr) throw Raised();
    dlpack::Tensor dl;
    Dtype dtype{};
    Device device;
    if (!is_plain(tensor) || (versions && is_inference(tensor)) || !is_strided(tensor, &dl) ||
        !find_device(dl, &device) || !dlpack::to_dtype(dl.dtype, &dtype))
      return python::retain(none());
    if (i == 0) tensors.device = device;
    if (device.type != tensors.device.type || device.index != tensors.device.index ||
        !add_units(dl, dtype, static_cast<uint64_t>(kept), &tensors))
      return python::retain(none());
  }
  const int64_t count = tensors.count, index = tensors.device.index;
  Owned found = checked(PyTuple_New(3));
  set(found, 0, to_python(std::move(read)));
  set(found, 1, to_long(count));
  set(found, 2, to_long(index));
  return found;
}

// Words of the header of the Triton kernels' table, of a launch in it, and of a row (triton_kernels.py).
constexpr size_t kTableWords = 4;

// The table of tensors that are each a run of memory: (its words, as bytes, a launch for each dtype as (dtype, offset
// of its words, chunks, tensors), slots). The words that hold float64 numbers are left to who calls.
Owned table_of(const TensorViews& tensors, const TensorView* first, int64_t chunk, bool slot_for_each_tensor,
               bool with_places) {
  struct Launch {
    Dtype dtype;
    size_t begin;  // of its words
    int64_t tensors, chunks;
  };
  std::vector<Launch> launches;  // in the order of their first tensors
  int found[kNumDtypes];
  std::fill_n(found, kNumDtypes, -1);
  for (const TensorView* tensor : tensors) {
    int& launch = found[static_cast<int>(tensor->dtype)];
    if (launch < 0) {
      launch = static_cast<int>(launches.size());
      launches.push_back({tensor->dtype, 0, 0, 0});
    }
    ++launches[static_cast<size_t>(launch)].tensors;
  }
  size_t size = kTableWords;
  for (Launch& launch : launches) {
    const size_t count = static_cast<size_t>(launch.tensors);
    launch.begin = size;
    // The next launch, too, starts at a multiple of 16 bytes.
    size += kTableWords + kTableWords * count + (with_places ? count + count % 2 : 0);
  }
  std::vector<int64_t> words(size, 0);
  std::vector<int64_t> filled(launches.size(), 0);
  int64_t slots = 0;
  for (const TensorView* tensor : tensors) {
    const size_t l = static_cast<size_t>(found[static_cast<int>(tensor->dtype)]);
    Launch& launch = launches[l];
    const size_t i = static_cast<size_t>(filled[l]++);
    int64_t* const row = &words[launch.begin + kTableWords + kTableWords * i];
    const int64_t chunks = (tensor->numel + chunk - 1) / chunk;
    row[0] = launch.chunks;
    row[1] = reinterpret_cast<int64_t>(tensor->data);
    row[2] = tensor->numel;
    row[3] = slots;
    if (with_places)
      words[launch.begin + kTableWords + kTableWords * static_cast<size_t>(launch.tensors) + i] = tensor - first;
    launch.chunks += chunks;
    slots += slot_for_each_tensor ? 1 : chunks;
  }
  words[0] = slots;
  const Owned list = checked(PyList_New(0));
  for (const Launch& launch : launches) {
    words[launch.begin] = launch.tensors;
    words[launch.begin + 1] = launch.chunks;
    const Owned tuple = checked(PyTuple_New(4));
    set(tuple, 0, to_long(static_cast<int>(launch.dtype)));
    set(tuple, 1, to_long(static_cast<int64_t>(launch.begin)));
    set(tuple, 2, to_long(launch.chunks));
    set(tuple, 3, to_long(launch.tensors));
    check(PyList_Append(list.get(), tuple.get()));
  }
  Owned table = checked(PyTuple_New(3));
  const intptr_t bytes = static_cast<intptr_t>(size * sizeof(int64_t));
  set(table, 0, checked(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()), bytes)));
  set(table, 1, python::retain(list.get()));
  set(table, 2, to_long(slots));
  return table;
}

// tables(list, chunk, slot_for_each_tensor, with_places, in_rounds) -> tables as of table_of, of the tensors that have
// elements, in_rounds one for each round of writes; or None where they are not all strided tensors of one device, of
// our dtypes, and runs of memory.
Owned tables(const Arguments& arguments) {
  const intptr_t size = PyList_Size(arguments[0]);
  check(size < 0 ? -1 : 0);
  const int64_t chunk = arguments.to_index(1);
  const bool slot_for_each_tensor = arguments.to_bool(2), with_places = arguments.to_bool(3);
  const bool in_rounds = arguments.to_bool(4);
  std::vector<TensorView> views;
  views.reserve(static_cast<size_t>(size));
  int32_t type = 0, id = 0;
  // As in Reader, no Python code runs while addresses are taken.
  const WithoutCollection guard;
  for (intptr_t i = 0; i < size; ++i) {
    PyObject* const tensor = checked_borrowed(PyList_GetItem(arguments[0], i));
    if (i + static_cast<intptr_t>(kAhead) < size)
      __builtin_prefetch(PyList_GetItem(arguments[0], i + static_cast<intptr_t>(kAhead)));
    dlpack::Tensor dl;
    Dtype dtype{};
    if (!is_plain(tensor) || !is_strided(tensor, &dl) || !dlpack::to_dtype(dl.dtype, &dtype))
      return python::retain(none());
    if (i == 0) {
      type = dl.device.type;
      id = dl.device.id;
    }
    TensorView view = make_view(dl.data(), dtype, dl.ndim, dl.shape, dl.strides);
    if (dl.device.type != type || dl.device.id != id || view.dims != nullptr || lacks_memory(view))
      return python::retain(none());
    views.push_back(std::move(view));
  }
  TensorViews filled = nonempty(views);
  std::vector<TensorViews> rounds;
  // Moved: the copy of a vector takes a symbol of libstdc++ that is newer than the wheels'.
  if (!filled.empty() && in_rounds)
    rounds = write_rounds(filled);
  else if (!filled.empty())
    rounds.push_back(std::move(filled));
  const Owned found = checked(PyList_New(0));
  for (const TensorViews& round : rounds) {
    const Owned table = table_of(round, views.data(), chunk, slot_for_each_tensor, with_places);
    check(PyList_Append(found.get(), table.get()));
  }
  return python::retain(found.get());
}

// For gc.callbacks: count_collection(phase, info).
Owned count_collection(const Arguments&) {
  ++collections;
  return python::retain(none());
}

}  // namespace

}  // namespace fastclip::reader

using namespace fastclip;

// With the GIL. The reader's builtins, read, units and tables, for a torch that has these types; or null and an error.
FASTCLIP_EXPORT PyObject* fastclip_reader_functions(PyObject* tensor_base, PyObject* tensor, PyObject* parameter,
                                                    const dlpack::Exchange* exchange) {
  dlpack::exchange = exchange;
  return python::given([=] {
    const auto intern = [](const char* name) { return python::checked(PyUnicode_InternFromString(name)).release(); };
    reader::names = {tensor,          parameter,      intern("grad"),       intern("_local_tensor"),
                     intern("_spec"), intern("mesh"), intern("placements"), intern("trigger_wait")};
    reader::grad_of = reader::find_property(tensor_base, "grad");
    reader::version_of = reader::find_property(tensor_base, "_version");
    static PyMethodDef methods[] = {python::method<reader::read>("read"), python::method<reader::units>("units"),
                                    python::method<reader::tables>("tables"),
                                    python::method<reader::count_collection>("count_collection")};
    return python::functions(methods);
  });
}
