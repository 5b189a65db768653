// Runs the CPU kernels over the edge cases without torch, for the sanitizers (see .ci/sanitize.sh). One process per
// ISA: FASTCLIP_CPU_ISA chooses it; an ISA that the machine lacks ends with exit code 77.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <stdexcept>

#include "../../csrc/cpu/half.h"
#include "../../csrc/cpu/loops.h"
#include "../../csrc/cpu/passes.h"
#include "fake_torch.h"

extern "C" const char* fastclip_cpu_init();

namespace {

using namespace fastclip;
using fake::Tensor;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};
constexpr int32_t kCodes[] = {fake::kFloat32, fake::kFloat64, fake::kBFloat16, fake::kFloat16};
constexpr double kNormTypes[] = {2, 1, kInf, -kInf, 0, 3, 0.5};

int64_t checks = 0;

#define CHECK(condition, ...)                                 \
  do {                                                        \
    ++checks;                                                 \
    if (!(condition)) {                                       \
      std::fprintf(stderr, "%d: %s: ", __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                      \
      std::fprintf(stderr, "\n");                             \
      std::exit(1);                                           \
    }                                                         \
  } while (false)

Dtype dtype_of(const Tensor& tensor) {
  return kDtypes[std::find(std::begin(kCodes), std::end(kCodes), tensor.dtype) - std::begin(kCodes)];
}

// The nearest bfloat16, ties to even, by comparing distances: another way than that of half.h.
uint16_t nearest_bfloat16(float x) {
  if (x != x) return 0x7fc0;
  if (std::isinf(x)) return x > 0 ? 0x7f80 : 0xff80;
  const auto down = static_cast<uint16_t>(cpu::bit_cast<uint32_t>(x) >> 16);
  const auto value = [](uint32_t bits) {
    return (bits & 0x7fff) == 0x7f80 ? 0x1p128 : std::fabs(double{cpu::bit_cast<float>(bits << 16)});
  };
  const double below = std::fabs(x) - value(down), above = value(down + 1u) - std::fabs(x);
  return below < above || (below == above && down % 2 == 0) ? down : static_cast<uint16_t>(down + 1);
}

double get(Dtype dtype, const char* p) {
  switch (dtype) {
    case Dtype::kFloat32: {
      float x;
      return std::memcpy(&x, p, sizeof(x)), x;
    }
    case Dtype::kFloat64: {
      double x;
      return std::memcpy(&x, p, sizeof(x)), x;
    }
    case Dtype::kBFloat16: {
      uint16_t bits;
      return std::memcpy(&bits, p, sizeof(bits)), cpu::bit_cast<float>(uint32_t{bits} << 16);
    }
    case Dtype::kFloat16: {
      _Float16 x;
      return std::memcpy(&x, p, sizeof(x)), static_cast<double>(x);
    }
  }
  return 0;
}

// For all but float64, value is first rounded to float32, as the opmath of the kernels is.
void put(Dtype dtype, char* p, double value) {
  const auto narrow = static_cast<float>(value);
  const uint16_t b16 = nearest_bfloat16(narrow);
  const auto f16 = static_cast<_Float16>(narrow);
  if (dtype == Dtype::kFloat64) std::memcpy(p, &value, sizeof(value));
  if (dtype == Dtype::kFloat32) std::memcpy(p, &narrow, sizeof(narrow));
  if (dtype == Dtype::kBFloat16) std::memcpy(p, &b16, sizeof(b16));
  if (dtype == Dtype::kFloat16) std::memcpy(p, &f16, sizeof(f16));
}

double rounded(Dtype dtype, double value) {
  char bytes[8];
  put(dtype, bytes, value);
  return get(dtype, bytes);
}

double scaled(Dtype dtype, double x, double coef) {
  if (dtype == Dtype::kFloat64) return x * coef;
  if (coef != 0 && std::fabs(coef) < 0x1p-126) return rounded(dtype, x * coef);
  return rounded(dtype, static_cast<float>(x) * static_cast<float>(coef));
}

double clamped(double x, double lo, double hi) { return x < lo ? lo : x > hi ? hi : x; }

bool same(double a, double b) { return a == b || (a != a && b != b); }
bool close(double a, double b) { return same(a, b) || std::fabs(a - b) <= 1e-12 * std::fabs(b); }

// sum |x|^p, max |x|, min |x| or whether any is non-zero.
double partial_of(const std::vector<double>& values, double norm_type) {
  long double sum = 0;
  double max = 0, min = kInf, nan = 0;
  bool any = false;
  for (const double value : values) {
    const double x = std::fabs(value);
    if (x != x) nan = x;
    sum += norm_type == 2 ? static_cast<long double>(x) * x : norm_type == 1 ? x : std::pow(x, norm_type);
    max = std::max(max, x);
    min = std::min(min, x);
    any = any || x != 0;
  }
  if (norm_type == 0) return any;
  if (nan != nan) return nan;
  return norm_type == kInf ? max : norm_type == -kInf ? min : static_cast<double>(sum);
}

// Between -2 and 2, the same sequence in every run.
double random_value() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(state) >> 11) * 0x1p-51;
}

