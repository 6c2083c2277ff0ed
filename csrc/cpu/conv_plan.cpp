#include "conv_plan.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "capability.h"

namespace fastres::cpu {
namespace {

// Packed rows of a block: they share the second-level cache with the panel that they meet.
constexpr int64_t kBlockValues = 256 * 1024;
constexpr int64_t kBlockRows = 112;
constexpr int64_t kBlockTiles = 56;  // their sums are as many again
// Rows below which another split of the channels serves better than another block.
constexpr int64_t kLeastRows = 28;

// A core's cycles, for comparing one algorithm with another. Measured on a Xeon of the Sapphire
// Rapids family; with narrower vectors all of them take longer alike.
constexpr double kMultiplyAdds = 32;       // a cycle
constexpr double kBytes = 7;               // a cycle, of weights that are in no cache of the core
constexpr double kTransformCycles = 0.25;  // a value of a transformed tile, in or out
constexpr double kPackCycles = 3;          // a value of Winograd's filters

std::atomic<int64_t> largest_tile{std::numeric_limits<int64_t>::max()};

struct Work {
  int64_t rows, depth, positions;  // of the product: positions x (rows x depth x K)
};

Work work_of(const ConvShape& shape, ConvAlgorithm algorithm) {
  if (const int64_t m = winograd_tile(algorithm)) {
    const WinogradGrid grid(shape, m);
    return {grid.tiles(shape), round_up(shape.c, kChunk), grid.positions()};
  }
  const int64_t c = algorithm == ConvAlgorithm::kDirectBf16 ? in_pairs(shape).c : shape.c;
  return {shape.pixels(), round_up(shape.taps() * c, kChunk), 1};
}

double cycles(const ConvShape& shape, ConvAlgorithm algorithm, const ConvChoice& choice) {
  const auto work = work_of(shape, algorithm);
  const auto rows = static_cast<double>(work.rows);
  const auto depth = static_cast<double>(work.depth * work.positions);
  const auto outputs = static_cast<double>(round_up(shape.k, choice.panel));
  const auto sums = rows * static_cast<double>(work.positions) * outputs;
  const bool pack = choice.pack && winograd_tile(algorithm) != 0;
  return rows * depth * outputs / kMultiplyAdds + depth * outputs * sizeof(float) / kBytes +
         (rows * depth + sums) * kTransformCycles + (pack ? depth * outputs * kPackCycles : 0);
}

}  // namespace

const char* name_of(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::kAten:
      return "aten";
    case ConvAlgorithm::kOneDnn:
      return "onednn";
    case ConvAlgorithm::kDirect:
      return "direct";
    case ConvAlgorithm::kDirectBf16:
      return "direct_bf16";
    case ConvAlgorithm::kWinograd2:
      return "winograd2";
    case ConvAlgorithm::kWinograd4:
      return "winograd4";
  }
  return "";
}

bool is_winograd_shape(const ConvShape& shape) {
  constexpr Pair kOnes{1, 1};
  return shape.r == 3 && shape.s == 3 && shape.stride == kOnes && shape.dilation == kOnes;
}

void limit_winograd_tile(int64_t pixels) { largest_tile = pixels; }

ConvAlgorithm choose_algorithm(const ConvShape& shape, const ConvChoice& choice) {
  using enum ConvAlgorithm;
  if (capability() == Capability::kDefault) return kOneDnn;
  const bool bf16 = choice.bf16 && shape.c % 2 == 0;
  const int64_t largest = largest_tile.load(std::memory_order_relaxed);
  if (is_winograd_shape(shape) && largest > 0) {
    const auto cost = [&](ConvAlgorithm a) {
      if (winograd_tile(a) > largest) return std::numeric_limits<double>::infinity();
      return cycles(shape, a, choice);
    };
    return std::min({bf16 ? kDirectBf16 : kDirect, kWinograd2, kWinograd4},
                    [&](auto a, auto b) { return cost(a) < cost(b); });
  }
  if (bf16) return kDirectBf16;
  // Where every value is gathered once, that costs less than it saves; oneDNN gathers nothing.
  return shape.taps() == 1 || !choice.onednn ? kDirect : kOneDnn;
}

ConvJobs plan_jobs(const ConvShape& shape, ConvAlgorithm algorithm, int64_t panel,
                   int64_t threads) {
  const auto work = work_of(shape, algorithm);
  const int64_t panels = ceil_div(shape.k, panel);
  const int64_t most_rows = winograd_tile(algorithm) == 0 ? kBlockRows : kBlockTiles;
  const int64_t most =
      std::clamp(kBlockValues / (work.depth * work.positions), int64_t{14}, most_rows);
  int64_t blocks = std::max(ceil_div(work.rows, most), std::min(threads, work.rows / kLeastRows));
  if (blocks > threads) blocks = std::min(round_up(blocks, threads), work.rows);
  blocks = std::max(blocks, int64_t{1});
  return {work.rows, blocks, panels, std::min(panels, ceil_div(threads, blocks))};
}

}  // namespace fastres::cpu
