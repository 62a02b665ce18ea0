#include "tile_math.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "amx.h"
#include "exp2.h"

namespace ssl_kernels::cpu {
namespace {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// 1 / (2k + 1), the Taylor series of atanh(t) / t in t^2: the first term left out is 2e-18 at t = 1/3.
constexpr int kAtanhTerms = 17;
constexpr double kAtanhSeries[kAtanhTerms] = {1.,      1 / 3.,  1 / 5.,  1 / 7.,  1 / 9.,  1 / 11.,
                                              1 / 13., 1 / 15., 1 / 17., 1 / 19., 1 / 21., 1 / 23.,
                                              1 / 25., 1 / 27., 1 / 29., 1 / 31., 1 / 33.};

// Below it, squares of float32 numbers may have lost digits to underflow.
constexpr double kSmallestSquare = 1e-25;

template <class T>
bool in_range(T squares) {
  return squares > kSmallestSquare && squares < std::numeric_limits<T>::max();
}

// Bytes of a vector register follow each target.
#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SSL_KERNELS_SHUFFLES 1
#endif
#endif

namespace portable {
#define SSL_KERNELS_TARGET
#define SSL_KERNELS_VECTOR_BYTES 16
#include "tile_math.inc"
#undef SSL_KERNELS_VECTOR_BYTES
#undef SSL_KERNELS_TARGET
}  // namespace portable

#ifdef SSL_KERNELS_X86
namespace avx2 {
#define SSL_KERNELS_TARGET __attribute__((target("avx2,fma")))
#define SSL_KERNELS_VECTOR_BYTES 32
#include "tile_math.inc"
#undef SSL_KERNELS_VECTOR_BYTES
#undef SSL_KERNELS_TARGET
}  // namespace avx2

namespace avx512 {
#define SSL_KERNELS_TARGET \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define SSL_KERNELS_VECTOR_BYTES 64
#include "tile_math.inc"
#undef SSL_KERNELS_VECTOR_BYTES
#undef SSL_KERNELS_TARGET
}  // namespace avx512
#endif

bool runs_here(Isa isa) {
  switch (isa) {
#ifdef SSL_KERNELS_X86
    case Isa::kAmx:
      return runs_here(Isa::kAvx512Bf16) && amx::can_run();
    case Isa::kAvx512Bf16:
      return runs_here(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    case Isa::kPortable:
      return true;
    default:
      return false;
  }
}

// The widest, but for AVX512_BF16 without AMX on Intel's processors: it multiplies more slowly there than
// AVX-512 in float32, 105 against 160 GFLOP/s for 256 x 256 x 512 on one core of Sapphire Rapids.
Isa fastest_isa() {
  const Isa widest = runnable_isas().front();
#ifdef SSL_KERNELS_X86
  if (widest == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512;
#endif
  return widest;
}

Isa choose_isa() {
  const char* wanted = std::getenv("SSL_KERNELS_CPU");
  if (!wanted) return fastest_isa();
  std::string runnable;
  for (Isa isa : runnable_isas()) {
    if (std::strcmp(wanted, name_of(isa)) == 0) return isa;
    runnable += std::string(runnable.empty() ? "" : ", ") + name_of(isa);
  }
  for (int k = 0; k <= static_cast<int>(Isa::kAmx); ++k)
    if (std::strcmp(wanted, name_of(static_cast<Isa>(k))) == 0)
      throw std::invalid_argument(
          "SSL_KERNELS_CPU must name instructions that this processor, this system and this build have (" +
          runnable + "), got " + wanted);
  throw std::invalid_argument("SSL_KERNELS_CPU must be amx, avx512_bf16, avx512, avx2 or portable, got " +
                              std::string(wanted));
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

const char* name_of(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

std::vector<Isa> runnable_isas() {
  std::vector<Isa> found;
  for (Isa isa : {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPortable})
    if (runs_here(isa)) found.push_back(isa);
  return found;
}

template <class T>
const TileMath<T>& tile_math() {
  return SSL_KERNELS_WIDEST(kTileMath<T>);
}

template <class S, class T>
const RowConversion<S, T>& row_conversion() {
  return SSL_KERNELS_WIDEST(kRowConversion<S, T>);
}

template const TileMath<float>& tile_math();
template const TileMath<double>& tile_math();
template const RowConversion<float, float>& row_conversion();
template const RowConversion<double, double>& row_conversion();
template const RowConversion<c10::BFloat16, float>& row_conversion();
template const RowConversion<c10::Half, float>& row_conversion();

}  // namespace ssl_kernels::cpu