// Misaligned by some elements; the block ends where the tensor ends.
Tensor dense(int32_t code, const std::vector<int64_t>& sizes, int64_t misalignment = 0) {
  Tensor tensor{nullptr, nullptr, code, 0, sizes, std::vector<int64_t>(sizes.size(), 1)};
  for (size_t d = sizes.size(); d-- > 1;) tensor.strides[d - 1] = tensor.strides[d] * sizes[d];
  const int64_t size = fake::element_size(code);
  tensor.storage = std::make_shared<std::vector<char>>((tensor.numel() + misalignment) * size);
  tensor.data = tensor.storage->data() + misalignment * size;
  for (int64_t i = 0; i < misalignment; ++i) put(dtype_of(tensor), tensor.storage->data() + i * size, kNan);
  const int64_t numel = tensor.numel();
  for (int64_t i = 0; i < numel; ++i) put(dtype_of(tensor), tensor.data + i * size, random_value());
  return tensor;
}

// Where the elements are, in row-major order.
std::vector<char*> elements(const Tensor& tensor) {
  const int64_t size = fake::element_size(tensor.dtype);
  std::vector<char*> out = {tensor.data};
  for (size_t d = 0; d < tensor.sizes.size(); ++d) {
    std::vector<char*> next;
    next.reserve(out.size() * tensor.sizes[d]);
    for (char* p : out)
      for (int64_t i = 0; i < tensor.sizes[d]; ++i) next.push_back(p + i * tensor.strides[d] * size);
    out.swap(next);
  }
  return out;
}

std::vector<double> values(const Tensor& tensor) {
  std::vector<double> out;
  for (const char* p : elements(tensor)) out.push_back(get(dtype_of(tensor), p));
  return out;
}

