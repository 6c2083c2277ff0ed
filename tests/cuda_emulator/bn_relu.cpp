// bn_relu and bn_relu_backward of csrc/cuda, emulated; called through ctypes.
#include "../../csrc/cuda/bn_relu_backward.cuh"
#include "calls.h"

using namespace fastres::cuda;

namespace {

// n, c, pixels, channels_last, multiprocessors
Activation activation(const int64_t* shape) {
  return Activation::of(shape[0], shape[1], shape[2], shape[3] != 0);
}

template <typename T>
void forward(const int64_t* shape, void** p, double momentum, double eps, bool training,
             bool relu) {
  using A = acc_t<T>;
  const auto v = [&](int i) { return static_cast<A*>(p[i]); };
  const Activation a = activation(shape);
  BnRelu<T> b{static_cast<T*>(p[0]),
              static_cast<T*>(p[1]),
              static_cast<T*>(p[2]),
              {v(3), v(4), v(5), v(6)},
              {v(3), v(4), v(7), v(8), momentum, eps},
              nullptr,
              0,
              training,
              relu};
  std::vector<Moments<A>> moments(bn_relu_moments_size<T>(a, all_aligned(b), shape[4]));
  b.moments = moments.data();
  bn_relu_run(emulator::Queue(), a, b, shape[4]);
}

template <typename T>
void backward(const int64_t* shape, void** p, int mask, bool training) {
  using A = acc_t<T>;
  const auto t = [&](int i) { return static_cast<T*>(p[i]); };
  const auto v = [&](int i) { return static_cast<A*>(p[i]); };
  const Activation a = activation(shape);
  BnReluBackward<T> b{{t(0), t(1), t(2), t(3), t(4)},
                      {v(5), v(6), v(7), v(8)},
                      v(9),
                      v(10),
                      nullptr,
                      0,
                      nullptr,
                      Mask(mask),
                      training};
  std::vector<Sums<A>> sums(bn_relu_moments_size<T>(a, all_aligned(b.activations), shape[4]));
  std::vector<Slopes<A>> slopes(a.channels);
  b.sums = sums.data();
  b.slopes = slopes.data();
  bn_relu_backward_run(emulator::Queue(), a, b, shape[4]);
}

}  // namespace

// arrays: input, residual, output, mean, invstd, weight, bias, running mean, running variance
extern "C" const char* bn_relu(const char* dtype, const int64_t* shape, void** arrays,
                               double momentum, double eps, bool training, bool relu) {
  return with_dtype(dtype, [&](auto type) {
    forward<decltype(type)>(shape, arrays, momentum, eps, training, relu);
  });
}

// arrays: input, residual, output, mean, invstd, weight, bias: the statistics are there, or there
// is no output and they alone are wanted
extern "C" const char* bn_relu_half(const char* dtype, const int64_t* shape, void** p, double eps,
                                    bool relu) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const auto v = [&](int i) { return static_cast<A*>(p[i]); };
    const Activation a = activation(shape);
    BnRelu<T> b{static_cast<T*>(p[0]),
                static_cast<T*>(p[1]),
                static_cast<T*>(p[2]),
                {v(3), v(4), v(5), v(6)},
                {},
                nullptr,
                0,
                /*training=*/true,
                relu};
    if (!b.output) b.statistics = {v(3), v(4), nullptr, nullptr, 0, eps};
    std::vector<Moments<A>> moments(bn_relu_moments_size<T>(a, all_aligned(b), shape[4]));
    b.moments = moments.data();
    bn_relu_run(emulator::Queue(), a, b, shape[4]);
  });
}

// arrays: grad_output, input, output, grad_input, grad_residual, mean, invstd, weight, bias,
// grad_weight, grad_bias
extern "C" const char* bn_relu_backward(const char* dtype, const int64_t* shape, void** arrays,
                                        int mask, bool training) {
  return with_dtype(dtype,
                    [&](auto type) { backward<decltype(type)>(shape, arrays, mask, training); });
}
