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

// e^x, and 0 where that is no normal number: in half the instructions of ``exponential`` where the processor scales by powers
// of two.
template <class T> MERISTEM_INLINE Vec<T> quick_exponential(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    // Of two numbers the second is taken where one is NaN.
    const __m512 given = _mm512_max_ps(_mm512_set1_ps(-104), _mm512_min_ps(_mm512_set1_ps(88.7f), __m512(x)));
    const Vec<T> whole = Vec<T>(_mm512_roundscale_ps(_mm512_mul_ps(given, _mm512_set1_ps(1.44269504088896341f)), 0));
    return Vec<T>(_mm512_scalef_ps(__m512(exponential_of_rest(Vec<T>(given), whole)), __m512(whole)));
  }
#endif
  const Vec<T> y = exponential<T>(x);
  return x < T(-87) ? Vec<T>{} : y;
}
template <class T> MERISTEM_INLINE Vec<T> quick_sigmoid(Vec<T> x) { return T(1) / (T(1) + quick_exponential<T>(-x)); }

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
//
// A few tokens at a time, column after column: weights, inputs and what is summed stay in registers from token to token.
template <class T, class S> class Strip {
 public:
  Strip(int64_t time, int width, int taps, bool is_unit, int64_t step, const S* x, const S* before, const T* weight)
      : time(time), width(width), taps(taps), is_unit(is_unit), step(step), x(x), before(before) {
    for (int i = 0; i < taps; ++i)
      for (int j = 0; j < width; ++j) tap(w, i)[j] = weight[j * taps + i];
  }

  void forward(T* to, int64_t to_step) const {
    with_taps([&]<int TAPS>() {
      Vec<T> squares[TOKENS];
      for (int64_t t = 0; t < time; t += TOKENS) {
        const int c = int(std::min<int64_t>(TOKENS, time - t));
        T* const rows = to + t * to_step;
        std::fill(squares, squares + c, Vec<T>{});
        for (int j = 0; j < width; j += LANES<T>)
          filter<TAPS>(t, c, j, [&](int i, Vec<T> y) {
            y = y * quick_sigmoid<T>(y);
            squares[i] += y * y;
            store(rows + i * to_step + j, y);
          });
        for (int i = 0; i < c && is_unit; ++i) {
          const T scale = inverse_length(squares[i]);
          T* const row = rows + i * to_step;
          for (int j = 0; j < width; j += LANES<T>) store(row + j, load(row + j) * scale);
        }
      }
    });
  }

  // sent: the gradient of what ``forward`` wrote. d_weight: [width, taps]. d_before may be null.
  void backward(const T* sent, int64_t sent_step, S* d_x, S* d_before, T* d_weight) const {
    with_taps([&]<int TAPS>() {
      T later[PLACES], sums[PLACES];  // d_y of the tokens after those at work, the nearest first; d_weight
      T found[TOKENS * ROW], slope[TOKENS * ROW];
      std::fill(later, tap(later, taps), T(0));
      std::fill(sums, tap(sums, taps), T(0));
      for (int64_t t = (time - 1) / TOKENS * TOKENS; t >= 0; t -= TOKENS) {
        const int c = int(std::min<int64_t>(TOKENS, time - t));
        const T* const d = sent + t * sent_step;
        Vec<T> squares[TOKENS] = {}, along[TOKENS] = {};
        for (int j = 0; j < width; j += LANES<T>)
          filter<TAPS>(t, c, j, [&](int i, Vec<T> y) {
            const Vec<T> s = quick_sigmoid<T>(y), u = y * s;
            store(tap(found, i) + j, u);
            store(tap(slope, i) + j, s + u * (T(1) - s));
            squares[i] += u * u;
            along[i] += u * load(d + i * sent_step + j);
          });
        // What lies along a vector changes its length alone: (d - n <n, d>) / |u| with n = u / |u|.
        T scale[TOKENS], back[TOKENS];
        for (int i = 0; i < c; ++i) {
          scale[i] = is_unit ? inverse_length(squares[i]) : T(1);
          back[i] = is_unit ? total<T>(along[i]) * scale[i] * scale[i] : T(0);
        }
        for (int j = 0; j < width; j += LANES<T>)
          unfilter<TAPS>(t, c, j, later, sums, d_x, [&](int i) {
            return (load(d + i * sent_step + j) - load(tap(found, i) + j) * back[i]) * scale[i] * load(tap(slope, i) + j);
          });
      }
      for (int ago = 1; ago < taps && d_before; ++ago)
        for (int j = 0; j < width; j += LANES<T>) {
          Vec<T> sum{};
          for (int i = 0; i + ago < taps; ++i) sum += load(tap(w, taps - 1 - ago - i) + j) * load(tap(later, i) + j);
          give<T>(d_before + (taps - 1 - ago) * step + j, sum);
        }
      for (int i = 0; i < taps; ++i)
        for (int j = 0; j < width; ++j) d_weight[j * taps + i] = tap(sums, i)[j];
    });
  }

 private:
  static constexpr int TOKENS = 16, ROW = MOST_WIDTH + LANES<T>, PLACES = MOST_TAPS * ROW;
  const int64_t time;
  const int width, taps;
  const bool is_unit;
  const int64_t step;
  const S *x, *before;
  T w[PLACES];

  // Rows of numbers by column, a vector apart, so that those of one column do not meet in one set of the cache.
  template <class P> MERISTEM_INLINE P* tap(P* rows, int i) const { return rows + i * (width + LANES<T>); }
  MERISTEM_INLINE const S* input(int64_t t) const { return t >= 0 ? x + t * step : before + (t + taps - 1) * step; }
  static T inverse_length(Vec<T> squares) { return 1 / std::sqrt(total<T>(squares) + T(1e-12)); }

  // Four taps are the usual: their loops are unrolled.
  template <class F> void with_taps(F f) const {
    if (taps == 4) f.template operator()<4>();
    else f.template operator()<0>();
  }

  // f(i, y of the token t + i) for c tokens, one vector of columns from j on.
  template <int TAPS, class F> MERISTEM_INLINE void filter(int64_t t, int c, int j, F f) const {
    const int n = TAPS ? TAPS : taps;
    Vec<T> weight[TAPS ? TAPS : MOST_TAPS], in[TAPS ? TAPS : MOST_TAPS];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) weight[i] = load(tap(w, i) + j);
#pragma GCC unroll 8
    for (int i = 0; i < n - 1; ++i) in[i] = take<T>(input(t - n + 1 + i) + j);
    for (int at = 0; at < c; ++at) {
      in[n - 1] = take<T>(x + (t + at) * step + j);
      Vec<T> y{};
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) y += in[i] * weight[i];
#pragma GCC unroll 8
      for (int i = 0; i < n - 1; ++i) in[i] = in[i + 1];
      f(at, y);
    }
  }

  // d_y(i) is that of the token t + i. From the last of c tokens to the first: d_x, and what is added to the weights' gradient.
  template <int TAPS, class F>
  MERISTEM_INLINE void unfilter(int64_t t, int c, int j, T* later, T* sums, S* d_x, F d_y) const {
    const int n = TAPS ? TAPS : taps;
    Vec<T> weight[TAPS ? TAPS : MOST_TAPS], in[TAPS ? TAPS : MOST_TAPS], sum[TAPS ? TAPS : MOST_TAPS], d[TAPS ? TAPS : MOST_TAPS];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      weight[i] = load(tap(w, i) + j);
      sum[i] = load(tap(sums, i) + j);
    }
