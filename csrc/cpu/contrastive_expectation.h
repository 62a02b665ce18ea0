// The part of `contrastive` for columns that need no gradient: see contrastive_expectation.cpp.
#pragma once

#include "contrastive.h"

namespace ssl_kernels::cpu {

// Whether forward streams the columns here: where it keeps their expectation (docs/contrastive.md), and where
// no backward follows.
inline bool streams_columns(const ContrastiveArgs& args) {
  return args.columns && !args.both_directions && !(args.keep && args.columns_need_grad);
}

ContrastiveFwd contrastive_expectation_fwd(const ContrastiveArgs& args);

// `saved.kept` is the expectation. Columns are read only at positives.
ContrastiveBwd contrastive_expectation_bwd(const ContrastiveArgs& args, const ContrastiveSaved& saved);

}  // namespace ssl_kernels::cpu
