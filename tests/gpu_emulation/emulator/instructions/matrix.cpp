// Matrix instructions of a warp (PTX ISA 9.0, section 9.7.14.5): ldmatrix, stmatrix, mma.sync.
// Sums are taken in float, in order of k; the hardware's order and its width between the additions are not
// documented.
#include <cmath>
#include <cstring>

#include "../decoder.h"
#include "access.h"

namespace ptx {
namespace {

constexpr int kMatrixRows = 8;  // of ldmatrix: 8 rows of 16 bytes
constexpr int kRowBytes = 16;

// Lane l holds elements 2 (l % 4) and the next of row l / 4; with .trans row and column change places.
struct Position {
  int row;
  int column;
};

Position element_position(int lane, int i, bool transposed) {
  const int a = lane / 4;
  const int b = lane % 4 * 2 + i;
  return transposed ? Position{b, a} : Position{a, b};
}

// `vector` matrices, `flag` for .trans. Lanes 8q to 8q + 7 hold the row addresses of matrix q.
template <bool kLoad>
LaneMask move_matrices(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  if (!machine.gather(lanes, kAllLanes)) return 0;
  Warp& warp = machine.warp();
  const int matrices = instruction.vector;
  const LaneMask address_lanes = matrices == 4 ? kAllLanes : (1u << (kMatrixRows * matrices)) - 1;
  uint64_t addresses[kWarpSize];
  machine.addresses(instruction.address, kAllLanes, addresses);
  count_shared(machine.count(), addresses, address_lanes, kRowBytes);
  uint16_t tiles[4][kMatrixRows][8];
  if (!kLoad) {
    for (int q = 0; q < matrices; ++q) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const auto pair = static_cast<uint32_t>(warp.value(instruction.a_elements[q], lane));
        for (int i = 0; i < 2; ++i) {
          const Position at = element_position(lane, i, instruction.flag);
          tiles[q][at.row][at.column] = static_cast<uint16_t>(pair >> (16 * i));
        }
      }
    }
  }
  for (int row = 0; row < kMatrixRows * matrices; ++row) {
    auto* tile_row = reinterpret_cast<uint8_t*>(tiles[row / kMatrixRows][row % kMatrixRows]);
    const AccessKind kind = kLoad ? AccessKind::kRead : AccessKind::kWrite;
    uint8_t* memory =
        machine.access(instruction.space, addresses[row], kRowBytes, kind, row, kLoad ? nullptr : tile_row);
    if (kLoad) {
      std::memcpy(tile_row, memory, kRowBytes);
    } else {
      std::memcpy(memory, tile_row, kRowBytes);
    }
  }
  if (kLoad) {
    for (int q = 0; q < matrices; ++q) {
      uint32_t* d = warp.lanes<uint32_t>(instruction.d_elements[q]);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const Position low = element_position(lane, 0, instruction.flag);
        const Position high = element_position(lane, 1, instruction.flag);
        d[lane] = tiles[q][low.row][low.column] | static_cast<uint32_t>(tiles[q][high.row][high.column])
                                                      << 16;
      }
    }
  }
  return kAllLanes;
}

// {ld,st}matrix.sync.aligned.m8n8.{x1,x2,x4}{.trans}{.shared}.b16
void decode_move_matrices(Decoding& decoding, bool load) {
  Instruction& instruction = decoding.instruction;
  decoding.require("sync");
  decoding.require("aligned");
  decoding.require("m8n8");
  decoding.require("b16");
  decoding.expect_operands(2, 2);
  instruction.vector = static_cast<uint8_t>(1 << decoding.require_one({"x1", "x2", "x4"}));
  instruction.flag = decoding.accept("trans");
  instruction.space = decoding.space();
  if (instruction.space != Space::kShared && instruction.space != Space::kGeneric)
    decoding.unsupported("state space is not implemented");
  instruction.address = decoding.address(load ? 1 : 0);
  auto& elements = load ? instruction.d_elements : instruction.a_elements;
  elements = load ? decoding.destination_elements(0, Type::kB32) : decoding.source_elements(1, Type::kB32);
  if (elements.size() != instruction.vector)
    decoding.unsupported("registers do not fit the number of matrices");
  instruction.execute = load ? &move_matrices<true> : &move_matrices<false>;
}

// ---- mma.sync: D (M, N) = A (M, K) B (K, N) + C. Lane l belongs to group g = l / 4 and is number t = l % 4
// in it.

// Where the elements of A and B lie, for inputs of which a register holds kPerRegister: register i of A has
// row g + 8 (i % 2) and columns from kPerRegister (t + 4 (i / 2)), register i of B has column g and rows from
// kPerRegister (t + 4 i).
template <int kM, int kK, int kPerRegister, class T, class Register, class Convert>
void gather_a(Warp& warp, const std::vector<Operand>& elements, T (&a)[kM][kK], Convert convert) {
  constexpr int kRowGroups = kM / 8;
  for (size_t i = 0; i < elements.size(); ++i) {
    const Register* lanes = warp.lanes<Register>(elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = lane / 4 + 8 * static_cast<int>(i % kRowGroups);
      const int column = kPerRegister * (lane % 4 + 4 * static_cast<int>(i / kRowGroups));
      for (int e = 0; e < kPerRegister; ++e) a[row][column + e] = convert(lanes[lane], e);
    }
  }
}

