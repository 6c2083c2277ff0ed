#include "bn_relu.h"

#include <cmath>

#include "../bn_relu_checks.h"
#include "bn_relu_driver.h"
#include "operators.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// What the kernels need to know of each channel.
template <typename A>
class Channels {
 public:
  Channels(const Geometry& g, const OptionalTensor& weight, const OptionalTensor& bias,
           double eps = 0, A* save_mean = nullptr, A* save_invstd = nullptr)
      : channels_(g.channels),
        inverse_count_(g.inverse_count()),
        inverse_unbiased_(1.0 / static_cast<double>(g.per_channel() - 1)),
        eps_(eps),
        vectors_(g.channels, 4),
        save_mean_(save_mean),
        save_invstd_(save_invstd) {
    read_channels<A>(weight, 1, channels_, vectors_[1]);
    read_channels<A>(bias, 0, channels_, vectors_[2]);
  }

  // Statistics of this batch, from the sum and the sum of squared deviations of channel c.
  void set_batch(int64_t c, double sum, double m2) {
    vectors_[3][c] = static_cast<A>(m2 * inverse_unbiased_);
    set(c, sum * inverse_count_, m2 * inverse_count_);
  }

  void set_running(const at::Tensor& mean, const at::Tensor& var) {
    read_channels(mean, vectors_[0]);
    read_channels(var, vectors_[3]);
    for (int64_t c = 0; c < channels_; ++c) set(c, vectors_[0][c], vectors_[3][c]);
  }

  void set_known(const at::Tensor& mean, const at::Tensor& invstd) {
    read_channels(mean, vectors_[0]);
    read_channels(invstd, vectors_[3]);
    for (int64_t c = 0; c < channels_; ++c) vectors_[1][c] *= vectors_[3][c];
  }

  // r = (1 - momentum) * r + momentum * s, s being this batch's mean or unbiased variance.
  void update_running(const BnReluArguments& a) {
    if (given(a.running_mean)) update(*a.running_mean, vectors_[0], a.momentum);
    if (given(a.running_var)) update(*a.running_var, vectors_[3], a.momentum);
  }

  template <typename T>
  Coefficients<T> coefficients(int64_t c) {
    return {vectors_[0] + c, vectors_[1] + c, vectors_[2] + c, nullptr, nullptr};
  }

 private:
  void set(int64_t c, double mean, double var) {
    const A invstd = static_cast<A>(1.0 / std::sqrt(var + eps_));
    vectors_[0][c] = save_mean_[c] = static_cast<A>(mean);
    save_invstd_[c] = invstd;
    vectors_[1][c] *= invstd;
  }

  void update(const at::Tensor& running, const A* batch, double momentum) {
    running.unsafeGetTensorImpl()->bump_version();
    const A m = static_cast<A>(momentum);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, running.scalar_type(), "update_running", [&] {
          auto* p = running.mutable_data_ptr<scalar_t>();
          const int64_t stride = running.stride(0);
          for (int64_t c = 0; c < channels_; ++c) {
            scalar_t& r = p[c * stride];
            r = static_cast<scalar_t>((1 - m) * static_cast<A>(r) + m * batch[c]);
          }
        });
  }

  int64_t channels_;
  double inverse_count_, inverse_unbiased_, eps_;
  ChannelVectors<A> vectors_;  // mean, scale, shift, variance
  A *save_mean_, *save_invstd_;
};

template <typename T>
void row_statistics(const Geometry& g, const T* x, const BnReluKernels<T>& kernels,
                    Channels<acc_t<T>>& channels) {
  const int64_t n = g.channels;
  const std::unique_ptr<double[]> moments(new double[2 * n]());
  double *sum = moments.get(), *m2 = sum + n;
  reduce_rows(
      g,
      [&](int64_t row, int64_t rows, int64_t c, int64_t width, double* a, double* b) {
        kernels.row_moments(x + row * n + c, g.row_runs(rows, width), a, b);
      },
      [&](int64_t before, int64_t rows, const double* a, const double* b) {
        const MomentsMerge merge(before, rows);
        for (int64_t c = 0; c < n; ++c) {
          const double delta = a[c] * merge.inverse_b - sum[c] * merge.inverse_a;
          m2[c] += b[c] + delta * delta * merge.weight;
          sum[c] += a[c];
        }
      });
  for (int64_t c = 0; c < n; ++c) channels.set_batch(c, sum[c], m2[c]);
}

// How far apart the rows of a channels_last activation are: its channels, or more where it is a
// slice of channels of a larger one (a DenseNet's layers read the first of a common buffer). None
// for other strides.
std::optional<int64_t> row_stride(const at::Tensor& x) {
  if (x.size(1) < 2 || x.stride(1) != 1) return std::nullopt;
  int64_t stride = x.size(1);
  for (const int64_t d : {0, 2, 3}) {  // the innermost map dimension that has a stride to speak of
    if (x.size(d) > 1) stride = x.stride(d);
  }
  int64_t expected = stride;
  for (const int64_t d : {3, 2, 0}) {
    if (x.size(d) > 1 && x.stride(d) != expected) return std::nullopt;
    expected *= x.size(d);
  }
  return stride >= x.size(1) ? std::optional(stride) : std::nullopt;
}

