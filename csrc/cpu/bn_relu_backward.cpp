#include "../bn_relu_checks.h"
#include "bn_relu_driver.h"
#include "operators.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Wanted {
  bool input, residual, parameters;
};

// The coefficients of forward, and those that the sums of the gradient add to them.
template <typename A>
class Channels {
 public:
  Channels(const Geometry& g, const OptionalTensor& weight, const OptionalTensor& bias,
           const at::Tensor& save_mean, const at::Tensor& save_invstd)
      : inverse_count_(g.inverse_count()), vectors_(g.channels, 6) {
    read_channels(save_mean, vectors_[0]);
    read_channels<A>(weight, 1, g.channels, vectors_[1]);
    read_channels<A>(bias, 0, g.channels, vectors_[2]);
    read_channels(save_invstd, vectors_[3]);
    for (int64_t c = 0; c < g.channels; ++c) vectors_[1][c] *= vectors_[3][c];
  }

  // dx = scale * (g - sum_g / n - (x - mean) * invstd^2 * sum_gx / n)
  void set_sums(int64_t c, double sum_g, double sum_gx) {
    const double scale = vectors_[1][c], invstd = vectors_[3][c];
    vectors_[4][c] = static_cast<A>(-scale * invstd * invstd * sum_gx * inverse_count_);
    vectors_[5][c] = static_cast<A>(-scale * sum_g * inverse_count_);
  }

  A invstd(int64_t c) { return vectors_[3][c]; }

  template <typename T>
  Coefficients<T> coefficients(int64_t c, bool training) {
    return {vectors_[0] + c, vectors_[1] + c, vectors_[2] + c, training ? vectors_[4] + c : nullptr,
            training ? vectors_[5] + c : nullptr};
  }

 private:
  double inverse_count_;
  ChannelVectors<A> vectors_;  // mean, scale, shift, invstd, slope, offset
};

template <typename T>
class Backward {
 public:
  using A = acc_t<T>;

  Backward(const Geometry& g, const BackwardArrays<T>& arrays, Mask mask, bool training,
           Channels<A>& channels, A* grad_weight, A* grad_bias)
      : g_(g),
        reduce_(arrays),
        apply_(arrays),
        reduce_mask_(mask),
        apply_mask_(mask),
        training_(training),
        needs_sums_(grad_weight != nullptr || (training && arrays.grad_input != nullptr)),
        needs_apply_(arrays.grad_input != nullptr || !needs_sums_),
        channels_(channels),
        grad_weight_(grad_weight),
        grad_bias_(grad_bias) {
    if (needs_sums_ && arrays.grad_residual != nullptr) {
      // The reduction leaves the masked gradient in grad_residual: the second pass reads just that.
      apply_.grad_output = arrays.grad_residual;
      apply_.grad_residual = nullptr;
      apply_mask_ = Mask::kNone;
    }
  }

  void run() { g_.rows ? run_rows() : run_planes(); }

 private:
  void finish(int64_t c, double sum_g, double sum_gx) {
    channels_.set_sums(c, sum_g, sum_gx);
    if (grad_weight_ == nullptr) return;
    grad_weight_[c] = static_cast<A>(sum_gx * channels_.invstd(c));
    grad_bias_[c] = static_cast<A>(sum_g);
  }

  void run_rows() {
    const int64_t n = g_.channels;
    if (needs_sums_) {
      const std::unique_ptr<double[]> sums(new double[2 * n]());
      reduce_rows(
          g_,
          [&](int64_t row, int64_t rows, int64_t c, int64_t width, double* a, double* b) {
            std::fill_n(a, width, 0.0);
            std::fill_n(b, width, 0.0);
            kernels_.row_reduce(reduce_.at(row * n + c), g_.row_runs(rows, width),
                                channels_.template coefficients<T>(c, training_), reduce_mask_, a,
                                b);
          },
          [&](int64_t, int64_t, const double* a, const double* b) {
            for (int64_t c = 0; c < n; ++c) sums[c] += a[c], sums[n + c] += b[c];
          });
      for (int64_t c = 0; c < n; ++c) finish(c, sums[c], sums[n + c]);
    }
    if (!needs_apply_) return;
    const auto k = channels_.template coefficients<T>(0, training_);
    for_all_rows(g_, [&](int64_t begin, int64_t end) {
      kernels_.row_apply(apply_.at(begin * n), g_.row_runs(end - begin, n), k, apply_mask_);
    });
  }