template <int kK, int kPerRegister, class T, class Register, class Convert>
void gather_b(Warp& warp, const std::vector<Operand>& elements, T (&b)[kK][8], Convert convert) {
  for (size_t i = 0; i < elements.size(); ++i) {
    const Register* lanes = warp.lanes<Register>(elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int row = kPerRegister * (lane % 4 + 4 * static_cast<int>(i));
      for (int e = 0; e < kPerRegister; ++e) b[row + e][lane / 4] = convert(lanes[lane], e);
    }
  }
}

// C and D have two neighbouring columns 2 t and 2 t + 1 of row g, then of row g + 8.
template <int kM, class T, class Register>
void gather_c(Warp& warp, const std::vector<Operand>& elements, T (&c)[kM][8]) {
  for (size_t i = 0; i < elements.size(); ++i) {
    const Register* lanes = warp.lanes<Register>(elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2] = std::bit_cast<T>(lanes[lane]);
    }
  }
}

template <int kM, class T, class Register>
void scatter_d(Warp& warp, const std::vector<Operand>& elements, const T (&d)[kM][8]) {
  for (size_t i = 0; i < elements.size(); ++i) {
    if (elements[i].kind == Operand::kSink) continue;
    Register* lanes = warp.lanes<Register>(elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      lanes[lane] = std::bit_cast<Register>(d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
    }
  }
}

// The same for .f16 accumulators, two to a register.
void gather_c_half(Warp& warp, const std::vector<Operand>& elements, float (&c)[16][8]) {
  for (size_t i = 0; i < elements.size(); ++i) {
    const uint32_t* lanes = warp.lanes<uint32_t>(elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int e = 0; e < 2; ++e) {
        c[lane / 4 + 8 * i][lane % 4 * 2 + e] =
            to_float(Half{static_cast<uint16_t>(lanes[lane] >> (16 * e))});
      }
    }
  }
}

void scatter_d_half(Warp& warp, const std::vector<Operand>& elements, const float (&d)[16][8]) {
  for (size_t i = 0; i < elements.size(); ++i) {
    if (elements[i].kind == Operand::kSink) continue;
    uint32_t* lanes = warp.lanes<uint32_t>(elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const float* pair = &d[lane / 4 + 8 * i][lane % 4 * 2];
      lanes[lane] = to_half(pair[0]).bits | static_cast<uint32_t>(to_half(pair[1]).bits) << 16;
    }
  }
}

