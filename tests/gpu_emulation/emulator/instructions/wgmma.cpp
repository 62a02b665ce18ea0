// wgmma.mma_async (PTX ISA 9.0, section 9.7.15): the 64 rows of a warpgroup's product, a warp at a time.
// It is executed at once: wgmma.fence, commit_group and wait_group have nothing to do, and a wait that is
// missing is not noticed.
#include <cstring>

#include "../decoder.h"
#include "../machine.h"

namespace ptx {
namespace {

// What the instruction keeps beside its operands.
struct Wgmma {
  int n;
  int k;
  Type input;
  Operand scale_d;  // false: D = A B, true: D += A B
  bool scale_d_immediate;
  bool scale_d_value;
  float scale;  // product of imm-scale-a and imm-scale-b
  bool transposed_a;
  bool transposed_b;
  bool a_in_registers;
};

// Matrix descriptor (section 9.7.15.5.1.2.2): addresses and offsets are in units of 16 bytes.
struct Descriptor {
  uint64_t start;
  uint64_t leading_offset;
  uint64_t stride_offset;
  int swizzle_bytes;  // 16: none, or 32, 64, 128

  // Bits 49 to 51 are the base offset of a matrix that does not begin at a whole swizzle pattern.
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading_offset((bits >> 16 & 0x3fff) << 4),
        stride_offset((bits >> 32 & 0x3fff) << 4) {
    constexpr int kSwizzles[] = {16, 128, 64, 32};
    swizzle_bytes = kSwizzles[bits >> 62];
    if (bits >> 49 & 7) throw Error("wgmma: the base offset of a matrix descriptor is not implemented");
  }

  // Shared address of element (row, k), of `bytes` bytes; the row is m of A or n of B.
  // Core matrices are 8 rows of 16 bytes (section 9.7.15.5.1.1); wider rows are swizzled: 16-byte chunks are
  // exchanged by the exclusive or of their number with that of the row.
  uint64_t address(int row, int k, int bytes, bool transposed) const {
    const int outer = transposed ? k : row;            // strides by rows of a core matrix
    const int inner = (transposed ? row : k) * bytes;  // runs within a row
    const int chunk = inner % swizzle_bytes;
    uint64_t offset = static_cast<uint64_t>(outer % 8) * swizzle_bytes + chunk;
    if (!transposed) {
      offset += outer / 8 * stride_offset;
      offset += inner / swizzle_bytes *
                (swizzle_bytes == 16 ? leading_offset : static_cast<uint64_t>(swizzle_bytes));
    } else if (swizzle_bytes == 16) {
      offset += inner / swizzle_bytes * stride_offset + outer / 8 * leading_offset;
    } else {
      offset += inner / swizzle_bytes * leading_offset + outer / 8 * stride_offset;
    }
    const uint64_t linear = start + offset;
    const uint64_t mask = swizzle_bytes / 16 - 1;
    return (linear ^ ((linear >> 7 & mask) << 4)) & 0x3ffff;
  }
};

float element_value(Type type, uint32_t bits) {
  switch (type) {
    case Type::kF16: return to_float(Half{static_cast<uint16_t>(bits)});
    case Type::kBf16: return to_float(Bfloat16{static_cast<uint16_t>(bits)});
    default: return tf32_value(bits);
  }
}

float read_element(Machine& machine, const Wgmma& wgmma, const Descriptor& descriptor, int row, int k,
                   bool transposed) {
  const int bytes = wgmma.input == Type::kTf32 ? 4 : 2;
  const uint64_t address = descriptor.address(row, k, bytes, transposed);
  uint32_t bits = 0;
  std::memcpy(&bits, machine.access(Space::kShared, address, bytes, AccessKind::kRead, 0), bytes);
  return element_value(wgmma.input, bits);
}

// Rows of A that this warp multiplies: 16 of the 64.
std::vector<float> gather_a(Machine& machine, const Instruction& instruction, const Wgmma& wgmma) {
  Warp& warp = machine.warp();
  std::vector<float> a(16 * wgmma.k);
  if (!wgmma.a_in_registers) {
    const Descriptor descriptor(warp.value(instruction.a, 0));
    const int first = warp.index % 4 * 16;
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < wgmma.k; ++k) {
        a[row * wgmma.k + k] = read_element(machine, wgmma, descriptor, first + row, k, wgmma.transposed_a);
      }
    }
    return a;
  }
  // As A of mma.m16n8k16 and .m16n8k8.
  const int per_register = wgmma.input == Type::kTf32 ? 1 : 2;
  for (size_t i = 0; i < instruction.a_elements.size(); ++i) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const auto bits = static_cast<uint32_t>(warp.value(instruction.a_elements[i], lane));
      const int row = lane / 4 + 8 * (i % 2);
      const int k = per_register * (lane % 4 + 4 * (i / 2));
      for (int e = 0; e < per_register; ++e) {
        a[row * wgmma.k + k + e] = element_value(wgmma.input, per_register == 1 ? bits : bits >> (16 * e));
      }
    }
  }
  return a;
}

