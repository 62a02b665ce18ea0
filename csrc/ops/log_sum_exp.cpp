// `log_sum_exp.native`: constant + log sum_i exp(x_i) as one node of autograd on the CPU, for
// uniformity_loss: of few rows torch's operators, and their nodes, cost as much as the kernel that makes x.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../cpu/pool.h"
#include "autograd.h"
#include "operands.h"

namespace ssl_kernels {
namespace {

struct LogSumExp : Node<LogSumExp> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, double constant, bool wide) {
    const double *values = x.const_data_ptr<double>(), *end = values + x.numel();
    double top = *std::max_element(values, end), sum = 0;
    if (std::isinf(top)) top = 0;
    for (const double* value = values; value < end; ++value) sum += std::exp(*value - top);
    const double total = top + std::log(sum);
    if (ctx) {
      ctx->save_for_backward(savable({x}));
      ctx->saved_data["total"] = total;
    }
    return cpu::number(total + constant, wide ? at::kDouble : at::kFloat);
  }

  static variable_list differentiate(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    variable_list made(3);
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const double grad = grads[0].item<double>(), total = ctx->saved_data["total"].toDouble();
      made[0] = cpu::pooled(x.sizes(), x.options());
      std::transform(x.const_data_ptr<double>(), x.const_data_ptr<double>() + x.numel(),
                     made[0].mutable_data_ptr<double>(),
                     [&](double value) { return grad * std::exp(value - total); });
    }
    return without_second_derivative("log_sum_exp", made, {grads[0], x});
  }
};

Tensor log_sum_exp(const Tensor& x, double constant, bool wide) {
  TORCH_CHECK(can_be_read(x) && x.dim() == 1 && x.numel() > 0 && x.is_contiguous() &&
                  x.scalar_type() == at::kDouble,
              "log_sum_exp: x must be contiguous float64 numbers (N,) on cpu, N >= 1");
  refuse_forward_mode("log_sum_exp", {&x});
  return as_node<LogSumExp>("log_sum_exp", x.requires_grad(), x, constant, wide);
}

TORCH_LIBRARY_FRAGMENT(ssl_kernels, library) {
  // `wide`: whether the result is float64, float32 else.
  library.def("log_sum_exp.native(Tensor x, float constant, bool wide) -> Tensor", &log_sum_exp);
}

}  // namespace
}  // namespace ssl_kernels
