// wmma.load, wmma.store, wmma.mma (PTX ISA 9.0, section 9.7.14.4). Which lane holds which element of a
// fragment is not specified, so any map will do that all three share: elements in row-major order, lane after
// lane.
#include <cstring>

#include "../decoder.h"
#include "../machine.h"

namespace ptx {
namespace {

struct Wmma {
  int rows;  // load, store: of the matrix in memory
  int columns;
  bool column_major;
  Operand stride;  // in elements; none: the matrix is dense
  int m, n, k;     // mma
  Type a, c, d;
};

class Fragment {
 public:
  Fragment(Warp& warp, const std::vector<Operand>& registers, Type type)
      : warp_(warp), registers_(registers), type_(type), per_register_(4 / size_of(type)) {}

  uint32_t bits(int index) const {
    const auto [lane, slot, shift] = place(index);
    const auto word = static_cast<uint32_t>(warp_.value(registers_[slot], lane));
    return per_register_ == 1 ? word : word >> shift & 0xffff;
  }

  void set_bits(int index, uint32_t bits) {
    const auto [lane, slot, shift] = place(index);
    auto word = static_cast<uint32_t>(warp_.value(registers_[slot], lane));
    word = per_register_ == 1 ? bits : (word & ~(0xffffu << shift)) | bits << shift;
    warp_.set_value(registers_[slot], lane, word);
  }

  float value(int index) const {
    switch (type_) {
      case Type::kF16: return to_float(Half{static_cast<uint16_t>(bits(index))});
      case Type::kBf16: return to_float(Bfloat16{static_cast<uint16_t>(bits(index))});
      case Type::kTf32: return tf32_value(bits(index));
      default: return std::bit_cast<float>(bits(index));
    }
  }

  void set_value(int index, float value) {
    set_bits(index, type_ == Type::kF16 ? to_half(value).bits : std::bit_cast<uint32_t>(value));
  }

 private:
  struct Place {
    int lane;
    int slot;
    int shift;
  };

  Place place(int index) const {
    const int per_lane = static_cast<int>(registers_.size()) * per_register_;
    const int i = index % per_lane;
    return {index / per_lane, i / per_register_, i % per_register_ * 16};
  }

