#include "conv_plan.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "capability.h"
#include "conv_grouped.h"

namespace fastres::cpu {
namespace {

// Packed rows of a block: they share the second-level cache with the panel that they meet.
// Winograd's lie there one position at a time, and its weights are so many that fewer blocks are
// worth more.
constexpr int64_t kBlockValues = 256 * 1024, kWinogradBlockValues = 512 * 1024;
constexpr int64_t kMostPixels = 112;
// Rows below which another split of the channels serves better than another block, and below which
// another thread costs more than it takes over.
constexpr int64_t kLeastRows = 28, kFewestRows = 7;
// Rows of the output that grouped convolutions compute from one packed part of the input.
constexpr int64_t kMostOutputRows = 14;
// Channels of a group up to which they are ahead of oneDNN's in inference, as measured on Zen 4.
constexpr int64_t kWidestGroup = 64;

// A core's cycles, for comparing one algorithm with another. Measured on a Xeon of the Sapphire
// Rapids family and on Zen 4.
constexpr double kBytes = 7;      // a cycle, of weights that are in no cache of the core
constexpr double kTransform = 8;  // multiply-adds' time, a value of a transformed tile, in or out
constexpr double kPack = 96;      // multiply-adds' time, a value of Winograd's filters
constexpr double kPlain = 1.3;    // times as long, where filters are transformed anew for few tiles

std::atomic<int64_t> largest_tile{std::numeric_limits<int64_t>::max()};

struct Work {
  int64_t rows, depth, positions;  // of the products, one a position; their depth in all
  double share = 1;                // of the rows that a position has, on average
};

Work work_of(const ConvShape& shape, ConvAlgorithm algorithm) {
  if (is_winograd(algorithm)) {
    const auto form = winograd_form(algorithm, shape.r);
    const WinogradGrid grid(shape, form);
    const int64_t tiles = grid.tiles(shape), products = grid.products(shape, form);
    return {tiles, form.depth(shape.c), form.positions(),
            static_cast<double>(products) / static_cast<double>(tiles * form.positions())};
  }
  if (is_grouped(algorithm)) return {shape.n * shape.p, shape.taps() * shape.c / shape.groups, 1};
  const int64_t c = shape.c / channels_a_lane(algorithm);
  return {shape.pixels(), round_up(shape.taps() * c, kChunk), 1};
}

double cycles(const ConvShape& shape, ConvAlgorithm algorithm, const ConvChoice& choice) {
  const auto work = work_of(shape, algorithm);
  const auto rows = static_cast<double>(work.rows) * work.share;
  const auto depth = static_cast<double>(work.depth);
  const auto outputs = static_cast<double>(round_up(shape.k, choice.panel / 2));
  const auto sums = rows * static_cast<double>(work.positions) * outputs;
  const bool pack = choice.pack && is_winograd(algorithm);
  const bool plain = is_plain(algorithm);
  const auto filters = outputs * static_cast<double>(plain ? plain_depth(shape.c) : work.depth);
  const double products = rows * depth * outputs * (plain ? kPlain : 1) +
                          (rows * depth + sums) * kTransform + (pack ? filters * kPack : 0);
  return products / multiply_adds() + filters * sizeof(float) / kBytes;
}

ConvAlgorithm choose_grouped(const ConvShape& shape, const ConvChoice& choice) {
  using enum ConvAlgorithm;
  const auto own = choice.bf16 && can_compute(kGroupedBf16, shape) ? kGroupedBf16 : kGrouped;
  const GroupedForm form(shape, choice.panel / 2, channels_a_lane(own));
  if (2 * shape.k < form.panels() * form.panel()) return kOneDnn;  // most lanes idle
  if (!choice.onednn) return own;
  // oneDNN is ahead where a group is one channel, and where whole vectors of channels leave it all
  // to multiplying. In training, without the epilogue and with filters to pack, that is earlier.
  if (form.outputs == 1) return kOneDnn;
  const bool ahead = choice.pack ? form.is_narrow() && (shape.stride[1] == 1 || !choice.bf16)
                                 : form.outputs <= kWidestGroup;
  return ahead ? own : kOneDnn;
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
    case ConvAlgorithm::kGrouped:
      return "grouped";
    case ConvAlgorithm::kGroupedBf16:
      return "grouped_bf16";
    case ConvAlgorithm::kWinograd2:
      return "winograd2";
    case ConvAlgorithm::kWinograd4:
      return "winograd4";
    case ConvAlgorithm::kWinograd4Plain:
      return "winograd4_plain";
    case ConvAlgorithm::kPolyphase:
      return "polyphase";
    case ConvAlgorithm::kPolyphasePlain:
      return "polyphase_plain";
  }
  return "";
}

WinogradForm winograd_form(ConvAlgorithm algorithm, int64_t filter) {
  if (algorithm == ConvAlgorithm::kWinograd2) return {2, 3, 1};
  if (!is_strided(algorithm)) return {4, 3, 1};
  return filter == 3 ? WinogradForm{4, 2, 2} : WinogradForm{3, 4, 2};
}

bool can_compute(ConvAlgorithm algorithm, const ConvShape& shape) {
  if (!is_own(algorithm) || capability() == Capability::kDefault) return false;
  if (is_grouped(algorithm) != (shape.groups > 1)) return false;
  if (channels_a_lane(algorithm) == 2) {
    return bfloat16_unit() == Bfloat16Unit::kVector && shape.c / shape.groups % 2 == 0;
  }
  if (!is_winograd(algorithm)) return true;
  const int64_t stride = is_strided(algorithm) ? 2 : 1;
  if (shape.dilation != Pair{1, 1} || shape.stride != Pair{stride, stride} || shape.r != shape.s) {
    return false;
  }
  if (is_plain(algorithm) && winograd_form(algorithm, 3).shares_chunk(shape.c)) return false;
  return shape.r == 3 || (algorithm == ConvAlgorithm::kPolyphase && shape.r == 7);
}

void limit_winograd_tile(int64_t pixels) { largest_tile = pixels; }

int64_t largest_winograd_tile() { return largest_tile.load(std::memory_order_relaxed); }

ConvAlgorithm choose_algorithm(const ConvShape& shape, const ConvChoice& choice) {
  using enum ConvAlgorithm;
  if (capability() == Capability::kDefault) return kOneDnn;
  if (shape.groups > 1) return choose_grouped(shape, choice);
  const auto direct = choice.bf16 && can_compute(kDirectBf16, shape) ? kDirectBf16 : kDirect;
  const int64_t largest = largest_winograd_tile();
  // Without the registers for four tiles, transforming filters would take too large a share.
  const bool plain = capability() == Capability::kAvx512 && !choice.pack;
  const auto cost = [&](ConvAlgorithm a) {
    if (is_winograd(a) && winograd_form(a, shape.r).m > largest) {
      return std::numeric_limits<double>::infinity();
    }
    return cycles(shape, a, choice);
  };
  if (can_compute(kWinograd4, shape) && largest > 0) {
    return std::min({direct, kWinograd2, kWinograd4, plain ? kWinograd4Plain : kWinograd4},
                    [&](auto a, auto b) { return cost(a) < cost(b); });
  }
  // Of few channels, 3x3 filters leave little to save, and larger ones less than oneDNN's products
  // of bfloat16 do (7x7: 5.9 against 6.7 ms, of 8 images).
  const bool onednn_bf16 = choice.bf16 && choice.onednn && choice.pack;
  const bool worthwhile = shape.r > 3 ? !onednn_bf16 : shape.c >= kChunk;
  if (worthwhile && can_compute(kPolyphase, shape)) {
    const bool few =
        plain && can_compute(kPolyphasePlain, shape) && cost(kPolyphasePlain) < cost(kPolyphase);
    const auto own = few ? kPolyphasePlain : kPolyphase;
    if (cost(own) < cost(direct)) return own;
  }
  if (direct == kDirectBf16) return direct;
  // Where every value is gathered once, that costs less than it saves; oneDNN gathers nothing.
  return shape.taps() == 1 || !choice.onednn ? kDirect : kOneDnn;
}

ConvJobs plan_jobs(const ConvShape& shape, ConvAlgorithm algorithm, int64_t panel,
                   int64_t threads) {
  const auto work = work_of(shape, algorithm);
  const int64_t panels = is_grouped(algorithm)
                             ? GroupedForm(shape, panel / 2, channels_a_lane(algorithm)).panels()
                             : ceil_div(shape.k, panel);
  const bool winograd = is_winograd(algorithm);
  const int64_t most_rows = winograd                ? kMostTiles
                            : is_grouped(algorithm) ? kMostOutputRows
                                                    : kMostPixels;
  const int64_t values = winograd ? kWinogradBlockValues : kBlockValues;
  const int64_t most = std::clamp(values / work.depth, int64_t{14}, most_rows);
  const int64_t idle = ceil_div(threads, panels);  // blocks that threads without a panel could take
  int64_t blocks = std::max({ceil_div(work.rows, most), std::min(threads, work.rows / kLeastRows),
                             std::min(idle, work.rows / kFewestRows)});
  if (blocks > threads) blocks = std::min(round_up(blocks, threads), work.rows);
  blocks = std::max(blocks, int64_t{1});
  return {work.rows, blocks, panels, std::min(panels, ceil_div(threads, blocks))};
}

}  // namespace fastres::cpu
