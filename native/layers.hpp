// What stands around the products of matrices in a training step, forward and backward: the vectors of a memory, norms with
// and without a gate, SwiGLU, cross entropy. Each reads what it needs once and writes what it makes once; the backward pass
// computes anew what is cheaper computed than kept.
//
// Numbers are stored in float, double or bfloat16 (S) and computed in float or double (T). Rows are worked on in blocks that do
// not depend on how many threads there are, and neither do the bits.
#pragma once
#include <limits>
#include <type_traits>

#include "tile.hpp"

namespace meristem {

struct Brain { uint16_t bits; };  // bfloat16: the upper half of a float

template <class T, class S> MERISTEM_INLINE Vec<T> take(const S* p) {
  if constexpr (std::is_same_v<S, Brain>) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    Halves half;
    std::memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)
    Words word = Words(_mm512_cvtepu16_epi32(__m256i(half)));  // which the compiler makes four instructions of
#else
    Words word = __builtin_convertvector(half, Words);
#endif
    word <<= 16;
    Vec<T> x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  } else {
    return load(p);
  }
}

// Rounded to the nearest, to even in the middle; NaN stays NaN.
template <class T, class S> MERISTEM_INLINE void give(S* p, Vec<T> x) {
  if constexpr (std::is_same_v<S, Brain>) {
    typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
    typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
    Words word;
    std::memcpy(&word, &x, sizeof word);
    const Words rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector(x == x ? rounded : Words{} + 0x7FC0, Halves);
    std::memcpy(p, &half, sizeof half);
  } else {
    store(p, x);
  }
}

// The first ``n`` of a vector, and ``rest`` in the other lanes.
template <class T, class S> MERISTEM_INLINE Vec<T> take_part(const S* p, int n, T rest) {
  S lanes[LANES<T>] = {};
  std::memcpy(lanes, p, n * sizeof(S));
  Vec<T> x = take<T>(lanes);
  for (int i = n; i < LANES<T>; ++i) x[i] = rest;
  return x;
}
template <class T, class S> MERISTEM_INLINE void give_part(S* p, int n, Vec<T> x) {
  S lanes[LANES<T>];
  give<T>(lanes, x);
  std::memcpy(p, lanes, n * sizeof(S));
}
template <class T, class S> MERISTEM_INLINE void give_one(S* p, T x) { give_part<T>(p, 1, all(x)); }
template <class T, class S> MERISTEM_INLINE T take_one(const S* p) { return take_part<T>(p, 1, T(0))[0]; }

// ---- the vectors of a memory ----

constexpr int MOST_TAPS = 8, MOST_WIDTH = 1024;  // what stands on the stack