  Warp& warp_;
  const std::vector<Operand>& registers_;
  Type type_;
  int per_register_;
};

template <bool kLoad>
LaneMask move_fragment(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  if (!machine.gather(lanes, kAllLanes)) return 0;
  Warp& warp = machine.warp();
  const auto& wmma = *static_cast<const Wmma*>(instruction.extra.get());
  Fragment fragment(warp, kLoad ? instruction.d_elements : instruction.a_elements, instruction.type);
  const int bytes = size_of(instruction.type);
  uint64_t addresses[kWarpSize];
  machine.addresses(instruction.address, kAllLanes, addresses);
  const int dense = wmma.column_major ? wmma.rows : wmma.columns;
  const uint64_t stride = wmma.stride ? warp.value(wmma.stride, 0) : dense;
  for (int row = 0; row < wmma.rows; ++row) {
    for (int column = 0; column < wmma.columns; ++column) {
      const int index = row * wmma.columns + column;
      const uint64_t offset = wmma.column_major ? column * stride + row : row * stride + column;
      const AccessKind kind = kLoad ? AccessKind::kRead : AccessKind::kWrite;
      uint8_t* memory =
          machine.access(instruction.space, addresses[0] + offset * bytes, bytes, kind, index % kWarpSize);
      uint32_t bits = 0;
      if (kLoad) {
        std::memcpy(&bits, memory, bytes);
        fragment.set_bits(index, bits);
      } else {
        bits = fragment.bits(index);
        std::memcpy(memory, &bits, bytes);
      }
    }
  }
  return kAllLanes;
}

LaneMask multiply(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  if (!machine.gather(lanes, kAllLanes)) return 0;
  Warp& warp = machine.warp();
  const auto& wmma = *static_cast<const Wmma*>(instruction.extra.get());
  const Fragment a(warp, instruction.a_elements, wmma.a);
  const Fragment b(warp, instruction.b_elements, wmma.a);
  const Fragment c(warp, instruction.c_elements, wmma.c);
  std::vector<float> sums(wmma.m * wmma.n);
  for (int i = 0; i < wmma.m; ++i) {
    for (int j = 0; j < wmma.n; ++j) {
      float sum = c.value(i * wmma.n + j);
      for (int k = 0; k < wmma.k; ++k) sum += a.value(i * wmma.k + k) * b.value(k * wmma.n + j);
      sums[i * wmma.n + j] = sum;
    }
  }
  Fragment d(warp, instruction.d_elements, wmma.d);
  for (int i = 0; i < wmma.m * wmma.n; ++i) d.set_value(i, sums[i]);
  ++machine.count().mma;
  machine.count().mma_flops += uint64_t{2} * wmma.m * wmma.n * wmma.k;
  return kAllLanes;
}

// The registers of a warp hold every element, a few shapes twice.
void expect_fragment(Decoding& decoding, const std::vector<Operand>& registers, int elements, Type type) {
  const int held = static_cast<int>(registers.size()) * kWarpSize * (4 / size_of(type));
  if (held != elements && held != 2 * elements) decoding.unsupported("registers do not fit the shape");
}

// wmma.load.{a,b,c}.sync.aligned.layout.shape{.space}.type r, [p]{, stride}; wmma.store.d the other way.
void decode_move(Decoding& decoding, bool load) {
  Instruction& instruction = decoding.instruction;
  decoding.expect_operands(2, 3);
  const int which = decoding.require_one({"a", "b", "c", "d"});
  const Decoding::Shape shape = decoding.shape();
  Wmma wmma = {};
  wmma.rows = which == 1 ? shape.k : shape.m;
  wmma.columns = which == 0 ? shape.k : shape.n;
  wmma.column_major = decoding.require_one({"row", "col"}) == 1;
  instruction.space = decoding.space();
  instruction.type = decoding.type();
  if (size_of(instruction.type) < 2 || size_of(instruction.type) > 4)
    decoding.unsupported("type is not implemented");
  if (load) {
    instruction.d_elements = decoding.destination_elements(0, Type::kB32);
  } else {
    instruction.a_elements = decoding.source_elements(1, Type::kB32);
  }
  const auto& elements = load ? instruction.d_elements : instruction.a_elements;
  expect_fragment(decoding, elements, wmma.rows * wmma.columns, instruction.type);
  instruction.address = decoding.address(load ? 1 : 0);
  if (decoding.operands() == 3) wmma.stride = decoding.source(2, Type::kU32);
  instruction.extra = std::make_shared<Wmma>(wmma);
  instruction.execute = load ? &move_fragment<true> : &move_fragment<false>;
}

// wmma.mma.sync.aligned.layout.layout.shape.dtype{.atype.btype}.ctype d, a, b, c; without atype it is f16.
// The layouts concern nothing that is visible.
void decode_multiply(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.expect_operands(4, 4);
  const Decoding::Shape shape = decoding.shape();
  for (int i = 0; i < 2; ++i) decoding.require_one({"row", "col"});
  Wmma wmma = {};
  wmma.m = shape.m;
  wmma.n = shape.n;
  wmma.k = shape.k;
  wmma.d = decoding.type();
  const Type second = decoding.type();
  wmma.a = Type::kF16;
  wmma.c = second;
  if (const auto third = decoding.accept_type()) {
    wmma.a = second;
    wmma.c = decoding.type();
    if (*third != second) decoding.unsupported("mixed types are not implemented");
  }
  for (Type accumulator : {wmma.c, wmma.d}) {
    if (accumulator != Type::kF32 && accumulator != Type::kF16)
      decoding.unsupported("types are not implemented");
  }
  if (wmma.a != Type::kF16 && wmma.a != Type::kBf16 && wmma.a != Type::kTf32) {
    decoding.unsupported("types are not implemented");
  }
  instruction.d_elements = decoding.destination_elements(0, Type::kB32);
  instruction.a_elements = decoding.source_elements(1, Type::kB32);
  instruction.b_elements = decoding.source_elements(2, Type::kB32);
  instruction.c_elements = decoding.source_elements(3, Type::kB32);
  expect_fragment(decoding, instruction.d_elements, wmma.m * wmma.n, wmma.d);
  expect_fragment(decoding, instruction.a_elements, wmma.m * wmma.k, wmma.a);
  expect_fragment(decoding, instruction.b_elements, wmma.k * wmma.n, wmma.a);
  expect_fragment(decoding, instruction.c_elements, wmma.m * wmma.n, wmma.c);
  instruction.extra = std::make_shared<Wmma>(wmma);
  instruction.execute = &multiply;
}

void decode_wmma(Decoding& decoding) {
  decoding.require("sync");
  decoding.require("aligned");
  switch (decoding.require_one({"load", "store", "mma"})) {
    case 0: decode_move(decoding, true); break;
    case 1: decode_move(decoding, false); break;
    default: decode_multiply(decoding);
  }
}

}  // namespace

std::vector<Opcode> wmma_opcodes() { return {{"wmma", decode_wmma}}; }

}  // namespace ptx
