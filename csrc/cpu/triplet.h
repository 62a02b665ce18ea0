// What the triplet losses on the CPU share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "../ops/autograd.h"
#include "../ops/operands.h"

namespace ssl_kernels::cpu {

struct GapLoss {
  double loss, slope;
};

// The loss of gap = d(i, p) - d(i, n) and its derivative, as F.relu and F.logsigmoid have them at 0 and for
// NaN.
inline GapLoss loss_of_gap(double gap, double margin, bool soft) {
  if (soft) {
    const double e = std::exp(-std::abs(gap));
    return {std::isnan(gap) ? gap : std::max(gap, 0.) + std::log1p(e), (gap >= 0 ? 1 : e) / (1 + e)};
  }
  const double loss = gap + margin;
  return loss <= 0 ? GapLoss{0, 0} : GapLoss{loss, 1};
}

inline void check_triplets_readable(const at::Tensor& embeddings,
                                    std::initializer_list<const at::Tensor*> others,
                                    const at::Tensor& margin) {
  bool readable = can_be_read(embeddings) && can_be_read(margin) && margin.dim() == 0;
  for (const at::Tensor* other : others) readable = readable && can_be_read(*other);
  TORCH_CHECK(readable,
              "triplet_loss: embeddings, labels or indices, and a margin without dimensions must be on cpu");
  refuse_forward_mode("triplet_loss", {&embeddings, &margin});
}

}  // namespace ssl_kernels::cpu