// One head of one vector of one row, over time: y_t = sum_i w_i x_(t - taps + 1 + i), u = y sigmoid(y), and u / |u| where it is
// to be a unit. x: ``step`` numbers from token to token; before: the inputs before the first, [taps - 1], as far apart.
template <class T, class S> class Strip {
 public:
  Strip(int64_t time, int width, int taps, bool is_unit, int64_t step, const S* x, const S* before, const T* weight)
      : time(time), width(width), taps(taps), is_unit(is_unit), step(step), x(x), before(before) {
    for (int i = 0; i < taps; ++i)
      for (int j = 0; j < width; ++j) tap(w, i)[j] = weight[j * taps + i];
  }

  void forward(T* to, int64_t to_step) const {
    with_taps([&]<int TAPS>() {
      for (int64_t t = 0; t < time; ++t, to += to_step) {
        const Inputs in(*this, t);
        Vec<T> sum{};
        for (int j = 0; j < width; j += LANES<T>) {
          Vec<T> y = filtered<TAPS>(in, j);
          y = y * sigmoid<T>(y);
          sum += y * y;
          store(to + j, y);
        }
        if (!is_unit) continue;
        const T scale = inverse_length(sum);
        for (int j = 0; j < width; j += LANES<T>) store(to + j, load(to + j) * scale);
      }
    });
  }

  // sent: the gradient of what ``forward`` wrote. d_weight: [width, taps]. d_before may be null.
  void backward(const T* sent, int64_t sent_step, S* d_x, S* d_before, T* d_weight) const {
    with_taps([&]<int TAPS>() {
      T later[PLACES], sums[PLACES];  // d_y of the tokens from t on; d_weight
      std::fill(later, tap(later, taps), T(0));
      std::fill(sums, tap(sums, taps), T(0));
      // x_t is an input of the tokens from t to t + taps - 1, whose gradients stand in a ring.
      for (int64_t t = time - 1; t > -taps; --t) {
        T* const now = tap(later, int((t + taps) % taps));
        if (t >= 0) through<TAPS>(t, sent + t * sent_step, now, sums);
        else std::fill(now, now + width, T(0));
        S* const to = t >= 0 ? d_x + t * step : d_before ? d_before + (t + taps - 1) * step : nullptr;
        if (!to) continue;
        const T* of[MOST_TAPS];
        for (int i = 0; i < taps; ++i) of[i] = tap(later, int((t + 2 * taps - 1 - i) % taps));
        for (int j = 0; j < width; j += LANES<T>) {
          Vec<T> d{};
#pragma GCC unroll 8
          for (int i = 0; i < (TAPS ? TAPS : taps); ++i) d += load(tap(w, i) + j) * load(of[i] + j);
          give<T>(to + j, d);
        }
      }
      for (int i = 0; i < taps; ++i)
        for (int j = 0; j < width; ++j) d_weight[j * taps + i] = tap(sums, i)[j];
    });
  }

 private:
  const int64_t time;
  const int width, taps;
  const bool is_unit;
  const int64_t step;
  const S *x, *before;
  // One row for each tap, a vector apart, so that rows of the same column do not meet in one set of the cache.
  static constexpr int PLACES = MOST_TAPS * (MOST_WIDTH + LANES<T>);
  T w[PLACES];
  template <class P> MERISTEM_INLINE P* tap(P* rows, int i) const { return rows + i * (width + LANES<T>); }

  struct Inputs {
    const S* at[MOST_TAPS];
    Inputs(const Strip& s, int64_t t) {
      for (int i = 0; i < s.taps; ++i) {
        const int64_t then = t - s.taps + 1 + i;
        at[i] = then >= 0 ? s.x + then * s.step : s.before + (then + s.taps - 1) * s.step;
      }
    }
  };

  // Four taps are the usual: their loop is unrolled.
  template <class F> void with_taps(F f) const {
    if (taps == 4) f.template operator()<4>();
    else f.template operator()<0>();
  }
  template <int TAPS> MERISTEM_INLINE Vec<T> filtered(const Inputs& in, int j) const {
    Vec<T> y{};
#pragma GCC unroll 8
    for (int i = 0; i < (TAPS ? TAPS : taps); ++i) y += take<T>(in.at[i] + j) * load(tap(w, i) + j);
    return y;
  }
  static T inverse_length(Vec<T> squares) { return 1 / std::sqrt(total<T>(squares) + T(1e-12)); }

  // d_y of a token, and what it adds to the gradient of the weights.
  template <int TAPS> void through(int64_t t, const T* sent, T* d_y, T* sums) const {
    T found[MOST_WIDTH], slope[MOST_WIDTH];
    const Inputs in(*this, t);
    Vec<T> squares{}, along{};
    for (int j = 0; j < width; j += LANES<T>) {
      const Vec<T> y = filtered<TAPS>(in, j), s = sigmoid<T>(y), u = y * s;
      store(found + j, u);
      store(slope + j, s + u * (T(1) - s));
      squares += u * u;
      along += u * load(sent + j);
    }
    // What lies along a vector changes its length alone: (d - n <n, d>) / |u| with n = u / |u|.
    const T scale = is_unit ? inverse_length(squares) : T(1), back = is_unit ? total<T>(along) * scale * scale : T(0);
    for (int j = 0; j < width; j += LANES<T>) {
      const Vec<T> d = (load(sent + j) - load(found + j) * back) * scale * load(slope + j);
      store(d_y + j, d);
#pragma GCC unroll 8
      for (int i = 0; i < (TAPS ? TAPS : taps); ++i) store(tap(sums, i) + j, load(tap(sums, i) + j) + d * take<T>(in.at[i] + j));
    }
  }
};

// ---- norms ----

