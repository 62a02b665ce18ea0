// `row_pairs` on the CPU, and losses of its values with their gradients in one pass over the rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "../ops/row_pairs.h"

namespace ssl_kernels::cpu {

// A loss made of the value v of row_pairs.
struct PairRule {
  // factor v + constant, of that what is above 0, v^constant (0 at v = 0), or -log(v + constant)
  enum Kind { kLinear, kHinge, kPower, kLogarithm } kind;
  double factor, constant;

  struct Loss {
    double value, slope;
  };
  Loss operator()(double v) const {
    switch (kind) {
      case kPower: {
        if (v == 0) return {0, 0};
        const double power = constant == 2 ? v * v : std::pow(v, constant);
        return {power, constant * power / v};
      }
      case kLogarithm:
        return {-std::log(v + constant), -1 / (v + constant)};
      default: {
        const double value = factor * v + constant;
        return kind == kHinge && value <= 0 ? Loss{0, 0} : Loss{value, factor};  // NaN stays
      }
    }
  }
};

struct PairLoss {
  double sum;                       // of the losses, times share
  std::array<at::Tensor, 3> grads;  // by x, y and z, (0,) where none is needed
};

// x, y and z (N, D) float32 or float64, of one dtype; distance: the measure. Without z, y may also be (N,)
// int64: the rows of x that stand for its rows, of which -1 is a row's own. x then gets both gradients.
PairLoss row_pairs_loss(const at::Tensor& x, const at::Tensor& y, const OptionalTensor& z, bool normalize,
                        bool distance, const PairRule& rule, double share, std::array<bool, 3> needs_grad);

// docs/row_pairs.md: values and saved, and the gradients by x, y and z, (0,) where none is needed.
std::tuple<at::Tensor, at::Tensor> row_pairs_fwd(const at::Tensor& x, const at::Tensor& y,
                                                 const OptionalTensor& z, bool normalize,
                                                 std::string_view measure);
std::tuple<at::Tensor, at::Tensor, at::Tensor> row_pairs_bwd(
    const at::Tensor& grad_values, const at::Tensor& x, const at::Tensor& y, const OptionalTensor& z,
    const at::Tensor& saved, bool normalize, std::string_view measure, bool x_needs_grad, bool y_needs_grad,
    bool z_needs_grad);

}  // namespace ssl_kernels::cpu
