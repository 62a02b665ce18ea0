// What the losses of `row_losses.native`, and some of `contrastive_loss.native`, make of the sums and logits
// of a row.
//
//   rule        values of a row          loss, with softplus(t) = log(1 + e^t)
//   beside      d, scale, lse            softplus(lse - scale d)
//   debiased    lse, p, scale            softplus(g - p), g = max(lse + log(1 - e^x) - c_2, c_0 - scale)
//                                        where x = c_1 + p - lse < 0, else c_0 - scale
//   mixed       lse, s_own, s_partner, l l (lse - s_own) + (1 - l) (lse - s_partner)
//   difference  a, b                     softplus(a) - softplus(b)
//   softmax     lse, s, and a bias b     max(0, lse - s - b), 0 where lse is -inf: all columns are left out
//
// Their derivatives stand beside them. A logit or a sum of +inf gives NaN, as the softmax over it would have
// it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace ssl_kernels::row_rules {

constexpr int kMostValues = 4;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
using Values = std::array<double, kMostValues>;

inline double infinite_as_nan(double x) { return x == std::numeric_limits<double>::infinity() ? kNaN : x; }
inline double softplus(double t) { return t > 0 ? t + std::log1p(std::exp(-t)) : std::log1p(std::exp(t)); }
inline double sigmoid(double t) {
  if (t >= 0) return 1 / (1 + std::exp(-t));
  const double e = std::exp(t);
  return e / (1 + e);
}

// log sum_k exp(x_k), -inf where nothing is added; the x become their shares of the sum.
inline double log_sum_exp(std::vector<double>& x) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (double each : x)
    if (each > top || std::isnan(each)) top = each;
  if (std::isinf(top) && top < 0) {
    std::fill(x.begin(), x.end(), 0.);
    return top;
  }
  for (double& each : x) sum += each = std::exp(each - top);  // NaN where one is +inf
  for (double& each : x) each /= sum;
  return top + std::log(sum);
}

// A rule returns the loss of a row and, where asked, its derivative by each value.
using Rule = double (*)(const Values& in, const double* constants, Values* partial);

inline double beside(const Values& in, const double*, Values* partial) {
  const auto [dot, scale, lse, unused] = in;
  const double excess = lse - infinite_as_nan(scale * dot);
  if (partial) {
    const double p = sigmoid(excess);
    *partial = {-p * scale, -p * dot, p, 0};
  }
  return softplus(excess);
}

inline double debiased(const Values& in, const double* c, Values* partial) {
  const double lse = infinite_as_nan(in[0]), positive = infinite_as_nan(in[1]), least = c[0] - in[2];
  const double x = c[1] + positive - lse;
  const double corrected = x >= 0 ? least : lse + std::log(-std::expm1(x)) - c[2];
  const bool floored = corrected <= least;  // false for NaN, which stays
  const double excess = (floored ? least : corrected) - positive;
  if (partial) {
    const double p = sigmoid(excess);
    if (floored)
      *partial = {0, -p, -p, 0};
    else {
      const double through = p / -std::expm1(x);
      *partial = {through, -through, 0, 0};
    }
  }
  return softplus(excess);
}

inline double mixed(const Values& in, const double*, Values* partial) {
  const auto [lse, s_own, s_partner, lam] = in;
  const double own = lse - s_own, partner = lse - s_partner;  // neither is below 0
  if (partial) *partial = {1, -lam, lam - 1, own - partner};
  return lam * own + (1 - lam) * partner;
}

inline double difference(const Values& in, const double*, Values* partial) {
  if (partial) *partial = {sigmoid(in[0]), -sigmoid(in[1]), 0, 0};
  return softplus(in[0]) - softplus(in[1]);
}

// Below 0 by rounding alone, which changes no derivative.
inline double softmax(const Values& in, const double*, Values* partial) {
  const bool empty = in[0] == -std::numeric_limits<double>::infinity();
  if (partial) *partial = empty ? Values{} : Values{1, -1, -1, 0};
  const double loss = empty ? 0 : in[0] - (in[1] + in[2]);
  return loss < 0 ? 0 : loss;  // NaN stays
}

}  // namespace ssl_kernels::row_rules