// One run of memory: every loop of the ISA against the plain loop above, and against the bits of the scalar ISA.
void check_loops(Dtype dtype, int64_t n, int64_t misalignment, const std::function<double(int64_t)>& value_at) {
  const cpu::Loops& isa = cpu::loops();
  const int d = static_cast<int>(dtype);
  const int64_t size = element_size(dtype);
  const Tensor x = dense(kCodes[d], {n}, misalignment);
  for (int64_t i = 0; i < n; ++i) put(dtype, x.data + i * size, value_at(i));
  const auto copy = [&] {
    const Tensor tensor = dense(kCodes[d], {n}, misalignment);
    std::copy(x.data, x.data + n * size, tensor.data);
    return tensor;
  };
  const auto untouched = [&](const Tensor& tensor) {
    for (int64_t i = 0; i < misalignment; ++i)
      if (!std::isnan(get(dtype, tensor.storage->data() + i * size))) return false;
    return true;
  };
  const std::vector<double> before = values(x);
  for (const double norm_type : kNormTypes) {
    const NormKind kind = norm_kind(norm_type);
    const auto partial = [&](const cpu::Loops& loops) {
      if (kind == NormKind::kPow) return cpu::norm_pow(dtype, x.data, n, norm_type, 1);
      return loops.norm_partial[d][static_cast<int>(kind)](x.data, n).rounded();
    };
    const double got = partial(isa), expected = partial_of(before, norm_type), scalar = partial(cpu::kLoopsScalar);
    CHECK(close(got, expected) && same(got, scalar), "norm %g, dtype %d, n %ld, misalignment %ld: %a, expected %a, %a",
          norm_type, d, n, misalignment, got, expected, scalar);
  }
  int64_t nonfinite = 0, zeros = 0;
  for (const double v : before) {
    nonfinite += !std::isfinite(v);
    zeros += v == 0;
  }
  for (const cpu::Loops* loops : {&isa, &cpu::kLoopsScalar}) {
    const cpu::Stats stats = loops->stats[d](x.data, n);
    const double squares = isa.norm_partial[d][static_cast<int>(NormKind::kSquares)](x.data, n).rounded();
    CHECK(same(stats.squares.rounded(), squares) && same(stats.largest, partial_of(before, kInf)) &&
              stats.nonfinite == nonfinite && stats.zeros == zeros,
          "%s stats, dtype %d, n %ld: %a, %a, %ld, %ld", loops->isa, d, n, stats.squares.rounded(), stats.largest,
          stats.nonfinite, stats.zeros);
  }
  const auto compare = [&](const char* what, const std::function<void(const cpu::Loops&, void*)>& run,
                           const std::function<double(double)>& expected) {
    const Tensor got = copy(), scalar = copy();
    run(isa, got.data);
    run(cpu::kLoopsScalar, scalar.data);
    for (int64_t i = 0; i < n; ++i) {
      const double value = get(dtype, got.data + i * size), wanted = expected(before[i]);
      CHECK(same(value, wanted), "%s, dtype %d, n %ld, i %ld: %a to %a, expected %a", what, d, n, i, before[i], value,
            wanted);
    }
    CHECK(n == 0 || std::memcmp(got.data, scalar.data, n * size) == 0, "%s, dtype %d, n %ld: not the bits of scalar",
          what, d, n);
    CHECK(untouched(got), "%s, dtype %d, n %ld: wrote before the start", what, d, n);
  };
  for (const double coef : {0.3, 0.0, kNan})
    compare(
        "scale", [&](const cpu::Loops& loops, void* data) { loops.scale[d](data, n, coef); },
        [&](double v) { return scaled(dtype, v, coef); });
  const int64_t opmath_size = dtype == Dtype::kFloat64 ? 8 : 4;
  const auto sum_of = [&](const cpu::Loops& loops) {
    std::vector<char> sum(static_cast<size_t>(n * opmath_size));
    const void* const rows[] = {x.data, x.data, x.data, x.data, x.data};
    const double coefs[] = {0.3, 1.0, -2.0, 0.7, 0.1};
    loops.add_scaled[d](sum.data(), rows, coefs, 5, n);
    return sum;
  };
  CHECK(sum_of(isa) == sum_of(cpu::kLoopsScalar), "add_scaled, dtype %d, n %ld: not the bits of scalar", d, n);
  for (const double bound : {0.0, 0.5, 100.0, kInf}) {
    bool changes = false;
    for (const double v : before) changes = changes || v < -bound || v > bound;
    compare(
        "clamp",
        [&](const cpu::Loops& loops, void* data) {
          CHECK(loops.clamp[d](data, n, -bound, bound) == changes, "dtype %d, n %ld, bound %g", d, n, bound);
        },
        [&](double v) { return clamped(v, -bound, bound); });
  }
}

[[maybe_unused]] void check_all_loops() {
  for (const Dtype dtype : kDtypes) {
    // Around one register, one block of lanes and one chunk.
    for (const int64_t n : {0, 1, 31, 32, 33, 63, 64, 65, 1000, kChunkSize - 1, kChunkSize, kChunkSize + 1}) {
      for (const int64_t misalignment : {1, 0, 3, 7}) {
        check_loops(dtype, n, misalignment, [](int64_t) { return random_value(); });
        if (n > 65) break;  // the loops repeat themselves after one block
        for (const double special : {kNan, kInf, -kInf, 1e300, 65519.0, 65520.0, 1e-40, 6e-8, -0.0})
          for (const int64_t at : {int64_t{0}, n / 2, n - 1})
            check_loops(dtype, n, misalignment, [=](int64_t i) { return i == at ? special : i % 7 - 3.0; });
        check_loops(dtype, n, misalignment, [](int64_t i) { return i % 2 ? 0.0 : -0.0; });
        check_loops(dtype, n, misalignment, [](int64_t i) { return std::ldexp(i % 2 ? 1.1 : -1.3, -14 - i % 12); });
      }
    }
  }
}

// Tensors that own their memory themselves, alike in values, layout and in what they share: once their handles are
// deleted, nobody may read it.
std::vector<Tensor> copies(std::vector<Tensor> tensors) {
  std::map<const char*, std::shared_ptr<std::vector<char>>> storages;
  for (Tensor& tensor : tensors) {
    std::shared_ptr<std::vector<char>>& storage = storages[tensor.storage->data()];
    if (storage == nullptr) storage = std::make_shared<std::vector<char>>(*tensor.storage);
    tensor.data = storage->data() + (tensor.data - tensor.storage->data());
    tensor.storage = storage;
  }
  return tensors;
}

