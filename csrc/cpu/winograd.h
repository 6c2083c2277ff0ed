// One-dimensional transforms of F(m, r): y = D A^T ((G g) * (B^T d)), Lavin & Gray 2016, with a
// diagonal D that the caller applies: y[i] is output()'s i-th result times kScale[i]. What the
// gradient of the filters needs, transposed_output() gives A D y, is the same read backwards:
// dg = G^T ((A D dy) * (B^T d)).
//
// The points decide how much is lost. With 0, a, -a, 2a, -2a and infinity the customary a = 1 loses
// a factor of four in accuracy against a = 3/4, which balances the powers that the sums are
// weighted with; of five points, a pair around zero in zero's place loses half of what that does
// (1/2 and 3/2 against 0, 3/4 and 3/2). The powers of all of them are exact in fp32.
#pragma once

namespace fastres::cpu {

template <int m, int r>
struct Winograd;

// Interpolation points 0, 1, -1 and infinity.
template <>
struct Winograd<2, 3> {
  static constexpr double kFilter[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  static constexpr float kScale[2] = {1, 1};

  template <typename V>
  static inline void input(const V (&d)[4], V (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }

  template <typename V>
  static inline void output(const V (&t)[4], V (&y)[2]) {
    y[0] = t[0] + (t[1] + t[2]);
    y[1] = (t[1] - t[2]) + t[3];
  }

  template <typename V>
  static inline void transposed_output(const V (&y)[2], V (&t)[4]) {
    t[0] = y[0];
    t[1] = y[0] + y[1];
    t[2] = y[0] - y[1];
    t[3] = y[1];
  }
};

// Interpolation points 0, a, -a, b, -b and infinity.
struct WinogradOfSix {
  static constexpr double a = 0.75, b = 2 * a;
  static constexpr double kZeroNorm = a * a * b * b;
  static constexpr double kNearNorm = 2 * a * a * (a * a - b * b);
  static constexpr double kFarNorm = 2 * b * b * (b * b - a * a);

  template <typename V>
  static inline void input(const V (&d)[6], V (&t)[6]) {
    constexpr float near = a * a, far = b * b;
    const V minus_near(-near), minus_far(-far), product(near * far), minus_sum(-near - far);
    const V even_near = fmadd(minus_far, d[2], d[4]), odd_near = fmadd(minus_far, d[1], d[3]);
    const V even_far = fmadd(minus_near, d[2], d[4]), odd_far = fmadd(minus_near, d[1], d[3]);
    t[0] = fmadd(product, d[0], fmadd(minus_sum, d[2], d[4]));
    t[1] = fmadd(V(static_cast<float>(a)), odd_near, even_near);
    t[2] = fmadd(V(static_cast<float>(-a)), odd_near, even_near);
    t[3] = fmadd(V(static_cast<float>(b)), odd_far, even_far);
    t[4] = fmadd(V(static_cast<float>(-b)), odd_far, even_far);
    t[5] = fmadd(product, d[1], fmadd(minus_sum, d[3], d[5]));
  }
};

template <>
struct Winograd<4, 3> : WinogradOfSix {
  static constexpr double kFilter[6][3] = {{1 / kZeroNorm, 0, 0},
                                           {1 / kNearNorm, a / kNearNorm, a * a / kNearNorm},
                                           {1 / kNearNorm, -a / kNearNorm, a * a / kNearNorm},
                                           {1 / kFarNorm, b / kFarNorm, b * b / kFarNorm},
                                           {1 / kFarNorm, -b / kFarNorm, b * b / kFarNorm},
                                           {0, 0, 1 / (a * a * a)}};
  static constexpr float kScale[4] = {1, a, a * a, a * a * a};

  // Of filters whose taps are scaled by powers of a the points are 0, 1, -1, 2, -2 and infinity:
  // filter_at<i>() times this is kFilter's i-th row times the filter.
  static constexpr double kPlainScale[6] = {1 / kZeroNorm, 1 / kNearNorm, 1 / kNearNorm,
                                            1 / kFarNorm,  1 / kFarNorm,  1 / (a * a * a * a * a)};

  // tap(i) gives the i-th scaled tap of three. With `adding` there is no multiplication.
  template <int point, int taps, bool adding, typename Tap>
  static inline auto filter_at(const Tap& tap) {
    using V = decltype(tap(0));
    if constexpr (point == 0 || point == 5) {
      return tap(point == 0 ? 0 : 2);
    } else {
      const V twice = tap(2) + tap(2);
      const V even = point < 3 ? tap(0) + tap(2)
                     : adding  ? tap(0) + (twice + twice)
                               : fmadd(V(4.0f), tap(2), tap(0));
      const V odd = point < 3 ? tap(1) : tap(1) + tap(1);
      return point % 2 == 1 ? even + odd : even - odd;
    }
  }

  template <typename V>
  static inline void output(const V (&t)[6], V (&y)[4]) {
    const V two(2.0f), four(4.0f), eight(8.0f);
    const V near_sum = t[1] + t[2], near_difference = t[1] - t[2];
    const V far_sum = t[3] + t[4], far_difference = t[3] - t[4];
    y[0] = (t[0] + near_sum) + far_sum;
    y[1] = fmadd(two, far_difference, near_difference);
    y[2] = fmadd(four, far_sum, near_sum);
    y[3] = fmadd(eight, far_difference, near_difference) + t[5];
  }

  template <typename V>
  static inline void transposed_output(const V (&y)[4], V (&t)[6]) {
    const auto v = [](double value) { return V(static_cast<float>(value)); };
    const V even_near = fmadd(v(a * a), y[2], y[0]), even_far = fmadd(v(b * b), y[2], y[0]);
    const V odd_near = fmadd(v(a * a * a), y[3], v(a) * y[1]);
    const V odd_far = fmadd(v(b * b * b), y[3], v(b) * y[1]);
    t[0] = y[0];
    t[1] = even_near + odd_near;
    t[2] = even_near - odd_near;
    t[3] = even_far + odd_far;
    t[4] = even_far - odd_far;
    t[5] = v(a * a * a) * y[3];
  }
};

// F(4, 3)'s points without -b, and its filters, so that tiles of either size meet the same weights:
// what those lack is made up for by the tile. Where they stand among the six: kPlaces.
template <>
struct Winograd<3, 3> {
  static constexpr double a = WinogradOfSix::a, b = WinogradOfSix::b;
  static constexpr int kPlaces[5] = {0, 1, 2, 3, 5};
  static constexpr float kScale[3] = {1, a, a * a};

  // Each is (p + b) times the product of x - q over the other points q, in powers of x; at infinity
  // a times the product over all points.
  template <typename V>
  static inline void input(const V (&d)[5], V (&t)[5]) {
    const auto v = [](double value) { return V(static_cast<float>(value)); };
    const V even = fmadd(v(-a * a), d[1], d[3]), odd = fmadd(v(-a * a), d[0], d[2]);
    t[0] = v(b) * fmadd(v(-b), odd, even);
    t[1] = v(a + b) * fmadd(v(a - b), d[2], fmadd(v(-a * b), d[1], d[3]));
    t[2] = v(b - a) * fmadd(v(-a - b), d[2], fmadd(v(a * b), d[1], d[3]));
    t[3] = v(2 * b) * even;
    t[4] = v(a) * fmadd(v(-b), even, fmadd(v(-a * a), d[2], d[4]));
  }

  template <typename V>
  static inline void output(const V (&t)[5], V (&y)[3]) {
    const V near_sum = t[1] + t[2];
    y[0] = (t[0] + near_sum) + t[3];
    y[1] = fmadd(V(2.0f), t[3], t[1] - t[2]);
    y[2] = fmadd(V(4.0f), t[3], near_sum) + t[4];
  }

  template <typename V>
  static inline void transposed_output(const V (&y)[3], V (&t)[5]) {
    const auto v = [](double value) { return V(static_cast<float>(value)); };
    const V even = fmadd(v(a * a), y[2], y[0]), odd = v(a) * y[1];
    t[0] = y[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = fmadd(v(b * b), y[2], fmadd(v(b), y[1], y[0]));
    t[4] = v(a * a) * y[2];
  }
};

template <>
struct Winograd<3, 4> : WinogradOfSix {
  static constexpr double kFilter[6][4] = {
      {1 / kZeroNorm, 0, 0, 0},
      {1 / kNearNorm, a / kNearNorm, a * a / kNearNorm, a * a * a / kNearNorm},
      {1 / kNearNorm, -a / kNearNorm, a * a / kNearNorm, -a * a * a / kNearNorm},
      {1 / kFarNorm, b / kFarNorm, b * b / kFarNorm, b * b * b / kFarNorm},
      {1 / kFarNorm, -b / kFarNorm, b * b / kFarNorm, -b * b * b / kFarNorm},
      {0, 0, 0, 1 / (a * a)}};
  static constexpr float kScale[3] = {1, a, a * a};

  template <typename V>
  static inline void output(const V (&t)[6], V (&y)[3]) {
    const V near_sum = t[1] + t[2], far_sum = t[3] + t[4];
    y[0] = (t[0] + near_sum) + far_sum;
    y[1] = fmadd(V(2.0f), t[3] - t[4], t[1] - t[2]);
    y[2] = fmadd(V(4.0f), far_sum, near_sum) + t[5];
  }
};

// Interpolation points a, -a, b, -b and infinity.
template <>
struct Winograd<4, 2> {
  static constexpr double a = 0.5, b = 3 * a;
  static constexpr double kNearNorm = 2 * a * (a * a - b * b);
  static constexpr double kFarNorm = 2 * b * (b * b - a * a);
  static constexpr double kFilter[5][2] = {{1 / kNearNorm, a / kNearNorm},
                                           {-1 / kNearNorm, a / kNearNorm},
                                           {1 / kFarNorm, b / kFarNorm},
                                           {-1 / kFarNorm, b / kFarNorm},
                                           {0, 1 / (a * a * a)}};
  static constexpr float kScale[4] = {1, a, a * a, a * a * a};

  // As in F(4, 3): the points are 1, -1, 3, -3 and infinity, or there is only the first tap.
  static constexpr double kPlainScale[5] = {1 / kNearNorm, -1 / kNearNorm, 1 / kFarNorm,
                                            -1 / kFarNorm, 1 / (a * a * a * a)};

  template <int point, int taps, bool, typename Tap>
  static inline auto filter_at(const Tap& tap) {
    using V = decltype(tap(0));
    if constexpr (taps == 1) {
      return tap(0);
    } else if constexpr (point < 2) {
      return point == 0 ? tap(0) + tap(1) : tap(0) - tap(1);
    } else {
      return point == 4 ? tap(1) : fmadd(V(point == 2 ? 3.0f : -3.0f), tap(1), tap(0));
    }
  }

  template <typename V>
  static inline void input(const V (&d)[5], V (&t)[5]) {
    constexpr float near = a * a, far = b * b;
    const V minus_near(-near), minus_far(-far), product(near * far), minus_sum(-near - far);
    const V odd_near = fmadd(minus_far, d[1], d[3]), even_near = fmadd(minus_far, d[0], d[2]);
    const V odd_far = fmadd(minus_near, d[1], d[3]), even_far = fmadd(minus_near, d[0], d[2]);
    t[0] = fmadd(V(static_cast<float>(a)), even_near, odd_near);
    t[1] = fmadd(V(static_cast<float>(-a)), even_near, odd_near);
    t[2] = fmadd(V(static_cast<float>(b)), even_far, odd_far);
    t[3] = fmadd(V(static_cast<float>(-b)), even_far, odd_far);
    t[4] = fmadd(product, d[0], fmadd(minus_sum, d[2], d[4]));
  }

  template <typename V>
  static inline void output(const V (&t)[5], V (&y)[4]) {
    const V near_sum = t[0] + t[1], near_difference = t[0] - t[1];
    const V far_sum = t[2] + t[3], far_difference = t[2] - t[3];
    y[0] = near_sum + far_sum;
    y[1] = fmadd(V(3.0f), far_difference, near_difference);
    y[2] = fmadd(V(9.0f), far_sum, near_sum);
    y[3] = fmadd(V(27.0f), far_difference, near_difference) + t[4];
  }
};

// F(4, 2)'s points without -b, and its filters, as F(3, 3) has F(4, 3)'s.
template <>
struct Winograd<3, 2> {
  static constexpr double a = Winograd<4, 2>::a, b = Winograd<4, 2>::b;
  static constexpr int kPlaces[4] = {0, 1, 2, 4};
  static constexpr float kScale[3] = {1, a, a * a};

  template <typename V>
  static inline void input(const V (&d)[4], V (&t)[4]) {
    const auto v = [](double value) { return V(static_cast<float>(value)); };
    const V even = fmadd(v(-a * a), d[0], d[2]), odd = fmadd(v(-a * a), d[1], d[3]);
    t[0] = v(a + b) * fmadd(v(a - b), d[1], fmadd(v(-a * b), d[0], d[2]));
    t[1] = v(b - a) * fmadd(v(-a - b), d[1], fmadd(v(a * b), d[0], d[2]));
    t[2] = v(2 * b) * even;
    t[3] = v(a) * fmadd(v(-b), even, odd);
  }

  template <typename V>
  static inline void output(const V (&t)[4], V (&y)[3]) {
    const V near_sum = t[0] + t[1];
    y[0] = near_sum + t[2];
    y[1] = fmadd(V(3.0f), t[2], t[0] - t[1]);
    y[2] = fmadd(V(9.0f), t[2], near_sum) + t[3];
  }
};

}  // namespace fastres::cpu
