// A PTX module as it is written: what the parser makes and the decoder reads. Names are slices of the source.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "types.h"

namespace ptx::syntax {

struct Operand {
  enum Kind { kName, kInteger, kFloat, kAddress, kVector, kSink };
  Kind kind = kSink;
  std::string_view name;    // kName, or the base of kAddress (empty for an absolute address)
  std::string_view second;  // q of p|q
  bool negated = false;     // !p
  uint64_t bits = 0;        // kInteger; kFloat: a double's bits, or a float's where single
  bool single = false;      // kFloat written 0f...
  int64_t offset = 0;       // of a kName or kAddress
  std::vector<Operand> elements;
};

struct Statement {
  std::string_view opcode;
  std::vector<std::string_view> modifiers;
  std::vector<Operand> operands;
  std::string_view guard;
  bool guard_negated = false;
  std::string_view text;  // all of it, for messages
  int line = 0;
};

// call (returns), function, (arguments)
struct Call {
  std::vector<std::string_view> returns;
  std::string_view function;
  std::vector<std::string_view> arguments;
  std::string_view guard;
  bool guard_negated = false;
  std::string_view text;
  int line = 0;
};

struct Registers {
  Type type;
  std::string_view name;
  int count = -1;  // %r<count>, or -1 for one register
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };

struct Variable {
  Space space;  // .const counts as global
  std::string_view name;
  uint64_t size = 0;
  uint64_t alignment = 1;
  bool unsized = false;  // extern .shared x[]
  std::vector<uint8_t> initial;
};

struct Label {
  std::string_view name;
};

struct Block;
using Item = std::variant<Statement, Call, Registers, Variable, Label, std::unique_ptr<Block>>;

struct Block {
  std::vector<Item> items;
};

struct Parameter {
  std::string_view name;
  uint64_t size = 0;
  uint64_t alignment = 1;
};

struct Function {
  std::string name;
  bool entry = false;
  std::vector<Parameter> returns;
  std::vector<Parameter> parameters;
  uint64_t most_threads = 0;              // .maxntid; 0 where there is none
  std::vector<uint32_t> required_block;   // .reqntid; empty where there is none
  std::vector<std::string> unsupported;   // directives that change how it runs
  Block body;
};

struct Module {
  std::vector<Variable> variables;
  std::map<std::string, Function, std::less<>> functions;
};

}  // namespace ptx::syntax