// y = x / sqrt(mean(x^2) + eps) * gain, that times sigmoid(gate) where there is one, and added to what stands ``beside`` it.
template <class T, class S> struct Norm {
  int width;
  T eps;
  const S *x, *gate, *beside;
  const T* gain;

  T inverse_size(const S* row) const {
    Vec<T> squares{};
    for (int j = 0; j < width; j += LANES<T>) { const Vec<T> v = take<T>(row + j); squares += v * v; }
    return 1 / std::sqrt(total<T>(squares) / T(width) + eps);
  }
  void forward(int64_t row, S* to) const {
    const int64_t at = row * width;
    const T scale = inverse_size(x + at);
    for (int j = 0; j < width; j += LANES<T>) {
      Vec<T> y = take<T>(x + at + j) * scale * load(gain + j);
      if (gate) y = y * sigmoid<T>(take<T>(gate + at + j));
      if (beside) y += take<T>(beside + at + j);
      give<T>(to + at + j, y);
    }
  }
  // With n = x / size and o = sigmoid(gate): dx = (o g d - n mean(n o g d)) / size; d_gain is added to.
  void backward(int64_t row, const S* sent, S* d_x, S* d_gate, T* d_gain) const {
    const int64_t at = row * width;
    const T scale = inverse_size(x + at);
    Vec<T> along{};
    for (int j = 0; j < width; j += LANES<T>) {
      const Vec<T> n = take<T>(x + at + j) * scale;
      Vec<T> d = take<T>(sent + at + j), o{};
      if (gate) {
        o = sigmoid<T>(take<T>(gate + at + j));
        d = d * o;
      }
      const Vec<T> of_gain = n * d;
      store(d_gain + j, load(d_gain + j) + of_gain);
      const Vec<T> weighed = of_gain * load(gain + j);
      if (gate) give<T>(d_gate + at + j, weighed * (T(1) - o));
      along += weighed;
    }
    const T mean = total<T>(along) / T(width);
    for (int j = 0; j < width; j += LANES<T>) {
      Vec<T> d = take<T>(sent + at + j) * load(gain + j);
      if (gate) d = d * sigmoid<T>(take<T>(gate + at + j));
      give<T>(d_x + at + j, (d - take<T>(x + at + j) * scale * mean) * scale);
    }
  }
};

// ---- SwiGLU ----

// A row of x has ``width`` gates and as many others: y = silu(gate) other.
template <class T, class S> void swiglu(const S* x, int64_t width, S* to) {
  for (int64_t j = 0; j < width; j += LANES<T>) {
    const Vec<T> g = take<T>(x + j);
    give<T>(to + j, g * sigmoid<T>(g) * take<T>(x + width + j));
  }
}
template <class T, class S> void swiglu_back(const S* x, int64_t width, const S* sent, S* d_x) {
  for (int64_t j = 0; j < width; j += LANES<T>) {
    const Vec<T> g = take<T>(x + j), s = sigmoid<T>(g), d = take<T>(sent + j), u = g * s;
    give<T>(d_x + j, d * take<T>(x + width + j) * (s + u * (T(1) - s)));
    give<T>(d_x + width + j, d * u);
  }
}

// ---- cross entropy ----

// f(from, lanes): over whole vectors, and the last numbers.
template <class T, class F> MERISTEM_INLINE void over(int64_t n, F f) {
  int64_t j = 0;
  for (; j + LANES<T> <= n; j += LANES<T>) f(j, LANES<T>);
  if (j < n) f(j, int(n - j));
}
template <class T, class S> MERISTEM_INLINE Vec<T> some(const S* p, int n, T rest) {
  return n == LANES<T> ? take<T>(p) : take_part<T>(p, n, rest);
}

// e^x where it is a number to speak of, else 0: the function above stops short of it.
template <class T> MERISTEM_INLINE Vec<T> probability(Vec<T> x) {
  const Vec<T> p = exponential<T>(x);
  return x < T(-87) ? Vec<T>{} : p;
}

// log sum_j e^(x_j), of n logits.
template <class T, class S> T log_sum(const S* x, int64_t n) {
  Vec<T> most = all(-std::numeric_limits<T>::infinity());
  over<T>(n, [&](int64_t j, int lanes) {
    const Vec<T> v = some<T>(x + j, lanes, -std::numeric_limits<T>::infinity());
    most = v > most ? v : most;
  });
  T top = most[0];
  for (int i = 1; i < LANES<T>; ++i) top = most[i] > top ? most[i] : top;
  if (!(std::abs(top) < std::numeric_limits<T>::infinity())) return T(NAN);
  Vec<T> sum{};
  over<T>(n, [&](int64_t j, int lanes) {
    sum += probability<T>(some<T>(x + j, lanes, -std::numeric_limits<T>::infinity()) - top);
  });
  return top + std::log(total<T>(sum));
}

// weight (softmax(x) - e_target), given log_sum.
template <class T, class S> void softmax_back(const S* x, int64_t n, int64_t target, T log_sum, T weight, S* d_x) {
  over<T>(n, [&](int64_t j, int lanes) {
    const Vec<T> d = weight * probability<T>(some<T>(x + j, lanes, T(0)) - log_sum);
    if (lanes == LANES<T>) give<T>(d_x + j, d);
    else give_part<T>(d_x + j, lanes, d);
  });
  give_one<T>(d_x + target, weight * (probability<T>(all(take_one<T>(x + target) - log_sum))[0] - 1));
}

}  // namespace meristem