#pragma GCC unroll 8
    for (int i = 1; i < n; ++i) {
      d[i] = load(tap(later, i - 1) + j);
      in[i - 1] = take<T>(input(t + c - n + i) + j);
    }
    for (int at = c - 1; at >= 0; --at) {
      // The inputs of the token, the last of them its own, and d_y of those that it is an input of, its own first.
#pragma GCC unroll 8
      for (int i = n - 1; i > 0; --i) in[i] = in[i - 1];
      in[0] = take<T>(input(t + at - n + 1) + j);
      d[0] = d_y(at);
      Vec<T> of_x{};
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        sum[i] += d[0] * in[i];
        of_x += weight[n - 1 - i] * d[i];
      }
      give<T>(d_x + (t + at) * step + j, of_x);
#pragma GCC unroll 8
      for (int i = n - 1; i > 0; --i) d[i] = d[i - 1];
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) store(tap(sums, i) + j, sum[i]);
#pragma GCC unroll 8
    for (int i = 1; i < n; ++i) store(tap(later, i - 1) + j, d[i]);
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
      if (gate) y = y * quick_sigmoid<T>(take<T>(gate + at + j));
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
        o = quick_sigmoid<T>(take<T>(gate + at + j));
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
      if (gate) d = d * quick_sigmoid<T>(take<T>(gate + at + j));
      give<T>(d_x + at + j, (d - take<T>(x + at + j) * scale * mean) * scale);
    }
  }
};

// ---- SwiGLU ----

// A row of x has ``width`` gates and as many others: y = silu(gate) other.
template <class T, class S> void swiglu(const S* x, int64_t width, S* to) {
  for (int64_t j = 0; j < width; j += LANES<T>) {
    const Vec<T> g = take<T>(x + j);
    give<T>(to + j, g * quick_sigmoid<T>(g) * take<T>(x + width + j));
  }
}
template <class T, class S> void swiglu_back(const S* x, int64_t width, const S* sent, S* d_x) {
  for (int64_t j = 0; j < width; j += LANES<T>) {
    const Vec<T> g = take<T>(x + j), s = quick_sigmoid<T>(g), d = take<T>(sent + j), u = g * s;
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
    sum += quick_exponential<T>(some<T>(x + j, lanes, -std::numeric_limits<T>::infinity()) - top);
  });
  return top + std::log(total<T>(sum));
}

// weight (softmax(x) - e_target), given log_sum.
template <class T, class S> void softmax_back(const S* x, int64_t n, int64_t target, T log_sum, T weight, S* d_x) {
  over<T>(n, [&](int64_t j, int lanes) {
    const Vec<T> d = weight * quick_exponential<T>(some<T>(x + j, lanes, T(0)) - log_sum);
    if (lanes == LANES<T>) give<T>(d_x + j, d);
    else give_part<T>(d_x + j, lanes, d);
  });
  give_one<T>(d_x + target, weight * (quick_exponential<T>(all(take_one<T>(x + target) - log_sum))[0] - 1));
}

}  // namespace meristem
