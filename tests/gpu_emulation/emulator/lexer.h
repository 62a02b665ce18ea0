// Splits PTX text into tokens (PTX ISA 9.0, section 4).
#pragma once
#include <string_view>
#include <vector>

namespace ptx {

struct Token {
  std::string_view text;  // in the source
  int line;
};

// Names, opcodes with their modifiers and numbers are one token each; a directive such as .reg.b32 becomes
// two. The last token is empty.
std::vector<Token> tokenize(std::string_view source);

}  // namespace ptx