// An activation as the kernels read it: rows may lie further apart than their channels.
struct Input {
  at::Tensor values;
  int64_t stride;
  bool sliced;

  Input(const at::Tensor& input, bool may_be_sliced) {
    const auto format = output_format(input);
    sliced = may_be_sliced && format == at::MemoryFormat::ChannelsLast &&
             !input.is_contiguous(format) && row_stride(input);
    values = sliced ? input : input.contiguous(format);
    stride = sliced ? *row_stride(input) : input.size(1);
  }

  Geometry geometry(const at::Tensor& output) const {
    Geometry g(values);
    g.will_write(output.const_data_ptr());
    g.stream = g.stream && !sliced;  // rows are written one by one, and each would end in a fence
    return g;
  }
};

template <typename T>
void apply_rows(const Geometry& g, const T* x, int64_t stride, const T* residual, T* y, bool relu,
                const BnReluKernels<T>& kernels, Channels<acc_t<T>>& channels) {
  const auto k = channels.template coefficients<T>(0);
  for_all_rows(g, [&](int64_t begin, int64_t end) {
    if (stride != g.channels) {
      for (int64_t row = begin; row < end; ++row) {
        kernels.row_apply(x + row * stride, nullptr, y + row * g.channels,
                          g.row_runs(1, g.channels), k, relu);
      }
      return;
    }
    const int64_t i = begin * g.channels;
    kernels.row_apply(x + i, residual ? residual + i : nullptr, y + i,
                      g.row_runs(end - begin, g.channels), k, relu);
  });
}

// From known statistics, or in training from this batch's.
template <typename T>
void forward(const Geometry& g, const T* x, int64_t stride, const T* residual, T* y, bool training,
             bool relu, Channels<acc_t<T>>& channels) {
  static const auto kernels = FASTRES_SELECT_KERNELS(bn_relu_kernels, T);
  if (g.rows) {
    if (training) row_statistics(g, x, kernels, channels);
    apply_rows(g, x, stride, residual, y, relu, kernels, channels);
    return;
  }
  at::parallel_for(0, g.channels, grain(g.per_channel()), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = c * g.plane;
      if (training) {
        double sum, m2;
        kernels.plane_moments(x + i, g.channel_planes(), &sum, &m2);
        channels.set_batch(c, sum, m2);
      }
      kernels.plane_apply(x + i, residual ? residual + i : nullptr, y + i, g.channel_planes(),
                          channels.template coefficients<T>(c), relu);
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu(
    const at::Tensor& input, const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
    bool training, double momentum, double eps, bool relu) {
  const BnReluArguments a{running_mean, running_var, weight, bias, training, momentum, eps, relu};
  check_bn_relu(input, residual, a, at::kCPU);
  const Input x(input, /*may_be_sliced=*/!training && !given(residual));
  const auto format = output_format(input);
  const auto r = given(residual) ? residual->contiguous(format) : at::Tensor();
  auto output = empty_output(input, format);
  const auto g = x.geometry(output);
  const auto statistics = input.options().dtype(accumulate_dtype(input.scalar_type()));
  auto save_mean = at::empty({g.channels}, statistics);
  auto save_invstd = at::empty({g.channels}, statistics);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "bn_relu", [&] {
    using A = acc_t<scalar_t>;
    Channels<A> channels(g, weight, bias, eps, save_mean.mutable_data_ptr<A>(),
                         save_invstd.mutable_data_ptr<A>());
    if (!training) channels.set_running(*running_mean, *running_var);
    forward<scalar_t>(g, x.values.const_data_ptr<scalar_t>(), x.stride,
                      r.defined() ? r.const_data_ptr<scalar_t>() : nullptr,
                      output.mutable_data_ptr<scalar_t>(), training, relu, channels);
    if (training && g.numel() > 0) channels.update_running(a);
  });
  return {output, save_mean, save_invstd};
}

at::Tensor bn_relu_apply(const at::Tensor& input, const OptionalTensor& residual,
                         const at::Tensor& mean, const at::Tensor& invstd,
                         const OptionalTensor& weight, const OptionalTensor& bias, bool relu) {
  check_bn_relu_apply(input, residual, mean, invstd, weight, bias, at::kCPU);
  const auto format = output_format(input);
  const Input x(input, /*may_be_sliced=*/!given(residual));
  const auto r = given(residual) ? residual->contiguous(format) : at::Tensor();
  auto output = empty_output(input, format);
  const auto g = x.geometry(output);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "bn_relu", [&] {
    Channels<acc_t<scalar_t>> channels(g, weight, bias);
    channels.set_known(mean, invstd);
    forward<scalar_t>(g, x.values.const_data_ptr<scalar_t>(), x.stride,
                      r.defined() ? r.const_data_ptr<scalar_t>() : nullptr,
                      output.mutable_data_ptr<scalar_t>(), /*training=*/false, relu, channels);
  });
  return output;
}

}  // namespace fastres::cpu
