#include "lexer.h"

#include <cctype>
#include <string>

#include "types.h"

namespace ptx {
namespace {

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(source) {}

  std::vector<Token> run() {
    for (skip_blanks(); position_ < source_.size(); skip_blanks()) {
      const size_t start = position_;
      if (peek() == '"') {
        skip_string();
      } else if (peek() == '.') {
        ++position_;
        skip_word(false);
      } else if (is_word(peek())) {
        skip_word(true);
      } else {
        ++position_;
      }
      tokens_.push_back({source_.substr(start, position_ - start), line_});
    }
    tokens_.push_back({std::string_view(), line_});
    return std::move(tokens_);
  }

 private:
  static bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
  }

  char peek(size_t ahead = 0) const {
    return position_ + ahead < source_.size() ? source_[position_ + ahead] : '\0';
  }

  void skip_blanks() {
    while (position_ < source_.size()) {
      if (std::isspace(static_cast<unsigned char>(peek()))) {
        line_ += peek() == '\n';
        ++position_;
      } else if (peek() == '/' && peek(1) == '/') {
        while (position_ < source_.size() && peek() != '\n') ++position_;
      } else if (peek() == '/' && peek(1) == '*') {
        const size_t end = source_.find("*/", position_);
        if (end == std::string_view::npos)
          throw Error("PTX line " + std::to_string(line_) + ": comment without an end");
        for (; position_ < end + 2; ++position_) line_ += peek() == '\n';
      } else {
        return;
      }
    }
  }

  void skip_string() {
    ++position_;
    while (position_ < source_.size() && peek() != '"') position_ += peek() == '\\' ? 2 : 1;
    ++position_;
  }

  // With dots and '::' the word of an opcode: ld.global.L2::128B.b32.
  void skip_word(bool dots) {
    while (is_word(peek()) || (dots && peek() == '.') ||
           (peek() == ':' && peek(1) == ':' && is_word(peek(2)))) {
      position_ += peek() == ':' ? 2 : 1;
    }
  }

  std::string_view source_;
  size_t position_ = 0;
  int line_ = 1;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) { return Lexer(source).run(); }

}  // namespace ptx
