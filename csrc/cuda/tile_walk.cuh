// The walk over tiles of similarities that every kernel of a pairwise loss shares; what it makes of a tile is
// the kernel's own. One file, although a long one: the shapes say what the walk does with their numbers.
//
// One side owns the rows of the tiles, the other side is walked. A block owns kBlockM rows of one side
// (blockIdx.x) and walks a part of the other side's rows (blockIdx.y, see Split) kBlockN at a time, each in S
// steps of 128 bytes of D. The operand tiles of a step come through a ring of kStages buffers by cp.async,
// kStages - 1 steps ahead; each step opens with one wait and one barrier, which publish the step's tiles and
// say that the buffer loaded next is no longer read. Where the other side is stored in a narrower type
// (WideningEngine), its tiles are widened through registers: loaded by the same schedule, and stored after
// the products of the step that loads them.
//
// Of the owner's rows the first H steps (kHeldSteps) stay in the registers of the warps that multiply them.
// Of the others K steps lie in shared memory: all, which stay there after the first tile, where the device
// has room for that beside as many blocks a multiprocessor (most_owner_slots of launcher.cuh); else 3, which
// come again with each tile.
//
//   TileWalk<Shape, Engine> walk(shared, own, other, {other.rnorm}, width);
//   for (walk.start(); walk.next();) {
//     walk.products(c);                // c_ij = <x_i, y_j>
//     ...                              // ReduceShape: take c in
//     walk.store_coefficients(c, ...)  // ProductShape: C made of c, then g_i += sum_j C_ij y_j
//     walk.accumulate(g);
//     walk.write_coefficients(c, ...)  // MatrixShape: C into global memory
//   }
#pragma once

#include <cstdint>

#include "device/tile.cuh"
#include "device/warp.cuh"

namespace ssl_kernels {

constexpr int kStages = 3;
constexpr int kOwnerSlots = 3;  // of own rows that come again, and the fewest that may stay
constexpr int kMaxSplits = 256;

// One operand as the kernels read it: unit column stride, 16-byte aligned rows, width padded to 16 bytes.
template <typename scalar_t, typename acc_t>
struct Operand {
  const scalar_t* data;
  int64_t stride;
  int64_t count;
  const acc_t* rnorm;  // 1 / max(|row|, 1e-12); null: not normalised
};

// Tiles [begin, end) of the other side that part `part` of `parts` walks. 2^33 rows have fewer than 2^31.
struct Split {
  int begin, end;
  __device__ Split(int64_t tiles, int part, int parts) : Split(0, tiles, part, parts) {}
  // Of `tiles` tiles from `first` on.
  __device__ Split(int64_t first, int64_t tiles, int part, int parts)
      : begin(static_cast<int>(first + tiles * part / parts)),
        end(static_cast<int>(first + tiles * (part + 1) / parts)) {}
};

__device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Tiling of kernels that only reduce the tiles: 4 warps, each 32 rows by all columns of the tile, with own
// rows of kHeld steps in registers where tensor cores multiply. `kColumnTerms` numbers of every column come
// with its tile, and its label, where there are any, with `kColumnLabels`.
template <typename Engine, int kHeld, int kColumnTerms_, bool kColumnLabels_ = false>
struct ReduceShape {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  static constexpr bool kDouble = sizeof(acc_t) == 8;
  static constexpr int kWarps = 4;
  static constexpr int kWarpsN = 1;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps * kWarpRows;
  static constexpr int kBlockN = kDouble ? 32 : 64;
  static constexpr int kWarpColumns = kBlockN;
  static constexpr int kNTiles = kBlockN / 8;
  static constexpr int kChunk = kTileRowBytes / sizeof(scalar_t);
  static constexpr int kSliceChunks = 0;
  static constexpr int kPanels = 0;
  static constexpr int kColumnTerms = kColumnTerms_;
  static constexpr bool kColumnLabels = kColumnLabels_;
  static constexpr int kTermSlots = kStages;
  static constexpr int kCopiesAtOnce = 16;
  static constexpr int kHeldSteps = Engine::kHoldsOwn ? kHeld : 0;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kOwnBytes = kBlockM * kTileRowBytes;
  static constexpr int kOtherBytes = kBlockN * kTileRowBytes;

