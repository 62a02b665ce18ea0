// A kernel as it is executed: instructions with their operands resolved to rows of a warp's register file.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "syntax.h"
#include "types.h"

namespace ptx {

class Machine;
struct Instruction;
using syntax::Space;

constexpr int kWarpSize = 32;

// One bit per lane.
using LaneMask = uint32_t;
constexpr LaneMask kAllLanes = 0xffffffffu;

// Executes an instruction for the given lanes (never none of them). Returns the lanes that go on to the next
// instruction: all of them, unless it sets their program counters itself or they have to wait.
using Execute = LaneMask (*)(Machine&, const Instruction&, LaneMask);

// Row of the register file: 32 lanes of 32 bits, or two rows for 32 lanes of 64 bits (registers of fewer bits
// take 32). Immediates and special registers have rows of their own, so that handlers know only rows.
struct Operand {
  enum Kind : uint8_t { kNone, kRow, kPredicate, kSink };
  uint32_t index = 0;  // first row, or number of the predicate
  Kind kind = kNone;
  bool wide = false;      // 64-bit lanes
  bool negated = false;   // !p
  bool constant = false;  // the same in every lane

  explicit operator bool() const { return kind != kNone; }
};

struct Address {
  Operand base;  // none: the offset is the address
  int64_t offset = 0;
};

// Operands carry the letters of the PTX ISA: fma d, a, b, c; setp d|p, a, b, c; shfl d|p, a, b, c, members.
struct Instruction {
  Execute execute = nullptr;
  Execute inner = nullptr;  // where execute wraps another handler
  int32_t guard = -1;       // number of the predicate, or -1
  bool guard_negated = false;
  Type type = Type::kNone;
  Space space = Space::kGeneric;
  uint8_t vector = 1;   // elements of .v2, .v4, .v8
  uint8_t element = 0;  // bytes of one
  bool flag = false;    // the family says what for
  Operand d, p, a, b, c, members;
  Address address;
  uint32_t target = 0;     // label, then index of an instruction
  uint64_t immediate = 0;  // the family says what for
  std::vector<Operand> d_elements, a_elements, b_elements, c_elements;
  std::shared_ptr<const void> extra;  // what else a family keeps
  int line = 0;
  std::string text;
};

// Special registers (PTX ISA 9.0, section 10).
enum class Special : uint8_t {
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kNsmid,
  kGridid,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kDynamicSmemSize,
  kTotalSmemSize,
  kClusterCtaid,
  kClusterNctaid,
};

// Rows that are filled before a warp starts.
struct ConstantRow {
  uint32_t row;
  bool wide;
  uint64_t bits;
};

struct SpecialRow {
  uint32_t row;
  Special special;
};

struct Kernel {
  std::string name;
  std::vector<syntax::Parameter> parameters;
  std::vector<uint64_t> parameter_offsets;
  uint64_t parameter_bytes = 0;
  uint64_t shared_bytes = 0;  // static
  uint64_t dynamic_shared_offset = 0;
  uint64_t local_bytes = 0;  // a thread
  uint32_t rows = 0;
  uint32_t predicates = 0;
  std::vector<ConstantRow> constants;
  std::vector<SpecialRow> specials;
  std::vector<Instruction> code;
  uint64_t most_threads = 0;             // .maxntid; 0: any
  std::vector<uint32_t> required_block;  // .reqntid; empty: any
  std::vector<std::string> unsupported;  // what the decoder refused, by name and line
};

// A .global or .const variable and its memory.
struct GlobalVariable {
  std::string name;
  uint64_t size;
  std::vector<uint8_t> storage;
  uint64_t address;
};

struct Program {
  std::string source;
  syntax::Module syntax;
  std::map<std::string, std::unique_ptr<GlobalVariable>, std::less<>> globals;
  std::map<std::string, Kernel, std::less<>> kernels;
};

}  // namespace ptx
