// Coefficients of 2^f on |f| <= 1/2, the lowest power first, for kernels over tiles and over batches.
#pragma once

namespace ssl_kernels::cpu {

// A minimax polynomial: relative error below 2e-7.
template <class T>
inline constexpr T kExp2[7] = {
    1.f, 6.9314720e-1f, 2.4022648e-1f, 5.5503325e-2f, 9.6184374e-3f, 1.3398874e-3f, 1.5353362e-4f,
};

// (ln 2)^k / k!, the Taylor series: the first term left out is 2e-16 at |f| = 1/2.
template <>
inline constexpr double kExp2<double>[13] = {
    1.,
    6.931471805599453e-1,
    2.402265069591007e-1,
    5.5504108664821576e-2,
    9.618129107628477e-3,
    1.3333558146428441e-3,
    1.5403530393381606e-4,
    1.5252733804059838e-5,
    1.3215486790144305e-6,
    1.0178086009239696e-7,
    7.054911620801121e-9,
    4.44553827187081e-10,
    2.5678435993488196e-11,
};

}  // namespace ssl_kernels::cpu