LaneMask mma_async(Machine& machine, const Instruction& instruction, LaneMask lanes) {
  if (!machine.gather(lanes, kAllLanes)) return 0;
  Warp& warp = machine.warp();
  const auto& wgmma = *static_cast<const Wgmma*>(instruction.extra.get());
  const std::vector<float> a = gather_a(machine, instruction, wgmma);
  const Descriptor descriptor(warp.value(instruction.b, 0));
  std::vector<float> b(wgmma.k * wgmma.n);
  for (int k = 0; k < wgmma.k; ++k) {
    for (int j = 0; j < wgmma.n; ++j) {
      b[k * wgmma.n + j] = read_element(machine, wgmma, descriptor, j, k, wgmma.transposed_b);
    }
  }
  const bool accumulate = wgmma.scale_d_immediate ? wgmma.scale_d_value : warp.predicate(wgmma.scale_d) & 1;
  const auto position = [&](int lane, size_t i) {
    const int row = lane / 4 + 8 * static_cast<int>(i / 2 % 2);
    const int column = static_cast<int>(i / 4) * 8 + lane % 4 * 2 + static_cast<int>(i % 2);
    return row * wgmma.n + column;
  };
  std::vector<float> c(16 * wgmma.n, 0.0f);
  if (accumulate) {
    for (size_t i = 0; i < instruction.d_elements.size(); ++i) {
      const float* d = warp.lanes<float>(instruction.d_elements[i]);
      for (int lane = 0; lane < kWarpSize; ++lane) c[position(lane, i)] = d[lane];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < wgmma.k; ++k) {
      const float scaled = a[row * wgmma.k + k] * wgmma.scale;
      for (int j = 0; j < wgmma.n; ++j) c[row * wgmma.n + j] += scaled * b[k * wgmma.n + j];
    }
  }
  for (size_t i = 0; i < instruction.d_elements.size(); ++i) {
    float* d = warp.lanes<float>(instruction.d_elements[i]);
    for (int lane = 0; lane < kWarpSize; ++lane) d[lane] = c[position(lane, i)];
  }
  ++machine.count().mma;
  machine.count().mma_flops += uint64_t{2} * 16 * wgmma.n * wgmma.k;
  return kAllLanes;
}

LaneMask nothing(Machine&, const Instruction&, LaneMask lanes) { return lanes; }

// wgmma.mma_async.sync.aligned.shape.f32.atype.btype d, a, b, scale-d, scale-a, scale-b{, trans-a}{, trans-b}
void decode_wgmma(Decoding& decoding) {
  Instruction& instruction = decoding.instruction;
  const int group = decoding.accept_one({"fence", "commit_group", "wait_group"});
  if (group >= 0) {
    if (group == 2) decoding.immediate(0);
    decoding.require("sync");
    decoding.require("aligned");
    instruction.execute = &nothing;
    return;
  }
  decoding.require("mma_async");
  decoding.require("sync");
  decoding.require("aligned");
  decoding.expect_operands(6, 8);
  Wgmma wgmma = {};
  const Decoding::Shape shape = decoding.shape();
  const Type result = decoding.type();
  wgmma.input = decoding.type();
  if (decoding.type() != wgmma.input || result != Type::kF32)
    decoding.unsupported("types are not implemented");
  const bool sixteen_bits = wgmma.input == Type::kF16 || wgmma.input == Type::kBf16;
  if (!sixteen_bits && wgmma.input != Type::kTf32) decoding.unsupported("types are not implemented");
  wgmma.n = shape.n;
  wgmma.k = shape.k;
  if (shape.m != 64 || shape.k != (sixteen_bits ? 16 : 8)) decoding.unsupported("shape is not implemented");
  instruction.d_elements = decoding.destination_elements(0, Type::kF32);
  if (instruction.d_elements.size() != static_cast<size_t>(shape.n / 2))
    decoding.unsupported("registers do not fit");
  wgmma.a_in_registers = decoding.is_vector(1);
  if (wgmma.a_in_registers) {
    instruction.a_elements = decoding.source_elements(1, Type::kB32);
    if (instruction.a_elements.size() != 4) decoding.unsupported("registers do not fit");
  } else {
    instruction.a = decoding.source(1, Type::kB64);
  }
  instruction.b = decoding.source(2, Type::kB64);
  wgmma.scale_d_immediate = decoding.is_immediate(3);
  if (wgmma.scale_d_immediate) {
    wgmma.scale_d_value = decoding.immediate(3) != 0;
  } else {
    wgmma.scale_d = decoding.predicate_source(3);
  }
  const auto sign = [&](int position) {
    return static_cast<float>(static_cast<int64_t>(decoding.immediate(position)));
  };
  wgmma.scale = sign(4) * sign(5);
  int next = 6;
  if (!wgmma.a_in_registers && next < decoding.operands())
    wgmma.transposed_a = decoding.immediate(next++) != 0;
  if (next < decoding.operands()) wgmma.transposed_b = decoding.immediate(next) != 0;
  instruction.extra = std::make_shared<Wgmma>(wgmma);
  instruction.execute = &mma_async;
}

}  // namespace

std::vector<Opcode> wgmma_opcodes() { return {{"wgmma", decode_wgmma}}; }

}  // namespace ptx
