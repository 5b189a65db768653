// What the kernels take, for the device code that defines them and the host code that launches them. kernels.def has
// the list of them.
#pragma once

#include "chunk_table.h"

// Other values are for .ci/gpu sweep.
#ifndef FASTCLIP_THREADS
#define FASTCLIP_THREADS 256
#endif

namespace fastclip::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = FASTCLIP_THREADS;
constexpr int kBlocks = 1024 / kThreads;  // that a multiprocessor has to hold
constexpr int kFinishThreads = 1024;

struct NormArguments {
  double* partials;
  double p;
};

// kExtreme is max, min or count, by p: inf, -inf, 0. kPowNorm has the norms of chunks as partials. The wide ones sum in
// float64 throughout, for GPUs that add it at half the rate of float32.
enum class NormPass { kSquares, kAbs, kExtreme, kPow, kPowNorm, kWideSquares, kWideAbs };

// One tensor with holes.
struct StridedNormArguments {
  NormArguments own;
  NormKind kind;
  bool are_norms;
  StridedTable table;
};

struct FinishArguments {
  const double* partials;
  int64_t slots;
  Clip clip;
  Number norm;
  double* clip_coef;  // null: not asked for
  NormKind kind;
};

// What becomes of the partials: their combination, the norm by its root, or the norm of kPow where they are norms.
enum class Finish { kPartial, kRoot, kCombineNorms };

// Tensors in a row of the list, each with its own slots.
struct FinishEachArguments {
  const double* partials;
  double* norms;
  double p;
  uint32_t tensors;
  NormKind kind;
  bool are_norms;
  uint32_t ends[LongTable::kCapacity];  // slots of a tensor and of all before it
};

// Of each chunk the sum of squares, and beside it the largest magnitude and two counts.
struct StatsArguments {
  double* squares;
  double* more;
};
struct StridedStatsArguments {
  StatsArguments own;
  StridedTable table;
};
struct FinishStatsArguments {
  StatsArguments own;
  double* table;
  uint32_t tensors;
  uint32_t ends[LongTable::kCapacity];    // slots of a tensor and of all before it
  uint32_t places[LongTable::kCapacity];  // of its row
};

// A coefficient: `number`, or that of clipping a norm that it is to `value`, or `value` where there is none.
struct ScaleArguments {
  const void* number;
  double value;
  Dtype dtype;  // of the number
  bool is_norm;
  bool zero;  // whether a coefficient of 0 makes zeros also of inf and NaN
};

struct Bounds {
  double low, high;
};

struct SanitizeArguments {};

// One tensor with holes.
enum class Write : uint8_t { kScale, kClamp, kSanitize };
struct StridedWriteArguments {
  Write write;
  ScaleArguments scale;
  Bounds bounds;
  StridedTable table;
};

}  // namespace fastclip::cuda
