// From what the parser read to instructions with their operands in place. One file, although a long one: each step
// looks into the tables that the step before it made.
#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "parser.h"

namespace ptx {
namespace {

// What a decoder throws at something it does not implement: recorded with the kernel, which is then not run.
struct Unsupported : Error {
  using Error::Error;
};

constexpr uint64_t kUnplaced = ~0ull;

struct Symbol {
  enum Kind { kRegister, kPredicate, kVariable, kLabel };
  Kind kind;
  uint32_t index = 0;  // row, predicate or label
  bool wide = false;
  Space space = Space::kGeneric;
  uint64_t address = 0;  // of a variable, in its space
};

using Scope = std::unordered_map<std::string_view, Symbol>;

const std::unordered_map<std::string_view, Special>& special_registers() {
  static const std::unordered_map<std::string_view, Special> names = {
      {"%ctaid.x", Special::kCtaidX},
      {"%ctaid.y", Special::kCtaidY},
      {"%ctaid.z", Special::kCtaidZ},
      {"%tid.x", Special::kTidX},
      {"%tid.y", Special::kTidY},
      {"%tid.z", Special::kTidZ},
      {"%ntid.x", Special::kNtidX},
      {"%ntid.y", Special::kNtidY},
      {"%ntid.z", Special::kNtidZ},
      {"%nctaid.x", Special::kNctaidX},
      {"%nctaid.y", Special::kNctaidY},
      {"%nctaid.z", Special::kNctaidZ},
      {"%laneid", Special::kLaneid},
      {"%warpid", Special::kWarpid},
      {"%nwarpid", Special::kNwarpid},
      {"%smid", Special::kSmid},
      {"%nsmid", Special::kNsmid},
      {"%gridid", Special::kGridid},
      {"%lanemask_eq", Special::kLanemaskEq},
      {"%lanemask_lt", Special::kLanemaskLt},
      {"%lanemask_le", Special::kLanemaskLe},
      {"%lanemask_gt", Special::kLanemaskGt},
      {"%lanemask_ge", Special::kLanemaskGe},
      {"%dynamic_smem_size", Special::kDynamicSmemSize},
      {"%total_smem_size", Special::kTotalSmemSize},
      {"%cluster_ctaid.x", Special::kClusterCtaid},
      {"%cluster_ctaid.y", Special::kClusterCtaid},
      {"%cluster_ctaid.z", Special::kClusterCtaid},
      {"%cluster_ctarank", Special::kClusterCtaid},
      {"%is_explicit_cluster", Special::kClusterCtaid},
      {"%cluster_nctaid.x", Special::kClusterNctaid},
      {"%cluster_nctaid.y", Special::kClusterNctaid},
      {"%cluster_nctaid.z", Special::kClusterNctaid},
      {"%cluster_nctarank", Special::kClusterNctaid},
  };
  return names;
}

const std::unordered_map<std::string_view, Decode>& opcode_table() {
  static const std::unordered_map<std::string_view, Decode> table = [] {
    std::unordered_map<std::string_view, Decode> all;
    for (auto family : {arithmetic_opcodes, math_opcodes, bit_opcodes, comparison_opcodes, conversion_opcodes,
                        move_opcodes, memory_opcodes, atomic_opcodes, async_copy_opcodes, control_opcodes,
                        warp_opcodes, matrix_opcodes, wmma_opcodes, wgmma_opcodes}) {
      for (const Opcode& opcode : family()) all.emplace(opcode.name, opcode.decode);
    }
    return all;
  }();
  return table;
}

uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace

class KernelDecoder {
 public:
  KernelDecoder(Program& program, const syntax::Function& function) : program_(program) {
    kernel_.name = function.name;
    kernel_.unsupported = function.unsupported;
    kernel_.most_threads = function.most_threads;
    kernel_.required_block = function.required_block;
    scopes_.emplace_back();
    declare_module_variables();
    declare_parameters(function.parameters);
    decode_block(function.body);
    Instruction end;
    end.text = "ret (end of the kernel)";
    decode_into(end, return_statement_);
    place_dynamic_shared();
    for (Instruction& instruction : kernel_.code) {
      if (instruction.execute == branch_handler()) instruction.target = label_positions_[instruction.target];
    }
  }