// Whole storages: what lies between the elements of a view, too.
using Bytes = std::vector<std::vector<char>>;
Bytes memory(const std::vector<Tensor>& tensors) {
  Bytes bytes;
  for (const Tensor& tensor : tensors) bytes.push_back(*tensor.storage);
  return bytes;
}

// Runs an op; returns what it left on the stack, or the text of its error. No handle may be left over.
struct Outcome {
  double result = 0;
  int32_t dtype = 0;
  std::string error = {};
};
struct Failing {
  int call = -1, allocation = -1;  // after so many others; below zero: none
};
Outcome run(const std::string& op, const std::vector<StableIValue>& arguments, Failing failing = {}) {
  std::vector<StableIValue> stack = arguments;
  // The defaults of what is not given: zero=False; nonfinite=0, found_inf=None, inv_scale=None before the dtype.
  if (op == "scale_" && stack.size() == 2) stack.push_back(0);
  if (op == "clip_grad_norm_" && stack.size() == 4) stack.insert(stack.end() - 1, 3, 0);
  Outcome outcome;
  const bool returns = op == "norm_partial" || op == "clip_grad_norm_";
  const auto kernel = fake::kernels.at(op);
  const auto set = [](Failing to) {
    fake::calls_until_failure = to.call;
    fake::allocations_until_failure = to.allocation;
  };
  try {
    set(failing);
    kernel(stack.data(), stack.size(), returns);
    set({});
    if (returns) {
      AtenTensorHandle handle;
      std::memcpy(&handle, stack.data(), sizeof(handle));
      outcome = {get(dtype_of(handle->tensor), handle->tensor.data), handle->tensor.dtype};
      aoti_torch_delete_tensor_object(handle);
    }
  } catch (const std::exception& e) {
    set({});
    outcome.error = e.what();
  }
  CHECK(fake::live_handles == 0, "%s: %ld handles left, error '%s'", op.c_str(), fake::live_handles.load(),
        outcome.error.c_str());
  fake::live_handles = 0;
  return outcome;
}

StableIValue number(double value) { return cpu::bit_cast<StableIValue>(value); }
StableIValue optional(int32_t code) {
  return code < 0 ? 0 : reinterpret_cast<StableIValue>(new StableIValue(static_cast<uint32_t>(code)));
}
Tensor scalar(double value) {
  Tensor tensor = dense(fake::kFloat64, {});
  std::memcpy(tensor.data, &value, sizeof(value));
  return tensor;
}

double norm_of(const std::vector<Tensor>& tensors, double norm_type) {
  double total = identity(norm_kind(norm_type));
  for (const Tensor& tensor : tensors)
    if (tensor.numel() > 0) total = combine(norm_kind(norm_type), total, partial_of(values(tensor), norm_type));
  return total;
}

// The tensors one after the other, as torch writes them; compares with what op makes of them, then puts them back.
void check_write(const std::vector<Tensor>& tensors, const std::string& op, const std::vector<StableIValue>& arguments,
                 const std::function<double(Dtype, double)>& expected) {
  const Bytes before = memory(tensors);
  const auto restore = [&] {
    for (size_t t = 0; t < tensors.size(); ++t)
      std::copy(before[t].begin(), before[t].end(), tensors[t].storage->begin());
  };
  for (const Tensor& tensor : tensors) {
    const Dtype dtype = dtype_of(tensor);
    for (char* p : elements(tensor)) put(dtype, p, expected(dtype, get(dtype, p)));
  }
  const Bytes wanted = memory(tensors);
  for (const int threads : {1, 2, 5}) {
    restore();
    fake::threads = threads;
    std::vector<StableIValue> all = {fake::handle_of(tensors)};
    for (const StableIValue argument : arguments) all.push_back(argument);
    if (op == "scale_") all[1] = fake::handle_of(scalar(cpu::bit_cast<double>(arguments[0])));
    const Outcome outcome = run(op, all);
    CHECK(outcome.error.empty(), "%s: %s", op.c_str(), outcome.error.c_str());
    CHECK(memory(tensors) == wanted, "%s, %d threads: other bytes", op.c_str(), threads);
  }
  restore();
}