  void run_planes() {
    const Runs planes = g_.channel_planes();
    at::parallel_for(0, g_.channels, grain(g_.per_channel()), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const auto k = channels_.template coefficients<T>(c, training_);
        if (needs_sums_) {
          double sum_g = 0, sum_gx = 0;
          kernels_.plane_reduce(reduce_.at(c * g_.plane), planes, k, reduce_mask_, &sum_g, &sum_gx);
          finish(c, sum_g, sum_gx);
        }
        if (needs_apply_) kernels_.plane_apply(apply_.at(c * g_.plane), planes, k, apply_mask_);
      }
    });
  }

  const BnReluBackwardKernels<T> kernels_ = FASTRES_SELECT_KERNELS(bn_relu_backward_kernels, T);
  const Geometry& g_;
  BackwardArrays<T> reduce_, apply_;
  Mask reduce_mask_, apply_mask_;
  bool training_, needs_sums_, needs_apply_;
  Channels<A>& channels_;
  A *grad_weight_, *grad_bias_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_relu_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptionalTensor& output,
    const OptionalTensor& weight, const OptionalTensor& bias, const at::Tensor& save_mean,
    const at::Tensor& save_invstd, bool training, bool relu, std::array<bool, 3> output_mask) {
  check_bn_relu_backward(grad_output, input, output, weight, bias, save_mean, save_invstd,
                         at::kCPU);
  const Wanted wanted{output_mask[0], output_mask[1], output_mask[2]};
  const Mask mask = !relu ? Mask::kNone : given(output) ? Mask::kFromOutput : Mask::kFromInput;
  const auto format = output_format(input);
  const auto x = input.contiguous(format), dy = grad_output.contiguous(format);
  const auto y = mask == Mask::kFromOutput ? output->contiguous(format) : at::Tensor();
  Geometry g(x);
  const auto statistics = input.options().dtype(accumulate_dtype(input.scalar_type()));
  const auto activation = [&](bool want) {
    return want ? empty_output(input, format) : at::empty({0}, input.options());
  };
  const auto per_channel = [&] {
    return at::empty({wanted.parameters ? g.channels : 0}, statistics);
  };
  auto grad_input = activation(wanted.input), grad_residual = activation(wanted.residual);
  g.will_write(grad_input.const_data_ptr());
  g.will_write(grad_residual.const_data_ptr());
  auto grad_weight = per_channel(), grad_bias = per_channel();
  if (!wanted.input && !wanted.residual && !wanted.parameters) {
    return {grad_input, grad_residual, grad_weight, grad_bias};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "bn_relu_backward", [&] {
        using A = acc_t<scalar_t>;
        Channels<A> channels(g, weight, bias, save_mean, save_invstd);
        const BackwardArrays<scalar_t> arrays{
            dy.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
            y.defined() ? y.const_data_ptr<scalar_t>() : nullptr,
            wanted.residual ? grad_residual.mutable_data_ptr<scalar_t>() : nullptr,
            wanted.input ? grad_input.mutable_data_ptr<scalar_t>() : nullptr};
        Backward<scalar_t>(g, arrays, mask, training, channels,
                           wanted.parameters ? grad_weight.mutable_data_ptr<A>() : nullptr,
                           wanted.parameters ? grad_bias.mutable_data_ptr<A>() : nullptr)
            .run();
      });
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace fastres::cpu
