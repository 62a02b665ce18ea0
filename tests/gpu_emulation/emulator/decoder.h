// Turns the statements of a kernel into instructions: scopes, registers, memory, labels and calls are
// resolved here; each instruction family decodes its own modifiers and operands through Decoding.
#pragma once
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

namespace ptx {

class KernelDecoder;

// One statement being decoded. Modifiers are taken by name, operands by position; one that nobody took makes
// the statement unsupported.
class Decoding {
 public:
  Decoding(KernelDecoder& kernel, const syntax::Statement& statement, Instruction& instruction);

  Instruction& instruction;

  // ---- Modifiers.
  bool accept(std::string_view modifier);
  void require(std::string_view modifier);
  // Index of the one of `names` that is present, or -1.
  int accept_one(std::initializer_list<std::string_view> names);
  int require_one(std::initializer_list<std::string_view> names);
  std::optional<Type> accept_type();
  Type type();
  Type type(std::initializer_list<Type> allowed);
  // .global, .shared{::cta}, .local, .param{::entry}, .const; generic where there is none.
  Space space();
  // Elements of .v2, .v4, .v8; 1 where there is none.
  int vector();
  // Shape .mXnYkZ of the matrix instructions.
  struct Shape {
    int m, n, k;
  };
  Shape shape();

  // ---- Operands, by position.
  int operands() const { return static_cast<int>(statement_.operands.size()); }
  void expect_operands(int least, int most);
  // Says that an operand means nothing here: a hint.
  void ignore(int position) const { at(position); }
  // A source or destination register for values of `type`: its lanes have the width of the type.
  Operand source(int position, Type type);
  Operand destination(int position, Type type);
  // Registers of any width ("operand size exceeding instruction-type size", section 9.4).
  Operand relaxed_source(int position, Type type);
  Operand relaxed_destination(int position, Type type);
  Operand predicate_source(int position);
  Operand predicate_destination(int position);
  // q of p|q; none where there is none.
  Operand second_predicate(int position);
  // A vector operand's elements; a scalar counts as one.
  std::vector<Operand> source_elements(int position, Type type, bool relaxed = false);
  std::vector<Operand> destination_elements(int position, Type type, bool relaxed = false);
  bool is_vector(int position) const;
  bool is_predicate(int position) const;
  uint64_t immediate(int position);
  bool is_immediate(int position) const;
  Address address(int position);
  uint32_t label(int position);
  std::string_view name(int position) const;  // of a register or symbol; empty for anything else
  bool address_is_local(int position);        // of a .param variable inside a function

  [[noreturn]] void unsupported(const std::string& what) const;
  // After the family has taken what it knows.
  void finish() const;

 private:
  const syntax::Operand& at(int position) const;
  Operand row(const syntax::Operand& operand, Type type, bool destination, bool relaxed);
  Operand predicate(const syntax::Operand& operand);

  KernelDecoder& kernel_;
  const syntax::Statement& statement_;
  std::vector<std::string_view> modifiers_;
  // One bit a position.
  mutable uint32_t taken_ = 0;
  uint32_t second_taken_ = 0;
};

// Decodes one instruction: sets execute and the operands it needs.
using Decode = void (*)(Decoding&);

// One opcode of a family's table.
struct Opcode {
  std::string_view name;
  Decode decode;
};

// The tables of the families, one file each in instructions/.
std::vector<Opcode> arithmetic_opcodes();
std::vector<Opcode> math_opcodes();
std::vector<Opcode> bit_opcodes();
std::vector<Opcode> comparison_opcodes();
std::vector<Opcode> conversion_opcodes();
std::vector<Opcode> move_opcodes();
std::vector<Opcode> memory_opcodes();
std::vector<Opcode> atomic_opcodes();
std::vector<Opcode> async_copy_opcodes();
std::vector<Opcode> control_opcodes();
std::vector<Opcode> warp_opcodes();
std::vector<Opcode> matrix_opcodes();
std::vector<Opcode> wmma_opcodes();
std::vector<Opcode> wgmma_opcodes();

// The handler of an unconditional branch, which the decoder itself needs for calls.
Execute branch_handler();

// Parses and decodes a module.
std::unique_ptr<Program> load_program(std::string source);

}  // namespace ptx
