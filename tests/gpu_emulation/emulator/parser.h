// Reads PTX text (PTX ISA 9.0, sections 4, 5 and 11).
#pragma once
#include <string_view>

#include "syntax.h"

namespace ptx {

// The result refers to `source`. Throws Error, with the line, at what it cannot read.
syntax::Module parse(std::string_view source);

}  // namespace ptx
