// Which algorithm computes a convolution, and in how large pieces.
#pragma once

#include "conv_shape.h"

namespace fastres::cpu {

// kAten and kOneDnn are the libraries'; the others are the project's own: the direct product, of
// float32 values whatever the activations are or of bfloat16 values, the same for groups,
// Winograd's F(2x2, 3x3) and F(4x4, 3x3), and its polyphase form for stride 2; plain are those
// whose filters are transformed as they are multiplied.
enum class ConvAlgorithm {
  kAten,
  kOneDnn,
  kDirect,
  kDirectBf16,
  kGrouped,
  kGroupedBf16,
  kWinograd2,
  kWinograd4,
  kWinograd4Plain,
  kPolyphase,
  kPolyphasePlain
};

constexpr bool is_own(ConvAlgorithm algorithm) { return algorithm >= ConvAlgorithm::kDirect; }
constexpr bool is_winograd(ConvAlgorithm algorithm) {
  return algorithm >= ConvAlgorithm::kWinograd2;
}

constexpr bool is_plain(ConvAlgorithm algorithm) {
  return algorithm == ConvAlgorithm::kWinograd4Plain || algorithm == ConvAlgorithm::kPolyphasePlain;
}

constexpr bool is_strided(ConvAlgorithm algorithm) {
  return algorithm >= ConvAlgorithm::kPolyphase;
}

constexpr bool is_grouped(ConvAlgorithm algorithm) {
  return algorithm == ConvAlgorithm::kGrouped || algorithm == ConvAlgorithm::kGroupedBf16;
}

// Neighbouring input channels that are multiplied in one lane.
constexpr int64_t channels_a_lane(ConvAlgorithm algorithm) {
  using enum ConvAlgorithm;
  return algorithm == kDirectBf16 || algorithm == kGroupedBf16 ? 2 : 1;
}

// Of a Winograd algorithm, for filters of this size.
WinogradForm winograd_form(ConvAlgorithm algorithm, int64_t filter);

const char* name_of(ConvAlgorithm algorithm);

// Whether an algorithm of the project's own computes such a convolution. kGrouped takes any groups,
// the others one. Winograd takes filters without dilation: 3x3 at stride 1, 3x3 and 7x7 at
// stride 2.
bool can_compute(ConvAlgorithm algorithm, const ConvShape& shape);

struct ConvChoice {
  int64_t panel;  // output channels that are computed together
  bool onednn;    // its convolutions are an alternative
  bool pack;      // the filters have to be packed for this one call
  bool bf16;      // so are products of bfloat16
};

// The largest tile that Winograd may use, for the whole process: larger ones save more work and
// round more. 0 for none of them; without a limit at first.
void limit_winograd_tile(int64_t pixels);
int64_t largest_winograd_tile();

// The fastest by a model of the work and of the traffic of weights.
ConvAlgorithm choose_algorithm(const ConvShape& shape, const ConvChoice& choice);

// A convolution in jobs: `rows` (pixels, tiles or, of groups, rows of the output) in `blocks`,
// panels in `splits`.
struct ConvJobs {
  int64_t rows, blocks, panels, splits;

  int64_t count() const { return blocks * splits; }
  int64_t block_rows() const { return ceil_div(rows, blocks); }

  // The job of a thread that computes [job, end). What comes then is another thread's: to fetch the
  // input of that would take it from the cache that it is in, and who writes there next wait.
  ConvJob at(int64_t job, int64_t end) const {
    const int64_t block = job / splits, next = (job + 1) / splits;
    return {part(rows, blocks, block), part(panels, splits, job % splits),
            next > block && job + 1 < end ? part(rows, blocks, next) : Range{0, 0}};
  }

  static Range part(int64_t total, int64_t parts, int64_t i) {
    return {total * i / parts, total * (i + 1) / parts};
  }
};

ConvJobs plan_jobs(const ConvShape& shape, ConvAlgorithm algorithm, int64_t panel, int64_t threads);

}  // namespace fastres::cpu