  static constexpr int shared_bytes(int own_slots) {
    return own_slots * kOwnBytes + kStages * kOtherBytes +
           kTermSlots * kBlockN * (kColumnTerms * static_cast<int>(sizeof(acc_t)) + (kColumnLabels ? 8 : 0));
  }
};

// Tiling of kernels that multiply coefficients made of the tile by the other side's rows: 8 warps, kWarpsM x
// kWarpsN, each 32 rows by kBlockN / kWarpsN columns of the tile. The coefficients, rounded to scalar_t, are
// an operand tile in shared memory, multiplied in steps over the block's slice of D (blockIdx.z, kSliceChunks
// steps); the result g stays in registers. `kRowTerms` numbers of every row stay in shared memory.
template <typename Engine, int kWarpsM_, int kSliceChunks_, int kColumnTerms_, int kRowTerms_,
          bool kColumnLabels_ = false>
struct ProductShape {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  static constexpr int kWarps = 8;
  static constexpr int kWarpsM = kWarpsM_;
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kBlockM = kWarpsM * kWarpRows;
  static constexpr int kBlockN = sizeof(scalar_t) == 2 ? 64 : 32;
  static constexpr int kWarpColumns = kBlockN / kWarpsN;  // of the tile
  static constexpr int kNTiles = kWarpColumns / 8;
  static constexpr int kChunk = kTileRowBytes / sizeof(scalar_t);
  static constexpr int kSliceChunks = kSliceChunks_;
  static constexpr int kWarpDepth = kChunk / kWarpsN;  // columns of g per step
  static constexpr int kGTiles = kWarpDepth / 8;
  static constexpr int kPanels = kBlockN / kChunk;  // tiles of coefficients side by side
  static constexpr int kColumnTerms = kColumnTerms_;
  static constexpr bool kColumnLabels = kColumnLabels_;
  static constexpr int kTermSlots = kStages;
  static constexpr int kCopiesAtOnce = 16;
  static constexpr int kRowTerms = kRowTerms_;
  static constexpr int kHeldSteps = 0;
  static constexpr int kOwnBytes = kBlockM * kTileRowBytes;
  static constexpr int kOtherBytes = kBlockN * kTileRowBytes;
  static_assert(kPanels * kChunk == kBlockN, "the coefficients are whole tiles");

  static constexpr int shared_bytes(int own_slots) {
    return (own_slots + kPanels) * kOwnBytes + kStages * kOtherBytes +
           (kRowTerms * kBlockM + kTermSlots * kColumnTerms * kBlockN) * static_cast<int>(sizeof(acc_t)) +
           (kColumnLabels ? kTermSlots * kBlockN * 8 : 0);
  }
};

// Tiling of kernels that write a matrix made of the tiles, for walks with two steps per tile at least, of
// doubles with any number: 8 warps, 4 x 2, each 32 rows by half of the columns of the tile. Copies are two
// steps ahead, so the terms of two tiles are there at once, of three where a tile may be a single step.
template <typename Engine, int kColumnTerms_>
struct MatrixShape {
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  static constexpr bool kDouble = sizeof(acc_t) == 8;
  static constexpr int kWarps = 8;
  static constexpr int kWarpsN = 2;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockM = kWarps / kWarpsN * kWarpRows;
  static constexpr int kBlockN = kDouble ? 64 : 128;
  static constexpr int kWarpColumns = kBlockN / kWarpsN;
  static constexpr int kNTiles = kWarpColumns / 8;
  static constexpr int kChunk = kTileRowBytes / sizeof(scalar_t);
  static constexpr int kSliceChunks = 0;
  static constexpr int kPanels = 0;
  static constexpr int kColumnTerms = kColumnTerms_;
  static constexpr bool kColumnLabels = false;
  static constexpr int kTermSlots = kDouble ? kStages : 2;
  static constexpr int kCopiesAtOnce = sizeof(scalar_t) == 4 ? 1 : 16;  // TF32 has no registers for more
  static constexpr int kBlocksPerSm = kDouble ? 1 : 2;
  static constexpr int kHeldSteps = 0;
  static constexpr int kOwnBytes = kBlockM * kTileRowBytes;
  static constexpr int kOtherBytes = kBlockN * kTileRowBytes;

