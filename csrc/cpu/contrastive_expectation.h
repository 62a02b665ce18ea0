// The part of `contrastive` for columns that need no gradient: see contrastive_expectation.cpp.
#pragma once

#include "contrastive.h"

namespace ssl_kernels::cpu {

// Whether forward keeps the expectation of the columns (docs/contrastive.md).
inline bool keeps_expectation(const ContrastiveArgs& args) {
  return args.keep && !args.columns_need_grad && args.columns && !args.both_directions;
}

ContrastiveFwd contrastive_expectation_fwd(const ContrastiveArgs& args);

// `saved.kept` is the expectation. Columns are read only at positives.
ContrastiveBwd contrastive_expectation_bwd(const ContrastiveArgs& args, const ContrastiveSaved& saved);

}  // namespace ssl_kernels::cpu
