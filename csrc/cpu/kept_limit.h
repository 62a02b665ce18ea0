// The most bytes of logits that a call of `contrastive` keeps from forward to backward in this thread, beside
// the budget of the process. A ring over one rank holds on to no more than the blocks that would travel
// between several.
#pragma once

#include <cstdint>

namespace ssl_kernels::cpu {

int64_t& kept_at_most();

}  // namespace ssl_kernels::cpu
