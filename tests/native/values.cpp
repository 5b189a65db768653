// Clips what it reads, for .ci/check_values.py to compare: values DTYPE MAX_NORM COEF BOUND NORM_TYPE... < elements.
// Writes for each order the norm, a float64, and the elements clipped by it; then the elements times COEF, and clipped
// by value.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "../../csrc/cpu/loops.h"
#include "../../csrc/cpu/passes.h"
#include "fake_torch.h"

using namespace fastclip;

int main(int argc, char** argv) try {
  const auto dtype = static_cast<Dtype>(std::atoi(argv[1]));
  const double max_norm = std::atof(argv[2]), coef = std::atof(argv[3]), bound = std::atof(argv[4]);
  std::vector<char> elements;
  for (int c; (c = std::getchar()) != EOF;) elements.push_back(static_cast<char>(c));
  const auto with_copy = [&](const auto& clip) {
    std::vector<char> memory = elements;
    const int64_t numel = static_cast<int64_t>(memory.size()) / element_size(dtype), stride = 1;
    std::vector<TensorView> views;
    views.push_back(make_view(memory.data(), dtype, 1, &numel, &stride));
    clip(views);
    std::fwrite(memory.data(), 1, memory.size(), stdout);
  };
  for (int i = 5; i < argc; ++i)
    with_copy([&](const std::vector<TensorView>& views) {
      const double norm = cpu::total_norm(views, std::atof(argv[i]));
      std::fwrite(&norm, sizeof(norm), 1, stdout);
      cpu::scale(views, clip_coef(norm, max_norm), false);
    });
  with_copy([&](const std::vector<TensorView>& views) { cpu::scale(views, coef, false); });
  with_copy([&](const std::vector<TensorView>& views) { cpu::clamp(views, -bound, bound); });
  std::fputs(cpu::loops().isa, stderr);
} catch (const std::exception& e) {
  std::fputs(e.what(), stderr);
  return 1;
}