  Kernel take() { return std::move(kernel_); }

  const Symbol* find(std::string_view name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (auto found = scope->find(name); found != scope->end()) return &found->second;
    }
    return nullptr;
  }

  // The row that holds `bits` in every lane.
  Operand constant(uint64_t bits, bool wide) {
    auto [found, fresh] = constant_rows_.try_emplace({bits, wide}, 0);
    if (fresh) {
      found->second = add_rows(wide);
      kernel_.constants.push_back({found->second, wide, bits});
    }
    Operand operand;
    operand.kind = Operand::kRow;
    operand.index = found->second;
    operand.wide = wide;
    operand.constant = true;
    return operand;
  }

  std::optional<Operand> special(std::string_view name) {
    const auto known = special_registers().find(name);
    if (known == special_registers().end()) return std::nullopt;
    auto [found, fresh] = special_rows_.try_emplace(known->second, 0);
    if (fresh) {
      found->second = add_rows(false);
      kernel_.specials.push_back({found->second, known->second});
    }
    Operand operand;
    operand.kind = Operand::kRow;
    operand.index = found->second;
    return operand;
  }

  // Address of a variable. Dynamic shared memory starts after the static, whose size is known at the end:
  // its constant rows are corrected then.
  Operand address_constant(const Symbol& symbol, int64_t offset, bool wide) {
    if (symbol.address != kUnplaced) return constant(symbol.address + offset, wide);
    Operand operand = constant_row_unshared(offset, wide);
    dynamic_shared_rows_.push_back(operand.index);
    return operand;
  }

 private:
  uint32_t add_rows(bool wide) {
    const uint32_t row = kernel_.rows;
    kernel_.rows += wide ? 2 : 1;
    return row;
  }

  Operand constant_row_unshared(uint64_t bits, bool wide) {
    Operand operand;
    operand.kind = Operand::kRow;
    operand.index = add_rows(wide);
    operand.wide = wide;
    operand.constant = true;
    kernel_.constants.push_back({operand.index, wide, bits});
    return operand;
  }

  void place_dynamic_shared() {
    // The start is aligned as generously as ldmatrix and the swizzled layouts need.
    kernel_.dynamic_shared_offset = align_up(kernel_.shared_bytes, 1024);
    for (uint32_t row : dynamic_shared_rows_) {
      for (ConstantRow& constant : kernel_.constants) {
        if (constant.row == row) constant.bits += kernel_.dynamic_shared_offset;
      }
    }
  }

  void declare_module_variables() {
    for (const syntax::Variable& variable : program_.syntax.variables)
      declare_variable(variable, scopes_.front());
  }

  void declare_variable(const syntax::Variable& variable, Scope& scope) {
    Symbol symbol{Symbol::kVariable};
    symbol.space = variable.space;
    if (variable.space == Space::kShared && variable.unsized) {
      symbol.address = kUnplaced;
    } else if (variable.space == Space::kShared) {
      symbol.address = align_up(kernel_.shared_bytes, variable.alignment);
      kernel_.shared_bytes = symbol.address + variable.size;
    } else if (variable.space == Space::kLocal) {
      symbol.address = align_up(kernel_.local_bytes, variable.alignment);
      kernel_.local_bytes = symbol.address + variable.size;
    } else {
      symbol.address = global_variable(variable).address;
    }
    scope.insert_or_assign(variable.name, symbol);
  }