void check_list(const std::vector<Tensor>& tensors) {
  for (const double norm_type : kNormTypes) {
    const double partial = norm_of(tensors, norm_type);
    double first = 0;
    for (const int threads : {1, 2, 5}) {
      fake::threads = threads;
      const Outcome got = run("norm_partial", {fake::handle_of(copies(tensors)), number(norm_type)});
      CHECK(close(got.result, partial) && got.dtype == fake::kFloat64, "norm_partial %g: %a, expected %a; %s",
            norm_type, got.result, partial, got.error.c_str());
      first = threads == 1 ? got.result : first;
      CHECK(same(got.result, first), "norm_partial %g: other bits with %d threads", norm_type, threads);
    }
  }
  const double max_norm = 0.1;
  const double sum_squares = run("norm_partial", {fake::handle_of(tensors), number(2)}).result;
  const double coef = clip_coef(std::sqrt(sum_squares), max_norm);
  const Outcome unowned =
      run("clip_grad_norm_", {fake::handle_of(copies(tensors)), number(max_norm), number(2), optional(fake::kFloat64)});
  CHECK(same(unowned.result, std::sqrt(sum_squares)), "clip_grad_norm_: %a; %s", unowned.result, unowned.error.c_str());
  check_write(tensors, "clip_grad_norm_", {number(max_norm), number(2), 0},
              [&](Dtype dtype, double x) { return scaled(dtype, x, coef); });
  check_write(tensors, "scale_", {number(0.25)}, [](Dtype dtype, double x) { return scaled(dtype, x, 0.25); });
  check_write(tensors, "scale_", {number(0x1.8p-140)},
              [](Dtype dtype, double x) { return scaled(dtype, x, 0x1.8p-140); });
  check_write(tensors, "scale_", {number(1)}, [](Dtype, double x) { return x; });
  check_write(tensors, "clamp_", {number(-0.5), number(0.75)},
              [](Dtype dtype, double x) { return clamped(x, rounded(dtype, -0.5), rounded(dtype, 0.75)); });
}

Tensor view(Tensor tensor, int64_t offset, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  tensor.data += offset * fake::element_size(tensor.dtype);
  tensor.sizes = std::move(sizes);
  tensor.strides = std::move(strides);
  return tensor;
}

void check_lists() {
  std::vector<Tensor> mixed;
  for (const int32_t code : kCodes) {
    const Tensor matrix = dense(code, {70, 90}), cube = dense(code, {5, 30, 40});
    const Tensor transposed = view(matrix, 0, {90, 70}, {1, 90});
    const Tensor columns = view(matrix, 3, {70, 40}, {90, 2});
    const Tensor slice = view(cube, 1200, {3, 20, 10}, {1200, 40, 3});
    const Tensor shuffled = view(cube, 0, {40, 5, 30}, {1, 1200, 40});
    const Tensor wide = dense(code, {3, 50000});
    const Tensor halves[] = {view(wide, 0, {90000}, {1}), view(wide, 60000, {90000}, {1})};
    for (const Tensor& tensor : {transposed, columns, slice, shuffled, view(wide, 0, {3, 24999}, {50000, 2})})
      check_list({tensor});
    check_list({dense(code, {0}), dense(code, {}), dense(code, {65537}, 1), dense(code, {1, 2049, 1}), slice});
    check_list({matrix, matrix});
    check_list({halves[0], halves[1], halves[0]});
    check_list({columns, view(matrix, 4, {70, 40}, {90, 2})});
    for (const Tensor& tensor : {columns, shuffled, dense(code, {200001}, 3), dense(code, {31})})
      mixed.push_back(tensor);
  }
  check_list(mixed);
  const Tensor empty = dense(fake::kFloat32, {0});
  CHECK(run("clip_grad_norm_", {fake::handle_of(std::vector{empty}), number(1), number(-kInf), 0}).result == 0,
        "empty");
  const Tensor expanded = view(dense(fake::kFloat32, {3}), 0, {4, 3}, {0, 1});
  CHECK(close(run("norm_partial", {fake::handle_of(std::vector{expanded}), number(2)}).result, norm_of({expanded}, 2)),
        "expanded");
  for (const int32_t code : {-1, int32_t{fake::kFloat64}, int32_t{fake::kBFloat16}}) {
    const Tensor x = dense(fake::kFloat16, {1000});
    const double expected = std::sqrt(norm_of({x}, 2));
    const Outcome got = run("clip_grad_norm_", {fake::handle_of(std::vector{x}), number(5), number(2), optional(code)});
    CHECK(got.dtype == (code < 0 ? int32_t{fake::kFloat16} : code), "dtype %d", got.dtype);
    CHECK(std::fabs(got.result - expected) <= expected / 256, "norm %g, expected %g", got.result, expected);
  }
}