  static constexpr int shared_bytes(int own_slots) {
    return own_slots * kOwnBytes + kStages * kOtherBytes +
           kTermSlots * kColumnTerms * kBlockN * static_cast<int>(sizeof(acc_t));
  }
};

struct NoTile {};

// The slot in shared memory of a step of own rows that stay. Steps that registers hold leave theirs to those
// that are loaded once they are read.
template <int kHeld>
__host__ __device__ constexpr int owner_slot(int step) {
  static_assert(kHeld <= kOwnerSlots);
  return step < kOwnerSlots ? step : step < kOwnerSlots + kHeld ? step - kOwnerSlots : step - kHeld;
}

// Slots for `steps` steps to stay.
template <int kHeld>
__host__ __device__ constexpr int owner_slots(int steps) {
  return steps < kOwnerSlots ? steps : steps - kHeld < kOwnerSlots ? kOwnerSlots : steps - kHeld;
}

template <typename Shape, typename Engine>
class TileWalk {
 public:
  using scalar_t = typename Engine::scalar_t;
  using acc_t = typename Engine::acc_t;
  using other_t = typename Engine::other_t;
  static constexpr bool kWidens = !std::is_same_v<scalar_t, other_t>;
  static constexpr int kColumnTerms = Shape::kColumnTerms;
  static constexpr bool kColumnLabels = Shape::kColumnLabels;
  static constexpr int kHeldSteps = Shape::kHeldSteps;
  using Side = Operand<scalar_t, acc_t>;
  using OtherSide = Operand<other_t, acc_t>;
  using Tile = Fragment<acc_t, Shape::kNTiles>;
  struct Terms {
    const acc_t* of_columns[Shape::kColumnTerms];  // (other.count,) each, null: absent
    const int64_t* labels;                         // (other.count,), with kColumnLabels; null: absent
  };

  // The block owns the rows from `row0` on.
  __device__ __forceinline__ TileWalk(unsigned char* shared, const Side& own, const OtherSide& other,
                                      const Terms& terms, int64_t width,
                                      int64_t row0 = static_cast<int64_t>(blockIdx.x) * Shape::kBlockM)
      : TileWalk(shared, own, other, terms, width, row0,
                 Split(ceil_div(other.count, Shape::kBlockN), blockIdx.y, gridDim.y)) {}

  // And walks the tiles of `split`.
  __device__ __forceinline__ TileWalk(unsigned char* shared, const Side& own, const OtherSide& other,
                                      const Terms& terms, int64_t width, int64_t row0, const Split& split)
      : own_(own),
        other_(other),
        terms_(terms),
        width_(width),
        chunks_(static_cast<int>(ceil_div(width, Shape::kChunk))),
        slice0_(blockIdx.z * Shape::kSliceChunks),
        slice_chunks_(min(Shape::kSliceChunks, chunks_ - slice0_)),
        resident_(owner_slots<kHeldSteps>(chunks_) <= own_bytes() / Shape::kOwnBytes),
        own_tiles_(shared),
        other_tiles_(own_tiles_ + own_bytes()),
        coefficients_(other_tiles_ + kStages * Shape::kOtherBytes),
        column_terms_(reinterpret_cast<acc_t*>(coefficients_ + Shape::kPanels * Shape::kOwnBytes)),
        labels_(reinterpret_cast<int64_t*>(column_terms_ +
                                           Shape::kTermSlots * Shape::kColumnTerms * Shape::kBlockN)),
        row0_(row0),
        split_(split),
        tile_(split_.begin - 1),
        load_tile_(split_.begin) {
    const int warp = threadIdx.x / kWarpSize;
    warp_row_ = warp / Shape::kWarpsN * kWarpRows;
    warp_column_ = warp % Shape::kWarpsN * Shape::kWarpColumns;
  }