// Products of the narrow inputs are exact in float, so the multiplication does not round.
template <int kM, int kK>
void multiply(const float (&a)[kM][kK], const float (&b)[kK][8], float (&c)[kM][8]) {
  for (int i = 0; i < kM; ++i) {
    for (int k = 0; k < kK; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
}

template <int kM, int kK>
void multiply(const double (&a)[kM][kK], const double (&b)[kK][8], double (&c)[kM][8]) {
  for (int i = 0; i < kM; ++i) {
    for (int k = 0; k < kK; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] = std::fma(a[i][k], b[k][j], c[i][j]);
    }
  }
}

void count_mma(Counters& counters, int m, int n, int k) {
  ++counters.mma;
  counters.mma_flops += uint64_t{2} * m * n * k;
}

// Elements of a register of two 16-bit floats, or of one tf32.
struct HalfElements {
  static constexpr int kPerRegister = 2;
  float operator()(uint32_t bits, int i) const {
    return to_float(Half{static_cast<uint16_t>(bits >> (16 * i))});
  }
};

struct Bfloat16Elements {
  static constexpr int kPerRegister = 2;
  float operator()(uint32_t bits, int i) const {
    return to_float(Bfloat16{static_cast<uint16_t>(bits >> (16 * i))});
  }
};

struct Tf32Elements {
  static constexpr int kPerRegister = 1;
  float operator()(uint32_t bits, int) const { return tf32_value(bits); }
};

template <class Elements, int kK, bool kHalfAccumulator>
LaneMask mma_float(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  if (!machine.gather(lanes, kAllLanes)) return 0;
  Warp& warp = machine.warp();
  constexpr int kPer = Elements::kPerRegister;
  float a[16][kK];
  float b[kK][8];
  float c[16][8];
  gather_a<16, kK, kPer, float, uint32_t>(warp, instruction.a_elements, a, Elements());
  gather_b<kK, kPer, float, uint32_t>(warp, instruction.b_elements, b, Elements());
  if constexpr (kHalfAccumulator) {
    gather_c_half(warp, instruction.c_elements, c);
  } else {
    gather_c<16, float, uint32_t>(warp, instruction.c_elements, c);
  }
  multiply(a, b, c);
  if constexpr (kHalfAccumulator) {
    scatter_d_half(warp, instruction.d_elements, c);
  } else {
    scatter_d<16, float, uint32_t>(warp, instruction.d_elements, c);
  }
  count_mma(machine.count(), 16, 8, kK);
  return kAllLanes;
}

template <int kM, int kK>
LaneMask mma_double(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  if (!machine.gather(lanes, kAllLanes)) return 0;
  Warp& warp = machine.warp();
  const auto element = [](uint64_t bits, int) { return std::bit_cast<double>(bits); };
  double a[kM][kK];
  double b[kK][8];
  double c[kM][8];
  gather_a<kM, kK, 1, double, uint64_t>(warp, instruction.a_elements, a, element);
  gather_b<kK, 1, double, uint64_t>(warp, instruction.b_elements, b, element);
  gather_c<kM, double, uint64_t>(warp, instruction.c_elements, c);
  multiply(a, b, c);
  scatter_d<kM, double, uint64_t>(warp, instruction.d_elements, c);
  count_mma(machine.count(), kM, 8, kK);
  return kAllLanes;
}

Execute double_handler(Decoding& decoding, Decoding::Shape shape) {
  if (shape.m == 8 && shape.k == 4) return &mma_double<8, 4>;
  if (shape.m == 16 && shape.k == 4) return &mma_double<16, 4>;
  if (shape.m == 16 && shape.k == 8) return &mma_double<16, 8>;
  if (shape.m == 16 && shape.k == 16) return &mma_double<16, 16>;
  decoding.unsupported("shape is not implemented");
}

Execute float_handler(Decoding& decoding, Type input, Decoding::Shape shape, bool half_accumulator) {
  if (shape.m != 16) decoding.unsupported("shape is not implemented");
  if (half_accumulator && input != Type::kF16) decoding.unsupported("accumulator type is not implemented");
  if (input == Type::kF16 && shape.k == 8) {
    return half_accumulator ? &mma_float<HalfElements, 8, true> : &mma_float<HalfElements, 8, false>;
  }
  if (input == Type::kF16 && shape.k == 16) {
    return half_accumulator ? &mma_float<HalfElements, 16, true> : &mma_float<HalfElements, 16, false>;
  }
  if (input == Type::kBf16 && shape.k == 8) return &mma_float<Bfloat16Elements, 8, false>;
  if (input == Type::kBf16 && shape.k == 16) return &mma_float<Bfloat16Elements, 16, false>;
  if (input == Type::kTf32 && shape.k == 4) return &mma_float<Tf32Elements, 4, false>;
  if (input == Type::kTf32 && shape.k == 8) return &mma_float<Tf32Elements, 8, false>;
  decoding.unsupported("shape or type is not implemented");
}

// mma.sync.aligned.shape.row.col.dtype.atype.btype.ctype d, a, b, c
void decode_mma(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  decoding.require("sync");
  decoding.require("aligned");
  decoding.require("row");
  decoding.require("col");
  decoding.expect_operands(4, 4);
  const Decoding::Shape shape = decoding.shape();
  if (shape.n != 8) decoding.unsupported("shape is not implemented");
  const Type result = decoding.type();
  const Type a = decoding.type();
  const Type b = decoding.type();
  const Type c = decoding.type();
  if (a != b || result != c) decoding.unsupported("mixed types are not implemented");
  if (result != Type::kF32 && result != Type::kF16 && result != Type::kF64) {
    decoding.unsupported("accumulator type is not implemented");
  }
  const bool wide = a == Type::kF64;
  if (wide != (result == Type::kF64)) decoding.unsupported("accumulator type is not implemented");
  const Type input = wide ? Type::kF64 : Type::kB32;
  const Type accumulator = wide ? Type::kF64 : Type::kB32;
  instruction.d_elements = decoding.destination_elements(0, accumulator);
  instruction.a_elements = decoding.source_elements(1, input);
  instruction.b_elements = decoding.source_elements(2, input);
  instruction.c_elements = decoding.source_elements(3, accumulator);
  instruction.execute =
      wide ? double_handler(decoding, shape) : float_handler(decoding, a, shape, result == Type::kF16);
  const int per_register = a == Type::kF16 || a == Type::kBf16 ? 2 : 1;
  const size_t accumulators = shape.m * shape.n / kWarpSize / (result == Type::kF16 ? 2 : 1);
  const bool fits =
      instruction.a_elements.size() == static_cast<size_t>(shape.m * shape.k / kWarpSize / per_register) &&
      instruction.b_elements.size() == static_cast<size_t>(shape.k * shape.n / kWarpSize / per_register) &&
      instruction.c_elements.size() == accumulators && instruction.d_elements.size() == accumulators;
  if (!fits) decoding.unsupported("registers do not fit the shape");
}

}  // namespace

std::vector<Opcode> matrix_opcodes() {
  return {{"ldmatrix", [](Decoding& decoding) { decode_move_matrices(decoding, true); }},
          {"stmatrix", [](Decoding& decoding) { decode_move_matrices(decoding, false); }},
          {"mma", decode_mma}};
}

}  // namespace ptx
