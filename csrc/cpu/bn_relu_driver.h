// How bn_relu and bn_relu_backward walk over an activation: layouts, tasks, per-channel vectors.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "../checks.h"
#include "bn_relu.h"

namespace fastres::cpu {

// An activation as `batch` planes of `plane` pixels per channel, or as rows of `channels` values.
struct Geometry {
  int64_t batch, channels, plane;
  bool rows, stream;

  // What is too large to stay in the cache until it is read again is written around it: an ordinary
  // store reads the line first.
  static constexpr int64_t kStreamBytes = int64_t{4} << 20;

  explicit Geometry(const at::Tensor& input)
      : batch(input.size(0)),
        channels(input.size(1)),
        plane(input.size(2) * input.size(3)),
        rows(output_format(input) == at::MemoryFormat::ChannelsLast || plane == 1) {
    if (channels == 1) {  // one plane, whatever the strides say
      plane *= batch;
      batch = 1;
      rows = false;
    }
    const int64_t item = static_cast<int64_t>(input.itemsize());
    stream = numel() * item >= kStreamBytes && (rows ? channels : plane) * item % 64 == 0;
  }

  // The kernels stream to multiples of 64 bytes only. ATen's allocator gives such, others may not.
  void will_write(const void* p) { stream = stream && reinterpret_cast<uintptr_t>(p) % 64 == 0; }

  int64_t per_channel() const { return batch * plane; }
  // 1 / n for means over a channel; 0 where there is none, so that means and gradients are 0.
  double inverse_count() const {
    return per_channel() > 0 ? 1.0 / static_cast<double>(per_channel()) : 0.0;
  }
  int64_t numel() const { return batch * plane * channels; }

  Runs row_runs(int64_t count, int64_t width) const { return {count, width, channels, stream}; }
  Runs channel_planes() const { return {batch, plane, channels * plane, stream}; }
};

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 16384;

inline int64_t grain(int64_t elements_per_task) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_task));
}

// A reduction over rows is cut into segments of rows and blocks of channels, by the shape alone, so
// that the order of summation is the same for any number of threads.
struct RowTasks {
  static constexpr int64_t kTasks = 32;  // enough for the threads of one socket
  int64_t blocks, segments, rows_per_segment;

  explicit RowTasks(const Geometry& g) : blocks((g.channels + kRowBlock - 1) / kRowBlock) {
    const int64_t width = std::clamp<int64_t>(g.channels, 1, kRowBlock);
    const int64_t least = std::max<int64_t>(1, 2 * kGrain / width);
    const int64_t wanted = std::max<int64_t>(1, kTasks / blocks);
    rows_per_segment = std::max(least, (g.per_channel() + wanted - 1) / wanted);
    segments = (g.per_channel() + rows_per_segment - 1) / rows_per_segment;
  }
};

// Runs f(first row, rows, first channel, channels, a, b) for every task, a and b being the two
// partial sums of its channels, then merge(c, segment, rows before, rows, a, b) in row order.
template <typename F, typename Merge>
void reduce_rows(const Geometry& g, const F& f, const Merge& merge) {
  const RowTasks tasks(g);
  const int64_t rows = g.per_channel();
  const std::unique_ptr<double[]> partial(new double[tasks.segments * 2 * g.channels]);
  const auto rows_in = [&](int64_t s) {
    return std::min(tasks.rows_per_segment, rows - s * tasks.rows_per_segment);
  };
  const int64_t work = tasks.rows_per_segment * std::min(g.channels, kRowBlock);
  at::parallel_for(0, tasks.segments * tasks.blocks, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t s = t / tasks.blocks, c = t % tasks.blocks * kRowBlock;
      double* a = partial.get() + s * 2 * g.channels + c;
      f(s * tasks.rows_per_segment, rows_in(s), c, std::min(kRowBlock, g.channels - c), a,
        a + g.channels);
    }
  });
  for (int64_t s = 0; s < tasks.segments; ++s) {
    const double* a = partial.get() + s * 2 * g.channels;
    merge(s * tasks.rows_per_segment, rows_in(s), a, a + g.channels);
  }
}

// Runs f(first row, end) over all rows, in parallel.
template <typename F>
void for_all_rows(const Geometry& g, const F& f) {
  at::parallel_for(0, g.per_channel(), grain(g.channels), f);
}

// Vectors of a value per channel, padded as the kernels need them.
template <typename A>
class ChannelVectors {
 public:
  ChannelVectors(int64_t channels, int count)
      : stride_(channels + kChannelPadding), data_(new A[stride_ * count]()) {}

  A* operator[](int i) { return data_.get() + i * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<A[]> data_;
};

// Copies a checked per-channel tensor of any supported dtype and stride to out.
template <typename A>
void read_channels(const at::Tensor& t, A* out) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.scalar_type(), "read_channels", [&] {
    const auto* p = t.const_data_ptr<scalar_t>();
    const int64_t n = t.size(0), stride = t.stride(0);
    for (int64_t c = 0; c < n; ++c) out[c] = static_cast<A>(p[c * stride]);
  });
}

template <typename A>
void read_channels(const std::optional<at::Tensor>& t, A missing, int64_t channels, A* out) {
  if (given(t)) {
    read_channels(*t, out);
  } else {
    std::fill_n(out, channels, missing);
  }
}

}  // namespace fastres::cpu