  __device__ __forceinline__ int64_t row0() const { return row0_; }
  // First row of the warp's part, in the block.
  __device__ __forceinline__ int warp_row() const { return warp_row_; }
  // First column of the warp's part of the present tile.
  __device__ __forceinline__ int64_t column0() const {
    return int64_t{tile_} * Shape::kBlockN + warp_column_;
  }
  // Shared memory for kRowTerms numbers of every row; the first step's barrier publishes what start()
  // follows.
  __device__ __forceinline__ acc_t* row_terms() const {
    constexpr int kLabels = Shape::kColumnLabels ? Shape::kTermSlots * Shape::kBlockN : 0;
    return reinterpret_cast<acc_t*>(labels_ + kLabels);
  }

  // Starts the copies of the first steps.
  __device__ __forceinline__ void start() {
    for (int step = 0; step < kStages - 1; ++step) {
      load_next();
      advance();
    }
  }

  __device__ __forceinline__ bool next() { return ++tile_ < split_.end; }

  // c = <x_i, y_j> over the present tile, as stored.
  __device__ __forceinline__ void products(Tile& c) {
    clear<acc_t, Shape::kNTiles>(c);
    for (int chunk = 0; chunk < chunks_; ++chunk) {
      step();
      add_products(c, chunk);
      advance();
    }
  }

  // Term `term` of the columns of elements c[.][n][0] and c[.][n][1], which has to be there.
  __device__ __forceinline__ Pair<acc_t> column_pair(int term, int n) const {
    const acc_t* values = column_terms_ +
                          (term_slot(tile_) * Shape::kColumnTerms + term) * Shape::kBlockN + warp_column_;
    return *reinterpret_cast<const Pair<acc_t>*>(values + fragment_column(threadIdx.x % kWarpSize, n, 0));
  }

  // Term 0 of the columns, the norms, or 1.
  __device__ __forceinline__ Pair<acc_t> column_rnorm(int n) const {
    return terms_.of_columns[0] ? column_pair(0, n) : Pair<acc_t>{{acc_t(1), acc_t(1)}};
  }

  // Labels of the same two columns, which have to be there.
  __device__ __forceinline__ Pair<int64_t> column_labels(int n) const {
    const int64_t* labels = labels_ + term_slot(tile_) * Shape::kBlockN + warp_column_;
    return *reinterpret_cast<const Pair<int64_t>*>(labels + fragment_column(threadIdx.x % kWarpSize, n, 0));
  }