// What must be refused leaves every byte alone.
void check_refusals() {
  const Tensor good = dense(fake::kFloat16, {100}), ints = [] {
    Tensor tensor = dense(fake::kFloat64, {4});
    tensor.dtype = fake::kInt64;
    return tensor;
  }();
  const Tensor expanded = view(dense(fake::kFloat32, {3}), 0, {4, 3}, {0, 1});
  const Tensor vector = dense(fake::kFloat32, {1});
  Tensor elsewhere = scalar(0.5);
  elsewhere.device = 1;
  const std::vector<double> before = values(good);
  const auto list = [&](const Tensor& bad) { return fake::handle_of(std::vector{good, bad, good, bad}); };
  const auto refuse = [&](const std::string& op, const std::vector<StableIValue>& arguments, const char* text) {
    const Outcome got = run(op, arguments);
    CHECK(got.error.find(text) != std::string::npos, "%s: got '%s', expected '%s'", op.c_str(), got.error.c_str(),
          text);
    CHECK(values(good) == before, "%s: written to", op.c_str());
  };
  refuse("norm_partial", {list(ints), number(2)}, "tensors[1]");
  refuse("clip_grad_norm_", {list(ints), number(0.1), number(2), optional(fake::kFloat32)}, "tensors[1]");
  refuse("clip_grad_norm_", {list(expanded), number(0.1), number(2), 0}, "tensors[1]");
  refuse("clip_grad_norm_", {list(good), number(0.1), number(2), optional(fake::kInt64)}, "dtype");
  refuse("scale_", {list(expanded), fake::handle_of(scalar(0.5))}, "tensors[1]");
  refuse("scale_", {list(good), fake::handle_of(vector)}, "clip_coef");
  refuse("scale_", {list(good), fake::handle_of(elsewhere)}, "clip_coef");
  refuse("clamp_", {list(expanded), number(-1), number(1)}, "tensors[1]");
  refuse("clamp_", {list(good), number(-1e6), number(1e6)}, "overflow");
}

// Every call into torch and every allocation fails once: an error, no handle lost, and nothing written by halves.
void check_failures() {
  const std::vector<Tensor> original = {dense(fake::kFloat32, {300000}),
                                        view(dense(fake::kFloat64, {9, 9}), 0, {9, 4}, {9, 2})};
  const auto fail_each = [&](const char* op, const std::function<std::vector<StableIValue>()>& rest) {
    const auto outcome_of = [&](const std::vector<Tensor>& tensors, Failing failing) {
      std::vector<StableIValue> stack = rest();
      stack.insert(stack.begin(), fake::handle_of(tensors));
      return run(op, stack, failing);
    };
    const std::vector<Tensor> written = copies(original);
    const Outcome right = outcome_of(written, {});
    CHECK(right.error.empty(), "%s: %s", op, right.error.c_str());
    for (const bool call : {true, false}) {
      int n = 0;
      for (bool failed = true; failed; ++n) {
        const std::vector<Tensor> tensors = copies(original);
        const Outcome got = outcome_of(tensors, call ? Failing{n, -1} : Failing{-1, n});
        failed = !got.error.empty();
        const bool whole = memory(tensors) == memory(written);
        CHECK(failed ? whole || memory(tensors) == memory(original) : whole && same(got.result, right.result),
              "%s, %s %d: written by halves; '%s'", op, call ? "call" : "allocation", n, got.error.c_str());
      }
      CHECK(n > 1, "%s: no %s failed", op, call ? "call" : "allocation");
    }
  };
  fail_each("norm_partial", [] { return std::vector{number(2)}; });
  fail_each("scale_", [] { return std::vector{fake::handle_of(scalar(0.999))}; });
  fail_each("sanitize_", [] { return std::vector<StableIValue>(); });
  fail_each("clamp_", [] { return std::vector{number(-1), number(1)}; });
  fail_each("clip_grad_norm_", [] { return std::vector{number(0.1), number(2), optional(fake::kFloat32)}; });
}