  GlobalVariable& global_variable(const syntax::Variable& variable) {
    auto& slot = program_.globals[std::string(variable.name)];
    if (!slot) {
      constexpr uint64_t kAlignment = 256;
      slot = std::make_unique<GlobalVariable>();
      slot->name = variable.name;
      slot->size = variable.size;
      slot->storage.resize(variable.size + kAlignment);
      slot->address = align_up(reinterpret_cast<uint64_t>(slot->storage.data()), kAlignment);
      std::memcpy(reinterpret_cast<void*>(slot->address), variable.initial.data(), variable.initial.size());
    }
    return *slot;
  }

  void declare_parameters(const std::vector<syntax::Parameter>& parameters) {
    for (const syntax::Parameter& parameter : parameters) {
      Symbol symbol{Symbol::kVariable};
      symbol.space = Space::kParam;
      symbol.address = align_up(kernel_.parameter_bytes, parameter.alignment);
      kernel_.parameter_bytes = symbol.address + parameter.size;
      kernel_.parameters.push_back(parameter);
      kernel_.parameter_offsets.push_back(symbol.address);
      scopes_.front().insert_or_assign(parameter.name, symbol);
    }
  }

  uint32_t new_label() {
    label_positions_.push_back(0);
    return static_cast<uint32_t>(label_positions_.size() - 1);
  }

  void decode_block(const syntax::Block& block) {
    scopes_.emplace_back();
    for (const syntax::Item& item : block.items) {
      if (const auto* label = std::get_if<syntax::Label>(&item)) {
        scopes_.back().insert_or_assign(label->name, Symbol{Symbol::kLabel, new_label()});
      }
    }
    for (const syntax::Item& item : block.items) {
      std::visit([this](const auto& part) { decode_item(part); }, item);
    }
    scopes_.pop_back();
  }

  void decode_item(const std::unique_ptr<syntax::Block>& block) { decode_block(*block); }

  void decode_item(const syntax::Label& label) {
    label_positions_[find(label.name)->index] = static_cast<uint32_t>(kernel_.code.size());
  }

  void decode_item(const syntax::Variable& variable) { declare_variable(variable, scopes_.back()); }

  void decode_item(const syntax::Registers& registers) {
    if (registers.count < 0) {
      declare_register(registers.name, registers.type);
      return;
    }
    for (int i = 0; i < registers.count; ++i) {
      names_.push_back(std::make_unique<std::string>(std::string(registers.name) + std::to_string(i)));
      declare_register(*names_.back(), registers.type);
    }
  }

  void declare_register(std::string_view name, Type type) {
    Symbol symbol{Symbol::kRegister};
    if (type == Type::kPred) {
      symbol.kind = Symbol::kPredicate;
      symbol.index = kernel_.predicates++;
    } else {
      symbol.wide = is_wide(type);
      symbol.index = add_rows(symbol.wide);
    }
    scopes_.back().insert_or_assign(name, symbol);
  }

  void decode_item(const syntax::Statement& statement) {
    Instruction instruction;
    instruction.text = collapse_blanks(statement.text);
    instruction.line = statement.line;
    // Inside an inlined function, ret goes to the end of the call.
    if (statement.opcode == "ret" && !return_labels_.empty()) {
      set_guard(instruction, statement.guard, statement.guard_negated);
      add_branch(std::move(instruction), return_labels_.back());
    } else {
      decode_into(instruction, statement);
    }
  }

  void decode_into(Instruction& instruction, const syntax::Statement& statement) {
    const std::string place = "line " + std::to_string(statement.line) + ": ";
    try {
      set_guard(instruction, statement.guard, statement.guard_negated);
      const auto opcode = opcode_table().find(statement.opcode);
      Decoding decoding(*this, statement, instruction);
      if (opcode == opcode_table().end()) decoding.unsupported("unknown instruction");
      opcode->second(decoding);
      decoding.finish();
    } catch (const Unsupported& error) {
      kernel_.unsupported.push_back(place + error.what());
    }
    kernel_.code.push_back(std::move(instruction));
  }