  // c_ij times a factor of its row, by fragment_row, and the norm of its column.
  __device__ __forceinline__ void normalize(Tile& c, const acc_t (&row_factor)[4]) const {
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      const Pair<acc_t> column_factor = column_rnorm(n);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] *= row_factor[m * 2 + e / 2] * column_factor.value[e % 2];
      }
    }
  }

  // The factors times c, as the operand of accumulate(). factor(n) gives those of a pair of columns. The
  // barrier of accumulate()'s first step stands between this and the reading, that of the next tile between
  // the reading and the next writing.
  template <typename Factor>
  __device__ __forceinline__ void store_coefficients(const Tile& c, Factor factor) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; ++n) {
      const int column = warp_column_ + fragment_column(lane, n, 0);
      const Pair<acc_t> by = factor(n);
      unsigned char* panel = coefficients_ + column / Shape::kChunk * Shape::kOwnBytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_operands(panel, warp_row_ + fragment_row(lane, i / 2, i % 2 * 2), column % Shape::kChunk,
                       Engine::to_operands(c[i / 2][n][i % 2 * 2] * by.value[0],
                                           c[i / 2][n][i % 2 * 2 + 1] * by.value[1]));
      }
    }
  }

  // The same as a part of a matrix of whole tiles in global memory; `rows` is where the block's first row
  // begins.
  template <typename Factor>
  __device__ __forceinline__ void write_coefficients(const Tile& c, Factor factor, scalar_t* rows,
                                                     int64_t stride) const {
    const int lane = threadIdx.x % kWarpSize;
    rows += (warp_row_ + fragment_row(lane, 0, 0)) * stride + column0();
#pragma unroll
    for (int n = 0; n < Shape::kNTiles; n += 2) {
      const Pair<acc_t> by[2] = {factor(n), factor(n + 1)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scalar_t* to = rows + fragment_row(0, i / 2, i % 2 * 2) * stride;
        Pair<scalar_t> pair[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          pair[k] = Engine::to_operands(c[i / 2][n + k][i % 2 * 2] * by[k].value[0],
                                        c[i / 2][n + k][i % 2 * 2 + 1] * by[k].value[1]);
        }
        if constexpr (sizeof(scalar_t) == 2) {
          // Lanes 2k and 2k + 1 exchange a pair, so that the four of a row write 32 bytes.
          const bool odd = lane % 2 != 0;
          const float first = *reinterpret_cast<const float*>(&pair[0]);
          const float second = *reinterpret_cast<const float*>(&pair[1]);
          const float kept = odd ? second : first;
          const float received = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
          to += fragment_column(lane & ~1, n + lane % 2, 0);
          store_pair(reinterpret_cast<float*>(to), odd ? received : kept, odd ? kept : received);
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            store_pair(to + fragment_column(lane, n + k, 0), pair[k].value[0], pair[k].value[1]);
          }
        }
      }
    }
  }

  // g += coefficients times the tile's rows of the other side, over the block's slice of D.
  template <typename Accumulator>
  __device__ __forceinline__ void accumulate(Accumulator& g) {
#pragma unroll
    for (int slice = 0; slice < Shape::kSliceChunks; ++slice) {
      if (slice < slice_chunks_) {
        step();
#pragma unroll
        for (int panel = 0; panel < Shape::kPanels; ++panel) {
          Engine::template product_nn<Shape::kGTiles>(
              g[slice], coefficients_ + panel * Shape::kOwnBytes, warp_row_,
              other_tiles_ + stage_ * Shape::kOtherBytes, panel * Shape::kChunk, warp_depth());
        }
        advance();
      }
    }
  }

  // g into part blockIdx.y of (parts, own.count, width).
  template <typename Accumulator>
  __device__ __forceinline__ void store(const Accumulator& g, acc_t* partial) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int slice = 0; slice < Shape::kSliceChunks; ++slice) {
#pragma unroll
      for (int n = 0; n < Shape::kGTiles; ++n) {
        const int64_t d = static_cast<int64_t>(slice0_ + slice) * Shape::kChunk + warp_depth() +
                          fragment_column(lane, n, 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = row0_ + warp_row_ + fragment_row(lane, i / 2, i % 2 * 2);
          if (row < own_.count && d < width_) {
            store_pair(partial + (blockIdx.y * own_.count + row) * width_ + d, g[slice][i / 2][n][i % 2 * 2],
                       g[slice][i / 2][n][i % 2 * 2 + 1]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kOtherSharedBytes = Shape::shared_bytes(0);

  // What the launch leaves to own rows: whole slots, of all steps where they stay.
  static __device__ __forceinline__ int own_bytes() {
    int launched;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(launched));
    return launched - kOtherSharedBytes;
  }

  __device__ __forceinline__ int warp_depth() const {
    return threadIdx.x / kWarpSize % Shape::kWarpsN * Shape::kWarpDepth;
  }

  __device__ __forceinline__ void step() {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    load_next();
  }

  // The products of a step. One level a step that is held: which registers has to be known at compile time.
  template <int kStep = 0>
  __device__ __forceinline__ void add_products(Tile& c, int chunk) {
    const unsigned char* other = other_tiles_ + stage_ * Shape::kOtherBytes;
    const unsigned char* own =
        own_tiles_ + (resident_ ? owner_slot<kHeldSteps>(chunk) : stage_) * Shape::kOwnBytes;
    if constexpr (kStep < kHeldSteps) {
      if (chunk == kStep) {
        if (tile_ == split_.begin) Engine::load_own(held_[kStep], own, warp_row_);
        Engine::template product_nt<Shape::kNTiles>(c, held_[kStep], other, warp_column_);
      } else {
        add_products<kStep + 1>(c, chunk);
      }
    } else {
      Engine::template product_nt<Shape::kNTiles>(c, own, warp_row_, other, warp_column_);
    }
  }

  // Ends a step: its tiles are read, what it loaded into registers is stored.
  __device__ __forceinline__ void advance() {
    if constexpr (kWidens) {
      if (holds_tile_) widened_.store(other_tiles_ + load_stage() * Shape::kOtherBytes);
    }
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
  }

  // Of the step kStages - 1 after the present one: the stage that the step before this one read.
  __device__ __forceinline__ int load_stage() const { return stage_ == 0 ? kStages - 1 : stage_ - 1; }

  static __device__ __forceinline__ int term_slot(int tile) {
    return static_cast<int>(static_cast<unsigned>(tile) % Shape::kTermSlots);
  }

  // Loads go through the same sequence of steps as the products, kStages - 1 before them. Steps 0 .. chunks -
  // 1 of a tile are for the products, the others for accumulate().
  __device__ __forceinline__ void load_next() {
    if constexpr (kWidens) holds_tile_ = false;
    if (load_tile_ < split_.end) {
      const int64_t column0 = int64_t{load_tile_} * Shape::kBlockN;
      const bool for_products = Shape::kSliceChunks == 0 || load_step_ < chunks_;
      const int64_t depth0 =
          static_cast<int64_t>(for_products ? load_step_ : slice0_ + load_step_ - chunks_) * Shape::kChunk;
      const bool comes_again = !resident_ && (kHeldSteps == 0 || load_step_ >= kHeldSteps);
      if (for_products && (comes_again || load_tile_ == split_.begin)) {
        const int slot = resident_ ? owner_slot<kHeldSteps>(load_step_) : load_stage();
        load_tile<Shape::kBlockM, Shape::kThreads, Shape::kCopiesAtOnce>(
            own_tiles_ + slot * Shape::kOwnBytes, own_.data, own_.stride, own_.count, width_, row0_, depth0);
      }
      if constexpr (kWidens) {
        widened_.load(other_.data, other_.stride, other_.count, width_, column0, depth0);
        holds_tile_ = true;
      } else {
        load_tile<Shape::kBlockN, Shape::kThreads, Shape::kCopiesAtOnce>(
            other_tiles_ + load_stage() * Shape::kOtherBytes, other_.data, other_.stride, other_.count,
            width_, column0, depth0);
      }
      if (load_step_ == 0 && threadIdx.x < Shape::kBlockN) {
        const int slot = term_slot(load_tile_);
        acc_t* to = column_terms_ + slot * Shape::kColumnTerms * Shape::kBlockN + threadIdx.x;
        const int64_t j = column0 + threadIdx.x;
        const bool valid = j < other_.count;
#pragma unroll
        for (int term = 0; term < Shape::kColumnTerms; ++term) {
          const acc_t* from = terms_.of_columns[term];
          if (from) copy_async<sizeof(acc_t)>(to + term * Shape::kBlockN, from + j, valid);
        }
        if constexpr (Shape::kColumnLabels) {
          if (terms_.labels) {
            copy_async<8>(labels_ + slot * Shape::kBlockN + threadIdx.x, terms_.labels + j, valid);
          }
        }
      }
      if (++load_step_ == chunks_ + slice_chunks_) {
        load_step_ = 0;
        ++load_tile_;
      }
    }
    copy_async_commit();
  }

  const Side& own_;
  const OtherSide& other_;
  Terms terms_;
  int64_t width_;
  int chunks_, slice0_, slice_chunks_;
  bool resident_;
  unsigned char *own_tiles_, *other_tiles_, *coefficients_;
  acc_t* column_terms_;
  int64_t* labels_;
  int64_t row0_;
  Split split_;
  int tile_, load_tile_;
  int stage_ = 1;  // of the present step; 0 after start()
  int load_step_ = 0;
  int warp_row_, warp_column_;
  // Where the other side is widened: what the present step loads, and whether it does.
  std::conditional_t<kWidens, WidenedTile<Shape::kBlockN, Shape::kThreads, other_t>, NoTile> widened_;
  bool holds_tile_ = false;
  // Own rows of the first steps, from the first tile on.
  typename Engine::OwnStep held_[kHeldSteps > 0 ? kHeldSteps : 1];
};

}  // namespace ssl_kernels
