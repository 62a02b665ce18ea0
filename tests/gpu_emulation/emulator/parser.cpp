#include "parser.h"

#include <charconv>
#include <cstdlib>
#include <utility>

#include "lexer.h"

namespace ptx {
namespace {

using namespace syntax;

class Parser {
 public:
  explicit Parser(std::string_view source) : source_(source), tokens_(tokenize(source)) {}

  Module run() {
    while (!peek().empty()) parse_module_item();
    return std::move(module_);
  }

 private:
  // ---- Tokens.

  std::string_view peek(size_t ahead = 0) const {
    return tokens_[std::min(position_ + ahead, tokens_.size() - 1)].text;
  }

  int line() const { return tokens_[position_].line; }

  std::string_view next() {
    if (peek().empty()) fail("unexpected end");
    return tokens_[position_++].text;
  }

  bool accept(std::string_view text) {
    if (peek() != text) return false;
    ++position_;
    return true;
  }

  void expect(std::string_view text) {
    if (!accept(text)) fail("expected '" + std::string(text) + "'");
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error("PTX line " + std::to_string(line()) + ": " + what + " at '" + std::string(peek()) + "'");
  }

  void skip_past(std::string_view text) {
    while (next() != text) {}
  }

  void skip_line() {
    const int current = line();
    while (!peek().empty() && line() == current) ++position_;
  }

  void skip_braces() {
    int depth = 0;
    do {
      const std::string_view token = next();
      depth += token == "{";
      depth -= token == "}";
    } while (depth > 0);
  }

  // ---- Numbers (section 4.5).

  static bool is_number(std::string_view text) { return !text.empty() && text[0] >= '0' && text[0] <= '9'; }

