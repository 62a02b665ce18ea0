// The CPU kernels of `mixup_cross_entropy_fwd` and `mixup_cross_entropy_bwd`. The contract is docs/mixing.md.
#pragma once

#include <ATen/core/Tensor.h>

namespace ssl_kernels::cpu {

struct CrossEntropyOptions {
  double label_smoothing;
  int64_t ignore_index;
  bool partner_is_class;  // `partner` holds the partners' classes, not a permutation
};

struct CrossEntropyRows {
  at::Tensor loss, lse;  // (N,) double
  double counted;        // the rows' weights in the mean, added up
};

// `weight`, of the classes, may be undefined.
CrossEntropyRows mixup_cross_entropy_fwd(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& partner,
                                         const at::Tensor& lam, const at::Tensor& weight,
                                         const CrossEntropyOptions& options);
at::Tensor mixup_cross_entropy_bwd(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                                   const at::Tensor& partner, const at::Tensor& lam, const at::Tensor& weight,
                                   const at::Tensor& lse, const CrossEntropyOptions& options);

}  // namespace ssl_kernels::cpu
