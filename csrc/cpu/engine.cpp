// The CPU's engine: the passes of cpu/passes.h with their numbers in memory, and the library's exported functions.
#include "../engine.h"

#include "../entry.h"
#include "float_mode.h"
#include "half.h"
#include "loops.h"
#include "passes.h"

namespace fastclip::cpu {
namespace {

double load(Number number) {
  switch (number.dtype) {
    case Dtype::kFloat64:
      return *static_cast<double*>(number.data);
    case Dtype::kFloat32:
      return *static_cast<float*>(number.data);
    case Dtype::kBFloat16:
      return to_float(*static_cast<bfloat16*>(number.data));
    case Dtype::kFloat16:
      return to_float(*static_cast<float16*>(number.data));
  }
  return 0.0;
}

void store(Number number, double value) {
  switch (number.dtype) {
    case Dtype::kFloat64:
      *static_cast<double*>(number.data) = value;
      break;
    case Dtype::kFloat32:
      *static_cast<float*>(number.data) = static_cast<float>(value);
      break;
    case Dtype::kBFloat16:
      from_float(static_cast<float>(value), static_cast<bfloat16*>(number.data));
      break;
    case Dtype::kFloat16:
      from_float(static_cast<float>(value), static_cast<float16*>(number.data));
      break;
  }
}

constexpr Engine kEngine = {
    "CPU",
    [](const Tensors& tensors, double norm_type, Number partial) {
      const DefaultFloatMode mode;
      store(partial, norm_partial(tensors.views, norm_type));
    },
    [](const Tensors& tensors, double norm_type, Number norm) {
      const DefaultFloatMode mode;
      store(norm, total_norm(tensors.views, norm_type));
    },
    [](const Tensors& tensors, double norm_type, double* out) { norms(tensors, norm_type, out); },
    [](const Tensors& tensors, double* table, Number partial) {
      const DefaultFloatMode mode;
      store(partial, stats(tensors.views, table));
    },
    [](const Tensors& tensors, Number coef, bool zero) {
      const DefaultFloatMode mode;
      scale(tensors.views, load(coef), zero);
    },
    [](const Tensors& tensors, const double* coefs) { scale_each(tensors, coefs); },
    [](const Tensors& tensors) { sanitize(tensors.views); },
    [](const Tensors& tensors, double max_norm, Number norm) {
      const DefaultFloatMode mode;
      scale(tensors.views, clip_coef(load(norm), max_norm), false);
    },
    [](const Tensors& tensors, double low, double high) { clamp(tensors.views, low, high); },
    [](const Tensors& tensors, const Clip& clip, Number norm) {
      const DefaultFloatMode mode;
      const double inv_scale = clip.inv_scale.data == nullptr ? 1.0 : load(clip.inv_scale);
      double wide = total_norm(tensors.views, clip.norm_type);
      // A norm of an order above 0 that is finite has seen no other element.
      if (clip.nonfinite == Nonfinite::kSanitize && !(clip.norm_type > 0 && is_finite(wide))) {
        sanitize(tensors.views);
        wide = total_norm(tensors.views, clip.norm_type);
      }
      wide = scaled_norm(wide, clip.norm_type, inv_scale);
      scale(tensors.views, clip_factor(wide, inv_scale, clip), clip.nonfinite == Nonfinite::kZero);
      store(norm, wide);
      if (clip.found_inf.data != nullptr) store(clip.found_inf, is_finite(wide) ? 0.0 : 1.0);
    },
};

// clip_each_(tensors, norm_type, bounds, divisors or None, least, measures), as in passes.h.
python::Owned clip_each_of(const python::Arguments& arguments) {
  const Tensors& tensors = python::to_each(arguments[0]);
  const double norm_type = arguments.to_double(1);
  const auto numbers = [&](intptr_t i) { return Builtins<kEngine>::numbers_of(arguments[i], tensors.count); };
  const EachBound bound{numbers(2), arguments[3] == python::none() ? nullptr : numbers(3), arguments.to_double(4)};
  double* const measures = numbers(5);
  return Builtins<kEngine>::run(tensors, [&] { clip_each(tensors, norm_type, bound, measures); });
}

// clipped_sums(examples, sums, max_norm, per_layer, norms) -> 0 or 1, as in passes.h; the lists are of `units`, and of
// the sums each is one.
python::Owned clipped_sums_of(const python::Arguments& arguments) {
  const Tensors& examples = python::to_each(arguments[0]);
  const Tensors& sums = python::to_each(arguments[1]);
  const double max_norm = arguments.to_double(2);
  const bool per_layer = arguments.to_bool(3);
  const size_t tensors = sums.views.size();
  bool match = examples.views.size() == tensors && examples.units.size() == tensors && tensors > 0;
  const int64_t batch = match ? examples.units[0].count : 0;
  for (size_t k = 0; match && k < tensors; ++k) {
    const TensorView &example = examples.views[k], &sum = sums.views[k];
    match = examples.units[k].count == batch && example.dtype == sum.dtype && example.numel == sum.numel &&
            example.dims == nullptr && sum.dims == nullptr;
  }
  if (!match)
    throw std::runtime_error("fastclip: expected sums of the shape and dtype of the examples, dense as those");
  double* const norms = Builtins<kEngine>::numbers_of(arguments[4], per_layer ? examples.count : batch);
  bool are_ordinary = false;
  Builtins<kEngine>::run(examples,
                         [&] { are_ordinary = clipped_sums(examples, sums.views, max_norm, per_layer, norms); });
  return python::checked(PyLong_FromLong(are_ordinary));
}

python::Owned functions() {
  static PyMethodDef methods[] = {python::method<clip_each_of>("clip_each_"),
                                  python::method<clipped_sums_of>("clipped_sums")};
  return python::functions(methods, Builtins<kEngine>::all());
}

}  // namespace
}  // namespace fastclip::cpu

using namespace fastclip;

// Called once after loading: chooses the ISA and registers the kernels. Returns null, or what went wrong.
FASTCLIP_EXPORT const char* fastclip_cpu_init() {
  return error_of([] {
    cpu::loops();
    Ops<cpu::kEngine>::enroll("fastclip", cpu::kEngine.dispatch_key);
  });
}

// The name of the chosen ISA.
FASTCLIP_EXPORT const char* fastclip_cpu_isa() { return cpu::loops().isa; }

// With the GIL. The engine's builtins by name, or null and a Python error.
FASTCLIP_EXPORT PyObject* fastclip_cpu_functions(const dlpack::Exchange* exchange) {
  dlpack::exchange = exchange;
  return python::given([] { return cpu::functions(); });
}