  void set_guard(Instruction& instruction, std::string_view guard, bool negated) {
    if (guard.empty()) return;
    const Symbol* symbol = find(guard);
    if (!symbol || symbol->kind != Symbol::kPredicate) {
      throw Error("PTX line " + std::to_string(instruction.line) + ": unknown predicate " +
                  std::string(guard));
    }
    instruction.guard = static_cast<int32_t>(symbol->index);
    instruction.guard_negated = negated;
  }

  void add_branch(Instruction instruction, uint32_t label) {
    instruction.execute = branch_handler();
    instruction.target = label;
    kernel_.code.push_back(std::move(instruction));
  }

  // Calls are inlined: formal parameters become names of the actual ones, which are local memory of the
  // caller.
  void decode_item(const syntax::Call& call) {
    const auto found = program_.syntax.functions.find(call.function);
    if (found == program_.syntax.functions.end()) {
      decode_external_call(call);
      return;
    }
    const syntax::Function& function = found->second;
    constexpr size_t kDeepest = 30;
    if (return_labels_.size() >= kDeepest) {
      kernel_.unsupported.push_back("line " + std::to_string(call.line) + ": recursive call of " +
                                    function.name);
      return;
    }
    if (call.returns.size() != function.returns.size() ||
        call.arguments.size() != function.parameters.size()) {
      throw Error("PTX line " + std::to_string(call.line) + ": wrong number of arguments for " +
                  function.name);
    }
    const uint32_t end = new_label();
    if (!call.guard.empty()) {
      Instruction skip;
      skip.text = collapse_blanks(call.text);
      skip.line = call.line;
      set_guard(skip, call.guard, !call.guard_negated);
      add_branch(std::move(skip), end);
    }
    Scope formals;
    for (size_t i = 0; i < call.returns.size(); ++i)
      bind(formals, function.returns[i], call.returns[i], call.line);
    for (size_t i = 0; i < call.arguments.size(); ++i) {
      bind(formals, function.parameters[i], call.arguments[i], call.line);
    }
    // The function sees the module's names and its own, not the caller's.
    std::vector<Scope> caller = std::move(scopes_);
    scopes_.clear();
    scopes_.push_back(caller.front());
    scopes_.push_back(std::move(formals));
    return_labels_.push_back(end);
    decode_block(function.body);
    return_labels_.pop_back();
    scopes_ = std::move(caller);
    label_positions_[end] = static_cast<uint32_t>(kernel_.code.size());
  }

  void bind(Scope& scope, const syntax::Parameter& formal, std::string_view actual, int line) {
    const Symbol* symbol = find(actual);
    if (!symbol)
      throw Error("PTX line " + std::to_string(line) + ": unknown argument " + std::string(actual));
    scope.insert_or_assign(formal.name, *symbol);
  }

  // printf prints nothing; a failing assert stops the kernel; any other function is unknown.
  void decode_external_call(const syntax::Call& call) {
    syntax::Statement statement;
    statement.opcode = call.function == "vprintf" ? "nanosleep" : "trap";
    statement.guard = call.guard;
    statement.guard_negated = call.guard_negated;
    statement.line = call.line;
    Instruction instruction;
    instruction.text = collapse_blanks(call.text);
    instruction.line = call.line;
    if (call.function != "vprintf" && call.function != "__assertfail") {
      kernel_.unsupported.push_back("line " + std::to_string(call.line) + ": call of external function " +
                                    std::string(call.function));
    }
    decode_into(instruction, statement);
  }

  static std::string collapse_blanks(std::string_view text) {
    std::string collapsed;
    for (char c : text) {
      const bool blank = c == ' ' || c == '\t' || c == '\n' || c == '\r';
      if (!blank) {
        collapsed += c;
      } else if (!collapsed.empty() && collapsed.back() != ' ') {
        collapsed += ' ';
      }
    }
    return collapsed;
  }

  struct ConstantHash {
    size_t operator()(const std::pair<uint64_t, bool>& key) const {
      return std::hash<uint64_t>()(key.first) + key.second;
    }
  };

