// The part of `contrastive` in one direction whose rows weigh alike: see contrastive_gradients.cpp.
#pragma once

#include <optional>

#include "contrastive.h"

namespace ssl_kernels::cpu {

// The fewest pairs of rows and columns of a call in this thread that is made here.
int64_t& fewest_pairs();

// Whether forward makes both gradients here: where they are expected to be asked for with the same gradient
// of every row's lse, and it pays.
bool makes_gradients(const ContrastiveArgs& args);

// Nothing where a row's log-sum-exp is infinite or NaN.
std::optional<ContrastiveFwd> contrastive_gradients_fwd(const ContrastiveArgs& args);

// Nothing where `saved.kept` holds no gradients, or the rows' lse have others than were expected.
std::optional<ContrastiveBwd> contrastive_gradients_bwd(const ContrastiveArgs& args,
                                                        const ContrastiveSaved& saved);

// Whether forward was the one of this file, also where what it kept is gone: its log-sum-exps are of products
// that were rounded otherwise than those of contrastive.cpp.
bool comes_from_gradients(const at::Tensor& kept);

}  // namespace ssl_kernels::cpu