  uint64_t integer(std::string_view text) const {
    int base = 10;
    std::string_view digits = text;
    if (text.size() > 1 && text[0] == '0') {
      const char mark = text[1];
      base = mark == 'x' || mark == 'X' ? 16 : mark == 'b' || mark == 'B' ? 2 : 8;
      digits.remove_prefix(base == 8 ? 1 : 2);
    }
    if (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.remove_suffix(1);
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
    if (error != std::errc() || end != digits.data() + digits.size())
      fail("bad number '" + std::string(text) + "'");
    return value;
  }

  static bool is_hex_float(std::string_view text, char mark, size_t size) {
    return text.size() == size && text[0] == '0' && (text[1] | 0x20) == mark;
  }

  uint64_t hex(std::string_view digits) const {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
    if (error != std::errc() || end != digits.data() + digits.size())
      fail("bad number '" + std::string(digits) + "'");
    return value;
  }

  Operand number(std::string_view text, bool negative) const {
    Operand operand;
    if (is_hex_float(text, 'f', 10)) {
      operand.kind = Operand::kFloat;
      operand.single = true;
      operand.bits = hex(text.substr(2)) ^ (negative ? 0x80000000ull : 0);
    } else if (is_hex_float(text, 'd', 18)) {
      operand.kind = Operand::kFloat;
      operand.bits = hex(text.substr(2)) ^ (negative ? 1ull << 63 : 0);
    } else if (text.find('.') != std::string_view::npos) {
      operand.kind = Operand::kFloat;
      const double value = std::strtod(std::string(text).c_str(), nullptr);
      operand.bits = std::bit_cast<uint64_t>(negative ? -value : value);
    } else {
      operand.kind = Operand::kInteger;
      operand.bits = negative ? -integer(text) : integer(text);
    }
    return operand;
  }

  // ---- Module scope (section 11).

  void parse_module_item() {
    const std::string_view directive = peek();
    if (directive == ".version" || directive == ".target" || directive == ".address_size" ||
        directive == ".file") {
      skip_line();
    } else if (directive == ".section") {
      while (peek() != "{") next();
      skip_braces();
    } else if (directive == ".visible" || directive == ".extern" || directive == ".weak" ||
               directive == ".common") {
      next();
    } else if (directive == ".entry" || directive == ".func") {
      parse_function();
    } else if (directive == ".shared" || directive == ".global" || directive == ".const") {
      for (Variable& variable : parse_variables()) module_.variables.push_back(std::move(variable));
    } else if (directive == ".pragma" || directive == ".alias") {
      skip_past(";");
    } else {
      fail("unknown directive");
    }
  }

  void parse_function() {
    Function function;
    function.entry = next() == ".entry";
    while (peek() == ".attribute") {
      next();
      skip_past(")");
    }
    if (!function.entry && peek() == "(") function.returns = parse_parameters();
    function.name = next();
    if (peek() == "(") function.parameters = parse_parameters();
    while (peek() != "{" && peek() != ";") parse_performance_directive(function);
    if (accept(";")) return;                        // a declaration
    expect("{");
    parse_block(function.body);
    std::string name = function.name;
    module_.functions.insert_or_assign(std::move(name), std::move(function));
  }

  // Section 11.4. Hints about registers and occupancy change nothing here, clusters would.
  void parse_performance_directive(Function& function) {
    const std::string_view directive = next();
    if (directive == ".noreturn") return;
    if (directive == ".pragma") {
      skip_past(";");
      return;
    }
    std::vector<uint32_t> numbers;
    while (is_number(peek())) {
      numbers.push_back(static_cast<uint32_t>(integer(next())));
      accept(",");
    }
    if (directive == ".maxntid") {
      function.most_threads = 1;
      for (uint32_t number : numbers) function.most_threads *= number;
    } else if (directive == ".reqntid") {
      function.required_block = numbers;
    } else if (directive != ".minnctapersm" && directive != ".maxnctapersm" && directive != ".maxnreg") {
      function.unsupported.push_back("line " + std::to_string(line()) + ": directive " +
                                     std::string(directive) + " is not implemented");
    }
  }

  std::vector<Parameter> parse_parameters() {
    std::vector<Parameter> parameters;
    expect("(");
    while (!accept(")")) {
      Parameter parameter;
      Type type = Type::kB8;
      bool pointer = false;  // .ptr .align states the pointee's alignment
      while (peek().starts_with('.')) {
        const std::string_view directive = next();
        if (directive == ".align") {
          const uint64_t alignment = integer(next());
          if (!pointer) parameter.alignment = alignment;
        } else if (directive == ".ptr") {
          pointer = true;
        } else if (auto named = type_named(directive.substr(1))) {
          type = *named;
        } else if (directive == ".reg") {
          fail("parameters in registers are not implemented");
        }
      }
      parameter.name = next();
      parameter.size = size_of(type);
      if (accept("[")) {
        parameter.size *= integer(next());
        expect("]");
      }
      parameter.alignment = std::max<uint64_t>(parameter.alignment, size_of(type));
      parameters.push_back(parameter);
      accept(",");
    }
    return parameters;
  }

  // .space {.align n} {.v2|.v4} .type name{[n]...}{= initial}, ...;
  std::vector<Variable> parse_variables() {
    const std::string_view space = next();
    Variable common;
    common.space = space == ".shared"  ? Space::kShared
                   : space == ".local" ? Space::kLocal
                   : space == ".param" ? Space::kLocal  // arguments of an inlined call
                                       : Space::kGlobal;
    Type type = Type::kB8;
    int vector = 1;
    while (peek().starts_with('.')) {
      const std::string_view directive = next();
      if (directive == ".align") {
        common.alignment = integer(next());
      } else if (directive == ".v2") {
        vector = 2;
      } else if (directive == ".v4") {
        vector = 4;
      } else if (directive == ".attribute") {
        skip_past(")");
      } else if (auto named = type_named(directive.substr(1))) {
        type = *named;
      } else {
        fail("unknown type or attribute " + std::string(directive));
      }
    }
    const int element = size_of(type) * vector;
    common.alignment = std::max<uint64_t>(common.alignment, element);
    std::vector<Variable> variables;
    do {
      Variable variable = common;
      variable.name = next();
      variable.size = element;
      while (accept("[")) {
        if (accept("]")) {
          variable.unsized = true;
          variable.size = 0;
        } else {
          variable.size *= integer(next());
          expect("]");
        }
      }
      if (accept("=")) {
        parse_initial(size_of(type), variable.initial);
        if (variable.unsized) variable.size = variable.initial.size();
        variable.initial.resize(variable.size);
      }
      variables.push_back(std::move(variable));
    } while (accept(","));
    expect(";");
    return variables;
  }

  void parse_initial(int size, std::vector<uint8_t>& bytes) {
    if (accept("{")) {
      while (!accept("}")) {
        parse_initial(size, bytes);
        accept(",");
      }
      return;
    }
    const bool negative = accept("-");
    if (!is_number(peek())) fail("initial value is not a number");
    const Operand value = number(next(), negative);
    const auto* first = reinterpret_cast<const uint8_t*>(&value.bits);
    bytes.insert(bytes.end(), first, first + size);
  }

  // ---- Function scope.

  void parse_block(Block& block) {
    while (!accept("}")) {
      const std::string_view token = peek();
      if (token.empty()) fail("unexpected end");
      if (token == "{") {
        next();
        auto inner = std::make_unique<Block>();
        parse_block(*inner);
        block.items.emplace_back(std::move(inner));
      } else if (token == ".reg") {
        parse_registers(block);
      } else if (token == ".shared" || token == ".local" || token == ".global" || token == ".const" ||
                 token == ".param") {
        for (Variable& variable : parse_variables()) block.items.emplace_back(std::move(variable));
      } else if (token == ".loc") {
        skip_line();
      } else if (token == ".pragma") {
        skip_past(";");
      } else if (token == ";") {
        next();
      } else if (peek(1) == ":") {
        block.items.emplace_back(Label{token});
        position_ += 2;
      } else if (token[0] == '.') {
        fail("unknown directive");
      } else {
        parse_statement(block);
      }
    }
  }

  void parse_registers(Block& block) {
    next();
    const std::string_view directive = next();
    const auto type = type_named(directive.substr(1));
    if (!type) fail("registers of type " + std::string(directive) + " are not implemented");
    do {
      Registers registers{*type, next()};
      if (accept("<")) {
        registers.count = static_cast<int>(integer(next()));
        expect(">");
      }
      block.items.emplace_back(registers);
    } while (accept(","));
    expect(";");
  }

  void parse_statement(Block& block) {
    Statement statement;
    statement.line = line();
    const char* start = peek().data();
    if (accept("@")) {
      statement.guard_negated = accept("!");
      statement.guard = next();
    }
    const std::string_view full = next();
    size_t from = 0;
    std::vector<std::string_view> parts;
    for (size_t dot = full.find('.'); dot != std::string_view::npos; dot = full.find('.', from)) {
      parts.push_back(full.substr(from, dot - from));
      from = dot + 1;
    }
    parts.push_back(full.substr(from));
    statement.opcode = parts[0];
    statement.modifiers.assign(parts.begin() + 1, parts.end());
    if (statement.opcode == "call") {
      parse_call(block, statement, start);
      return;
    }
    while (!accept(";")) {
      statement.operands.push_back(parse_operand());
      if (!accept(",") && peek() != ";") fail("expected ',' or ';'");
    }
    statement.text = text_since(start);
    block.items.emplace_back(std::move(statement));
  }

  std::string_view text_since(const char* start) const {
    const std::string_view last = tokens_[position_ - 1].text;
    return std::string_view(start, last.data() - start);
  }

  void parse_call(Block& block, const Statement& statement, const char* start) {
    for (std::string_view modifier : statement.modifiers) {
      if (modifier != "uni") fail("modifier ." + std::string(modifier) + " of call is not implemented");
    }
    Call call;
    call.guard = statement.guard;
    call.guard_negated = statement.guard_negated;
    call.line = statement.line;
    if (peek() == "(") {
      call.returns = parse_names();
      expect(",");
    }
    call.function = next();
    if (accept(",") && peek() == "(") call.arguments = parse_names();
    skip_past(";");
    call.text = text_since(start);
    block.items.emplace_back(std::move(call));
  }

  std::vector<std::string_view> parse_names() {
    std::vector<std::string_view> names;
    expect("(");
    while (!accept(")")) {
      names.push_back(next());
      accept(",");
    }
    return names;
  }

  Operand parse_operand() {
    Operand operand;
    if (accept("{")) {
      operand.kind = Operand::kVector;
      while (!accept("}")) {
        operand.elements.push_back(parse_operand());
        accept(",");
      }
      return operand;
    }
    if (accept("[")) {
      operand.kind = Operand::kAddress;
      if (is_number(peek())) {
        operand.offset = static_cast<int64_t>(integer(next()));
      } else {
        operand.name = next();
      }
      parse_offset(operand);
      expect("]");
      return operand;
    }
    if (accept("!")) {
      operand = parse_operand();
      operand.negated = true;
      return operand;
    }
    if (accept("_")) return operand;
    const bool negative = accept("-");
    const std::string_view token = next();
    if (is_number(token)) return number(token, negative);
    if (token == "WARP_SZ") return number("32", negative);
    if (negative) fail("'-' before a name");
    operand.kind = Operand::kName;
    operand.name = token;
    if (accept("|")) operand.second = next();
    parse_offset(operand);
    return operand;
  }

  void parse_offset(Operand& operand) {
    while (peek() == "+" || peek() == "-") {
      bool negative = next() == "-";
      if (accept("-")) negative = !negative;
      const auto value = static_cast<int64_t>(integer(next()));
      operand.offset += negative ? -value : value;
    }
  }

  std::string_view source_;
  std::vector<Token> tokens_;
  size_t position_ = 0;
  Module module_;
};

}  // namespace

syntax::Module parse(std::string_view source) { return Parser(source).run(); }

}  // namespace ptx
