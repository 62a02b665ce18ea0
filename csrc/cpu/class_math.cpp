#include "class_math.h"

#include "tile_math.h"

namespace ssl_kernels::cpu {
namespace {

namespace portable {
#define SSL_KERNELS_TARGET
#include "class_math.inc"
#undef SSL_KERNELS_TARGET
}  // namespace portable

#if defined(__x86_64__) && defined(__GNUC__)
#define SSL_KERNELS_X86 1

namespace avx2 {
#define SSL_KERNELS_TARGET __attribute__((target("avx2,fma")))
#include "class_math.inc"
#undef SSL_KERNELS_TARGET
}  // namespace avx2

namespace avx512 {
#define SSL_KERNELS_TARGET \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#include "class_math.inc"
#undef SSL_KERNELS_TARGET
}  // namespace avx512
#endif

}  // namespace

template <class T>
const ClassMath<T>& class_math() {
#ifdef SSL_KERNELS_X86
  if (isa() >= Isa::kAvx512) return avx512::kClassMath<T>;
  if (isa() == Isa::kAvx2) return avx2::kClassMath<T>;
#endif
  return portable::kClassMath<T>;
}

template const ClassMath<float>& class_math();
template const ClassMath<double>& class_math();

}  // namespace ssl_kernels::cpu
