// exp and log in double from additions, multiplications and divisions alone. A C library's differ
// in their last bits from version to version; these give the same bits on every machine, as long
// as the compiler does not fuse what is written apart (-ffp-contract=off).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace fastalign {

constexpr double kLn2High = 0x1.62e42fefa38p-1;  // 42 bits: its product with n is exact
constexpr double kLn2Low = 0x1.ef35793c7673p-45;

// e^x for x <= 0, within 2 units in the last place; 0 below -700. NaN stays NaN.
inline double exp_of(double x) {
  if (x < -700.0) return 0.0;
  constexpr double kRound = 0x1.8p52;  // added, it leaves no room for a fraction
  const double shifted = x * 0x1.71547652b82fep+0 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  constexpr double kInverseFactorials[] = {1.0 / 87178291200,
                                           1.0 / 6227020800,
                                           1.0 / 479001600,
                                           1.0 / 39916800,
                                           1.0 / 3628800,
                                           1.0 / 362880,
                                           1.0 / 40320,
                                           1.0 / 5040,
                                           1.0 / 720,
                                           1.0 / 120,
                                           1.0 / 24,
                                           1.0 / 6,
                                           1.0 / 2,
                                           1.0,
                                           1.0};
  double sum = 0.0;
  for (double coefficient : kInverseFactorials) sum = sum * r + coefficient;
  // 2^n by its bits; n is from -1010 to 0.
  std::uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = ((bits & 0xFFFF) + 1023) << 52;
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

// log x for normal x > 0, within 2 units in the last place.
inline double log_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  // x = m 2^n with m from 0.71 to 1.41.
  constexpr std::uint64_t kHalfRoot = 0x3FE6A09E667F3BCD;
  const std::uint64_t offset = bits - kHalfRoot;
  const auto exponent = static_cast<std::int64_t>(offset) >> 52;
  bits -= static_cast<std::uint64_t>(exponent) << 52;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  const auto n = static_cast<double>(exponent);
  // log m = 2 atanh s
  const double s = (m - 1.0) / (m + 1.0);
  const double square = s * s;
  double sum = 0.0;
  for (int i = 23; i > 1; i -= 2) sum = square * (1.0 / i + sum);
  return n * kLn2High + (n * kLn2Low + (2.0 * s + 2.0 * s * sum));
}

}  // namespace fastalign