  Program& program_;
  Kernel kernel_;
  std::vector<Scope> scopes_;
  std::vector<uint32_t> label_positions_;
  std::vector<uint32_t> return_labels_;
  std::vector<uint32_t> dynamic_shared_rows_;
  std::unordered_map<std::pair<uint64_t, bool>, uint32_t, ConstantHash> constant_rows_;
  std::unordered_map<Special, uint32_t> special_rows_;
  std::vector<std::unique_ptr<std::string>> names_;  // of %r<n>, which the source does not spell
  syntax::Statement return_statement_ = [] {
    syntax::Statement statement;
    statement.opcode = "ret";
    return statement;
  }();
};

// ---- Decoding.

Decoding::Decoding(KernelDecoder& kernel, const syntax::Statement& statement, Instruction& instruction)
    : instruction(instruction), kernel_(kernel), statement_(statement), modifiers_(statement.modifiers) {}

void Decoding::unsupported(const std::string& what) const {
  std::string name(statement_.opcode);
  for (std::string_view modifier : statement_.modifiers) name += "." + std::string(modifier);
  throw Unsupported(name + ": " + what);
}

void Decoding::finish() const {
  if (!modifiers_.empty())
    unsupported("modifier ." + std::string(modifiers_.front()) + " is not implemented");
  for (int position = 0; position < operands(); ++position) {
    if (!(taken_ >> position & 1)) unsupported("operand " + std::to_string(position) + " is not implemented");
    if (!statement_.operands[position].second.empty() && !(second_taken_ >> position & 1))
      unsupported("a second destination is not implemented");
  }
}

bool Decoding::accept(std::string_view modifier) {
  const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
  if (found == modifiers_.end()) return false;
  modifiers_.erase(found);
  return true;
}

void Decoding::require(std::string_view modifier) {
  if (!accept(modifier)) unsupported("only implemented with ." + std::string(modifier));
}

int Decoding::accept_one(std::initializer_list<std::string_view> names) {
  int index = 0;
  for (std::string_view name : names) {
    if (accept(name)) return index;
    ++index;
  }
  return -1;
}

int Decoding::require_one(std::initializer_list<std::string_view> names) {
  const int index = accept_one(names);
  if (index < 0) {
    std::string list;
    for (std::string_view name : names) list += " ." + std::string(name);
    unsupported("only implemented with one of" + list);
  }
  return index;
}

std::optional<Type> Decoding::accept_type() {
  for (auto modifier = modifiers_.begin(); modifier != modifiers_.end(); ++modifier) {
    if (auto type = type_named(*modifier)) {
      modifiers_.erase(modifier);
      return type;
    }
  }
  return std::nullopt;
}

Type Decoding::type() {
  const auto type = accept_type();
  if (!type) unsupported("no type that is implemented");
  return *type;
}

Type Decoding::type(std::initializer_list<Type> allowed) {
  const Type found = type();
  if (std::find(allowed.begin(), allowed.end(), found) == allowed.end())
    unsupported("type is not implemented");
  return found;
}

Space Decoding::space() {
  if (accept("global") || accept("const")) return Space::kGlobal;
  if (accept("shared") || accept("shared::cta")) return Space::kShared;
  if (accept("local")) return Space::kLocal;
  if (accept("param") || accept("param::entry") || accept("param::func")) return Space::kParam;
  return Space::kGeneric;
}

int Decoding::vector() {
  switch (accept_one({"v2", "v4", "v8"})) {
    case 0: return 2;
    case 1: return 4;
    case 2: return 8;
    default: return 1;
  }
}

Decoding::Shape Decoding::shape() {
  for (auto modifier = modifiers_.begin(); modifier != modifiers_.end(); ++modifier) {
    Shape shape;
    if (std::sscanf(std::string(*modifier).c_str(), "m%dn%dk%d", &shape.m, &shape.n, &shape.k) == 3) {
      modifiers_.erase(modifier);
      return shape;
    }
  }
  unsupported("no shape");
}

void Decoding::expect_operands(int least, int most) {
  if (operands() < least || operands() > most) unsupported(std::to_string(operands()) + " operands");
}

const syntax::Operand& Decoding::at(int position) const {
  if (position >= operands()) unsupported("operand " + std::to_string(position) + " is missing");
  taken_ |= 1u << position;
  return statement_.operands[position];
}

Operand Decoding::row(const syntax::Operand& operand, Type type, bool destination, bool relaxed) {
  using Kind = syntax::Operand;
  const bool wide = is_wide(type);
  Operand result;
  if (operand.negated) unsupported("! before an operand that is no predicate");
  if (operand.kind == Kind::kSink && destination) {
    result.kind = Operand::kSink;
    return result;
  }
  if (operand.kind == Kind::kInteger && !destination) {
    return kernel_.constant(wide ? operand.bits : static_cast<uint32_t>(operand.bits), wide);
  }
  if (operand.kind == Kind::kFloat && !destination) {
    // A literal takes the type of the instruction; 0f... in a bit-typed one keeps its bits (section 4.5.2).
    if (operand.single && !wide && (!is_float(type) || type == Type::kF32))
      return kernel_.constant(operand.bits, false);
    const double value = operand.single ? std::bit_cast<float>(static_cast<uint32_t>(operand.bits))
                                        : std::bit_cast<double>(operand.bits);
    switch (type) {
      case Type::kF64:
      case Type::kB64: return kernel_.constant(std::bit_cast<uint64_t>(value), true);
      case Type::kF32: return kernel_.constant(std::bit_cast<uint32_t>(static_cast<float>(value)), false);
      case Type::kF16: return kernel_.constant(to_half(static_cast<float>(value)).bits, false);
      case Type::kBf16: return kernel_.constant(to_bfloat16(static_cast<float>(value)).bits, false);
      default: unsupported("floating literal for this type");
    }
  }
  if (operand.kind != Kind::kName) unsupported("operand of a form that is not implemented");
  if (auto special = kernel_.special(operand.name); special && !destination) {
    if (wide) unsupported("64 bits of " + std::string(operand.name));
    return *special;
  }
  const Symbol* symbol = kernel_.find(operand.name);
  if (!symbol) unsupported("unknown name " + std::string(operand.name));
  if (symbol->kind == Symbol::kVariable && !destination)
    return kernel_.address_constant(*symbol, operand.offset, wide);
  if (symbol->kind != Symbol::kRegister) unsupported(std::string(operand.name) + " is not a register");
  if (symbol->wide != wide && !relaxed) {
    unsupported("register " + std::string(operand.name) + " does not have the size of the type");
  }
  result.kind = Operand::kRow;
  result.index = symbol->index;
  result.wide = symbol->wide;
  return result;
}

Operand Decoding::source(int position, Type type) { return row(at(position), type, false, false); }

Operand Decoding::destination(int position, Type type) { return row(at(position), type, true, false); }

Operand Decoding::relaxed_source(int position, Type type) { return row(at(position), type, false, true); }

Operand Decoding::relaxed_destination(int position, Type type) { return row(at(position), type, true, true); }

Operand Decoding::predicate(const syntax::Operand& operand) {
  Operand result;
  if (operand.kind == syntax::Operand::kSink) {
    result.kind = Operand::kSink;
    return result;
  }
  const Symbol* symbol = operand.kind == syntax::Operand::kName ? kernel_.find(operand.name) : nullptr;
  if (!symbol || symbol->kind != Symbol::kPredicate) unsupported("operand is not a predicate");
  result.kind = Operand::kPredicate;
  result.index = symbol->index;
  result.negated = operand.negated;
  return result;
}

Operand Decoding::predicate_source(int position) {
  if (at(position).kind == syntax::Operand::kSink) unsupported("operand is not a predicate");
  return predicate(at(position));
}

Operand Decoding::predicate_destination(int position) {
  if (at(position).negated) unsupported("! before a destination");
  return predicate(at(position));
}

Operand Decoding::second_predicate(int position) {
  const syntax::Operand& operand = at(position);
  second_taken_ |= 1u << position;
  if (operand.second.empty() || operand.second == "_") return {};
  syntax::Operand second;
  second.kind = syntax::Operand::kName;
  second.name = operand.second;
  return predicate(second);
}

std::vector<Operand> Decoding::source_elements(int position, Type type, bool relaxed) {
  const syntax::Operand& operand = at(position);
  if (operand.kind != syntax::Operand::kVector) return {row(operand, type, false, relaxed)};
  std::vector<Operand> rows;
  for (const syntax::Operand& element : operand.elements) rows.push_back(row(element, type, false, relaxed));
  return rows;
}

std::vector<Operand> Decoding::destination_elements(int position, Type type, bool relaxed) {
  const syntax::Operand& operand = at(position);
  if (operand.kind != syntax::Operand::kVector) return {row(operand, type, true, relaxed)};
  std::vector<Operand> rows;
  for (const syntax::Operand& element : operand.elements) rows.push_back(row(element, type, true, relaxed));
  return rows;
}

bool Decoding::is_vector(int position) const { return at(position).kind == syntax::Operand::kVector; }

bool Decoding::is_predicate(int position) const {
  const syntax::Operand& operand = at(position);
  const Symbol* symbol = operand.kind == syntax::Operand::kName ? kernel_.find(operand.name) : nullptr;
  return symbol && symbol->kind == Symbol::kPredicate;
}

bool Decoding::is_immediate(int position) const { return at(position).kind == syntax::Operand::kInteger; }

uint64_t Decoding::immediate(int position) {
  if (!is_immediate(position)) unsupported("operand " + std::to_string(position) + " is not an immediate");
  return at(position).bits;
}

Address Decoding::address(int position) {
  const syntax::Operand& operand = at(position);
  if (operand.kind != syntax::Operand::kAddress || operand.negated)
    unsupported("operand " + std::to_string(position) + " is no address");
  Address address;
  address.offset = operand.offset;
  if (operand.name.empty()) return address;
  const Symbol* symbol = kernel_.find(operand.name);
  if (!symbol) unsupported("unknown name " + std::string(operand.name));
  if (symbol->kind == Symbol::kVariable) {
    if (symbol->address == kUnplaced) {
      address.base = kernel_.address_constant(*symbol, 0, true);
    } else {
      address.offset += static_cast<int64_t>(symbol->address);
    }
  } else if (symbol->kind == Symbol::kRegister) {
    address.base.kind = Operand::kRow;
    address.base.index = symbol->index;
    address.base.wide = symbol->wide;
  } else {
    unsupported(std::string(operand.name) + " is no address");
  }
  return address;
}

bool Decoding::address_is_local(int position) {
  const syntax::Operand& operand = at(position);
  const Symbol* symbol = operand.name.empty() ? nullptr : kernel_.find(operand.name);
  return symbol && symbol->kind == Symbol::kVariable && symbol->space == Space::kLocal;
}

uint32_t Decoding::label(int position) {
  const syntax::Operand& operand = at(position);
  const Symbol* symbol = operand.kind == syntax::Operand::kName ? kernel_.find(operand.name) : nullptr;
  if (!symbol || symbol->kind != Symbol::kLabel) unsupported("unknown label");
  return symbol->index;
}

std::string_view Decoding::name(int position) const {
  const syntax::Operand& operand = at(position);
  return operand.kind == syntax::Operand::kName ? operand.name : std::string_view();
}

std::unique_ptr<Program> load_program(std::string source) {
  auto program = std::make_unique<Program>();
  program->source = std::move(source);
  program->syntax = parse(program->source);
  for (const auto& [name, function] : program->syntax.functions) {
    if (function.entry) program->kernels.emplace(name, KernelDecoder(*program, function).take());
  }
  return program;
}

}  // namespace ptx
