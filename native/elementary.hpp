// The elementary functions that decode.hpp calls, in the place of the C library's: computed in double by additions,
// products and quotients alone, so that each build of the edge has the same bits, whatever library its system has. For
// float they are within one unit in the last place. To be included before tile.hpp.
#pragma once
#define MERISTEM_ELEMENTARY
#include <cmath>
#include <cstdint>
#include <cstring>

namespace meristem::elementary {

inline double exponential(double x) {
  if (x != x) return x;
  if (x > 709.7) return __builtin_inf();
  if (x < -745.0) return 0;
  const double t = x * 1.4426950408889634;
  const int64_t n = int64_t(t + (t < 0 ? -0.5 : 0.5));
  const double r = (x - double(n) * 6.93147180369123816490e-01) - double(n) * 1.90821492927058770002e-10;
  double sum = 1;
  for (int i = 14; i > 0; --i) sum = 1 + sum * r / i;
  const int64_t half = n / 2;
  const int64_t bits[2] = {(half + 1023) << 52, (n - half + 1023) << 52};
  double power[2];
  std::memcpy(power, bits, sizeof power);
  return sum * power[0] * power[1];
}

// 2 artanh(s), for |s| <= 0.18.
inline double twice_artanh(double s) {
  const double square = s * s;
  double sum = 0;
  for (int i = 25; i > 0; i -= 2) sum = sum * square + 1.0 / i;
  return 2 * s * sum;
}

inline double logarithm(double x) {
  if (!(x > 0)) return x == 0 ? -__builtin_inf() : __builtin_nan("");
  if (x > 1.7976931348623157e308) return x;
  int64_t n = 0;
  if (x < 2.2250738585072014e-308) { x *= 18014398509481984.0; n = -54; }
  int64_t bits;
  std::memcpy(&bits, &x, 8);
  n += (bits >> 52) - 1023;
  bits = (bits & 0xFFFFFFFFFFFFF) | (int64_t(1023) << 52);
  double m;
  std::memcpy(&m, &bits, 8);
  if (m > 1.4142135623730951) { m /= 2; ++n; }
  return double(n) * 6.93147180559945286227e-01 + twice_artanh((m - 1) / (m + 1));
}

inline double logarithm_of_one_and(double x) {
  return x > -0.29 && x < 0.41 ? twice_artanh(x / (2 + x)) : logarithm(1 + x);
}

// erf x = 2 / sqrt(pi) e^(-x^2) sum_n 2^n x^(2n + 1) / (2n + 1)!!
inline double error_function(double x) {
  if (x != x) return x;
  if (x > 6 || x < -6) return x < 0 ? -1 : 1;
  double term = x, sum = x;
  for (int n = 1; n < 200 && term * term > 1e-40 * sum * sum; ++n) {
    term *= 2 * x * x / (2 * n + 1);
    sum += term;
  }
  return 1.1283791670955126 * exponential(-x * x) * sum;
}

// Sine and cosine of an angle of at most some millions.
inline void turn(double x, double* sine, double* cosine) {
  const double t = x * 0.63661977236758134;
  const int64_t n = int64_t(t + (t < 0 ? -0.5 : 0.5));
  const double r = (x - double(n) * 1.57079632673412561417e+00) - double(n) * 6.07710050650619224932e-11, square = r * r;
  double s = 1, c = 1;
  for (int i = 18; i > 0; i -= 2) {
    s = 1 - s * square / (i * (i + 1));
    c = 1 - c * square / (i * (i - 1));
  }
  s *= r;
  const bool is_odd = n & 1, is_low = n & 2;
  *sine = (is_low ? -1 : 1) * (is_odd ? c : s);
  *cosine = (is_low ? -1 : 1) * (is_odd ? -s : c);
}

}  // namespace meristem::elementary

namespace meristem {

inline float exp(float x) { return float(elementary::exponential(double(x))); }
inline float log(float x) { return float(elementary::logarithm(double(x))); }
inline double log(double x) { return elementary::logarithm(x); }
inline float log1p(float x) { return float(elementary::logarithm_of_one_and(double(x))); }
inline float erf(float x) { return float(elementary::error_function(double(x))); }
inline float hypot(float x, float y) { return float(std::sqrt(double(x) * double(x) + double(y) * double(y))); }
// Of a positive base.
inline double pow(double x, double y) { return elementary::exponential(y * elementary::logarithm(x)); }
inline double sin(double x) { double s, c; elementary::turn(x, &s, &c); return s; }
inline double cos(double x) { double s, c; elementary::turn(x, &s, &c); return c; }

}  // namespace meristem