// The same where overlapping tensors take rounds: no allocation comes after the first write.
void check_failing_rounds() {
  std::vector<float> memory(3000, 3.0f);
  const int64_t size = 2000, stride = 1;
  std::vector<TensorView> views;
  for (const int64_t begin : {0, 0, 500, 1000})
    views.push_back(make_view(memory.data() + begin, Dtype::kFloat32, 1, &size, &stride));
  const auto fail_each = [&](const char* pass, const std::function<void()>& run) {
    for (int n = 0;; ++n) {
      fake::allocations_until_failure = n;
      bool failed = false;
      try {
        run();
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      fake::allocations_until_failure = -1;
      const bool unchanged = std::all_of(memory.begin(), memory.end(), [](float x) { return x == 3.0f; });
      CHECK(failed == unchanged, "%s, allocation %d: %s", pass, n, failed ? "partly written" : "not written");
      memory.assign(memory.size(), 3.0f);
      if (!failed) return;
    }
  };
  fail_each("scale", [&] { cpu::scale(views, 0.5, false); });
  fail_each("clamp", [&] { cpu::clamp(views, -1, 1); });

  // Each alone: in rounds; the last two, of which one is long, lie apart and take none.
  const double bounds[] = {1.0, 1.0, 1.0, 1.0}, coefs[] = {0.5, 0.5, 0.5, 0.5};
  double measures[4];
  for (const size_t first : {0, 2}) {
    Tensors list;
    const int64_t longer = kChunkSize + 5;
    memory.assign(2 * longer, 3.0f);
    for (size_t i = first; i < 4; ++i)
      list.add(make_view(memory.data() + (first == 0 ? 500 * i : (i - 2) * longer), Dtype::kFloat32, 1,
                         i == 3 && first == 2 ? &longer : &size, &stride));
    fail_each("scale_each", [&] { cpu::scale_each(list, coefs); });
    fail_each("clip_each", [&] { cpu::clip_each(list, 2.0, {bounds, nullptr, 0.0}, measures); });
  }
}

// In memory that cannot be written to: a pass that changes nothing must not write.
void check_read_only() {
  constexpr int64_t kCount = 300000;
  void* memory = mmap(nullptr, kCount * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED, "mmap");
  for (const Dtype dtype : kDtypes) {
    Tensor tensor{nullptr, static_cast<char*>(memory), kCodes[static_cast<int>(dtype)], 0, {kCount}, {1}};
    for (char* p : elements(tensor)) put(dtype, p, random_value());
    CHECK(mprotect(memory, kCount * 8, PROT_READ) == 0, "mprotect");
    run("clip_grad_norm_", {fake::handle_of(std::vector{tensor}), number(1e9), number(2), 0});
    run("scale_", {fake::handle_of(std::vector{tensor}), fake::handle_of(scalar(1))});
    run("clamp_", {fake::handle_of(std::vector{tensor}), number(-2), number(2)});
    tensor = view(tensor, 0, {300, 500}, {1000, 2});
    run("clamp_", {fake::handle_of(std::vector{tensor}), number(-2), number(2)});
    CHECK(mprotect(memory, kCount * 8, PROT_READ | PROT_WRITE) == 0, "mprotect");
  }
  munmap(memory, kCount * 8);
}

}  // namespace

// The compiler must not see, while inlining, that what new gave goes to free.
#define NOINLINE __attribute__((noinline))
NOINLINE void* operator new(size_t size) {
  if (fake::allocations_until_failure >= 0 && fake::allocations_until_failure-- == 0) throw std::bad_alloc();
  if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
  throw std::bad_alloc();
}
NOINLINE void* operator new(size_t size, const std::nothrow_t&) noexcept { return std::malloc(size > 0 ? size : 1); }
NOINLINE void operator delete(void* memory) noexcept { std::free(memory); }
NOINLINE void operator delete(void* memory, size_t) noexcept { std::free(memory); }

int main() {
  if (const char* error = fastclip_cpu_init()) {
    std::fprintf(stderr, "%s\n", error);
    return std::strstr(error, "FASTCLIP_CPU_ISA") != nullptr ? 77 : 1;
  }
#if !defined(__SANITIZE_THREAD__)  // no loop starts a thread
  check_all_loops();
#endif
  check_lists();
  check_refusals();
  check_failures();
  check_failing_rounds();
  check_read_only();
  std::printf("%s: %ld checks passed\n", cpu::loops().isa, checks);
}
