// The next token of a row of predictions, from one number of its own (models.generate.choose_rows):
//   p_i = e^((x_i - max x) / temperature), and the first id at which p_0 + ... + p_i exceeds uniform (p_0 + ... + p_last).
#pragma once
#include <limits>

#include "tile.hpp"

namespace meristem::drawing {

constexpr int GROUP = 64;  // ids whose p are summed before the one that is drawn is looked for among them
constexpr float LEAST = -std::numeric_limits<float>::infinity();
using Lanes = Vec<float>;
constexpr int N_LANES = LANES<float>;

// Of the ids from i on; what stands behind the last is never drawn.
MERISTEM_INLINE Lanes at(const float* x, int64_t n, int64_t i) {
  if (i + N_LANES <= n) return load(x + i);
  float rest[N_LANES];
  for (int j = 0; j < N_LANES; ++j) rest[j] = i + j < n ? x[i + j] : LEAST;
  return load(rest);
}

// The p of a group into ``share``, and their sum. Those of -inf are 0, which exponential() does not reach. Compiled once, so
// that it has the same bits wherever it is called.
[[gnu::noinline]] inline double shares(const float* x, int64_t n, int64_t first, float most, float temperature, float* share) {
  Lanes sum = {};
  for (int j = 0; j < GROUP; j += N_LANES) {
    const Lanes y = (at(x, n, first + j) - most) / temperature;
    const Lanes p = y > LEAST ? exponential<float>(y) : Lanes{};
    store(share + j, p);
    sum += p;
  }
  return double(total<float>(sum));
}

// The id; at a temperature of 0 the first of the likeliest. -1 where the largest is not finite, or one is NaN.
inline int64_t drawn(const float* x, int64_t n, float temperature, double uniform) {
  Lanes most = all(LEAST), odd = {};
  for (int64_t i = 0; i < n; i += N_LANES) {
    const Lanes y = at(x, n, i);
    most = y > most ? y : most;
    odd = y == y ? odd : all(1.0f);
  }
  float top = LEAST;
  for (int j = 0; j < N_LANES; ++j) top = most[j] > top ? most[j] : top;
  if (total<float>(odd) > 0 || top == LEAST || top == -LEAST) return -1;
  if (temperature == 0) return std::find(x, x + n, top) - x;
  float share[GROUP];
  double sum = 0;
  for (int64_t i = 0; i < n; i += GROUP) sum += shares(x, n, i, top, temperature, share);
  // Rounded up to the sum it would be exceeded by none.
  const double part = std::min(uniform * sum, std::nextafter(sum, 0.0));
  double until = 0;
  int64_t first = 0;
  for (;; first += GROUP) {
    const double own = shares(x, n, first, top, temperature, share);
    if (until + own > part) break;
    until += own;
  }
  int last = 0;  // the group's sum was rounded otherwise than the sums of its ids
  for (int j = 0; j < GROUP; ++j) {
    if (share[j] > 0) last = j;
    if ((until += share[j]) > part) break;
  }
  return first + last;
}

}  // namespace meristem::drawing
