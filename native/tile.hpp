// Vectors, register tiles and the loops over them, for whichever processor this is compiled for: the compiler's vector
// extension becomes AVX2, AVX-512 or NEON, and no line below knows which, but for two that are faster by hand.
//
// A tile is ROWS x 2 vectors of a product that stay in registers while the inner axis is walked:
// C[m, :] += A(m, k) B[k, :], A by two strides, so that it may be read transposed, B and C row by row.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MERISTEM_INLINE inline __attribute__((always_inline))

namespace meristem {

// Of the system, unless a build brings its own (elementary.hpp), which have the same bits everywhere.
#if !defined(MERISTEM_ELEMENTARY)
using std::cos, std::erf, std::exp, std::hypot, std::log, std::log1p, std::pow, std::sin;
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#else
constexpr int VECTOR_BYTES = 32;  // two registers each with NEON
#endif

template <class T> struct VectorOf { typedef T type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vec = typename VectorOf<T>::type;
template <class T> constexpr int LANES = VECTOR_BYTES / int(sizeof(T));

// 12 sums of 6 x 2 leave registers for two vectors of B and one of A, and hide the latency of two units.
constexpr int ROWS = 6;

constexpr int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T> MERISTEM_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, VECTOR_BYTES);
  return x;
}
template <class T> MERISTEM_INLINE void store(T* p, Vec<T> x) { std::memcpy(p, &x, VECTOR_BYTES); }

// ``a`` in all lanes. Subtracted, not added: a + 0 is not a where a is -0, so that the compiler would add indeed, once for
// every broadcast.
template <class T> MERISTEM_INLINE Vec<T> all(T a) { return a - Vec<T>{}; }

// The sum of the lanes, halves first: the order is the same on every path, and so are the bits.
template <class T> MERISTEM_INLINE T total(Vec<T> x) {
  T lanes[LANES<T>];
  store(lanes, x);
  for (int half = LANES<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <class T, int MR, int NR> struct Tile {
  Vec<T> sum[MR][NR];

  MERISTEM_INLINE void zero() {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[m][n] = Vec<T>{};
  }
  MERISTEM_INLINE void from(const T* c, int64_t ldc) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[m][n] = load(c + m * ldc + n * LANES<T>);
  }
  MERISTEM_INLINE void add(const T* c, int64_t ldc, T weight) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[m][n] += weight * load(c + m * ldc + n * LANES<T>);
  }
  MERISTEM_INLINE void to(T* c, int64_t ldc) const {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) store(c + m * ldc + n * LANES<T>, sum[m][n]);
  }
  // += or -= the sum over k in [first, end) of A(m, k) B[k, :].
  template <bool MINUS = false>
  MERISTEM_INLINE void mac(int first, int end, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb) {
    Vec<T> r[MR][NR];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) r[m][n] = sum[m][n];
    a += first * ak;
    b += first * ldb;
    for (int k = first; k < end; ++k, a += ak, b += ldb) {
      Vec<T> row[NR];
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) row[n] = load(b + n * LANES<T>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec<T> x = all<T>(a[m * am]);
#pragma GCC unroll 8
        for (int n = 0; n < NR; ++n) {
          if constexpr (MINUS) r[m][n] -= x * row[n];
          else r[m][n] += x * row[n];
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NR; ++n) sum[m][n] = r[m][n];
  }
};

// Blocks of rows from ``first`` to ``n_rows``: sixes, then fours, then single ones; each shape more is more code. The last
// eight become 4 and 4: a tile of two rows takes as long as one of six.
template <class T, int NR, class F> MERISTEM_INLINE void rows(int first, int n_rows, int j, F& f) {
  int i = first;
  for (; i + ROWS <= n_rows && n_rows - i != 8; i += ROWS) f.template operator()<ROWS, NR>(i, j);
  for (; i + 4 <= n_rows; i += 4) f.template operator()<4, NR>(i, j);
  for (; i < n_rows; ++i) f.template operator()<1, NR>(i, j);
}
// The same blocks, the last one first.
template <class T, int NR, class F> MERISTEM_INLINE void rows_up(int n_rows, int j, F& f) {
  int sixes = n_rows / ROWS * ROWS;
  if (n_rows >= 8 && n_rows - sixes == 2) sixes -= ROWS;
  const int fours = sixes + (n_rows - sixes) / 4 * 4;
  for (int i = n_rows - 1; i >= fours; --i) f.template operator()<1, NR>(i, j);
  for (int i = fours - 4; i >= sixes; i -= 4) f.template operator()<4, NR>(i, j);
  for (int i = sixes - ROWS; i >= 0; i -= ROWS) f.template operator()<ROWS, NR>(i, j);
}

// ``f<MR, NR>(i, j)`` for every tile of a result, columns outside, rows inside; the columns are a multiple of the lanes.
template <class T, class F> inline void tiles(int n_rows, int n_columns, F f) {
  constexpr int V = LANES<T>;
  int j = 0;
  for (; j + 2 * V <= n_columns; j += 2 * V) rows<T, 2>(0, n_rows, j, f);
  if (j < n_columns) rows<T, 1>(0, n_rows, j, f);
}
template <class T, class F> inline void tiles_up(int n_rows, int n_columns, F f) {
  constexpr int V = LANES<T>;
  int j = 0;
  for (; j + 2 * V <= n_columns; j += 2 * V) rows_up<T, 2>(n_rows, j, f);
  if (j < n_columns) rows_up<T, 1>(n_rows, j, f);
}
// Those alone that touch the lower triangle, diagonal included.
template <class T, class F> inline void lower(int n_rows, int n_columns, F f) {
  constexpr int V = LANES<T>;
  int j = 0;
  for (; j + 2 * V <= n_columns; j += 2 * V) rows<T, 2>(j / ROWS * ROWS, n_rows, j, f);
  if (j < n_columns) rows<T, 1>(j / ROWS * ROWS, n_rows, j, f);
}

// to[n][ldt] = from[m][ldf]^T, and zeros in the columns from m to ldt. n is a multiple of the lanes.
template <class T> inline void transpose(const T* from, int64_t ldf, int m, int n, T* to, int64_t ldt) {
  int i = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= m; i += 8)
      for (int j = 0; j < n; j += 8) {
        __m256 r[8], s[8];
        for (int x = 0; x < 8; ++x) r[x] = _mm256_loadu_ps(from + (i + x) * ldf + j);
        for (int x = 0; x < 4; ++x) {
          s[2 * x] = _mm256_unpacklo_ps(r[2 * x], r[2 * x + 1]);
          s[2 * x + 1] = _mm256_unpackhi_ps(r[2 * x], r[2 * x + 1]);
        }
        for (int x = 0; x < 2; ++x) {
          r[4 * x + 0] = _mm256_shuffle_ps(s[4 * x], s[4 * x + 2], 0x44);
          r[4 * x + 1] = _mm256_shuffle_ps(s[4 * x], s[4 * x + 2], 0xEE);
          r[4 * x + 2] = _mm256_shuffle_ps(s[4 * x + 1], s[4 * x + 3], 0x44);
          r[4 * x + 3] = _mm256_shuffle_ps(s[4 * x + 1], s[4 * x + 3], 0xEE);
        }
        for (int x = 0; x < 4; ++x) {
          _mm256_storeu_ps(to + (j + x) * ldt + i, _mm256_permute2f128_ps(r[x], r[x + 4], 0x20));
          _mm256_storeu_ps(to + (j + x + 4) * ldt + i, _mm256_permute2f128_ps(r[x], r[x + 4], 0x31));
        }
      }
  }
#endif
  for (int j = 0; j < n; ++j) {
    for (int x = i; x < m; ++x) to[j * ldt + x] = from[x * ldf + j];
    for (int64_t x = std::max(i, m); x < ldt; ++x) to[j * ldt + x] = 0;
  }
}

// e^(x - whole log 2) for a float x at most half of log 2 from that: the polynomial of Cephes' expf.
MERISTEM_INLINE Vec<float> exponential_of_rest(Vec<float> x, Vec<float> whole) {
  x = x - whole * 0.693359375f;
  x = x + whole * 2.12194440e-4f;
  Vec<float> y = all(1.9875691500E-4f);
  y = y * x + 1.3981999507E-3f;
  y = y * x + 8.3334519073E-3f;
  y = y * x + 4.1665795894E-2f;
  y = y * x + 1.6666665459E-1f;
  y = y * x + 5.0000001201E-1f;
  return y * x * x + x + 1.0f;
}

// e^x. For float Cephes' expf, within two units in the last place; what would overflow stops at e^88, and NaN stays NaN.
template <class T> MERISTEM_INLINE Vec<T> exponential(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < LANES<T>; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
    const Integers is_nan = x != x;
    const Vec<T> given = x;
    x = x < 88.0f ? x : all(88.0f);  // NaN compares false, and becomes a number that can be converted
    x = x > -87.0f ? x : all(-87.0f);
    const Vec<T> t = x * 1.44269504088896341f;
    Integers n = __builtin_convertvector(t + (t < 0.0f ? all(-0.5f) : all(0.5f)), Integers);
    const Vec<T> whole = __builtin_convertvector(n, Vec<T>);
    Vec<T> y = exponential_of_rest(x, whole);
    n = (n + 127) << 23;
    Vec<T> power;
    std::memcpy(&power, &n, VECTOR_BYTES);
    y = y * power;
    return is_nan ? given : y;
  }
}
template <class T> MERISTEM_INLINE Vec<T> sigmoid(Vec<T> x) { return T(1) / (T(1) + exponential<T>(-x)); }

// While this lives, numbers too small to be normal count as zero: a long decay is full of them, and each costs a hundred
// times the time of another. What held before is restored.
class Flushed {
 public:
#if defined(MERISTEM_PORTABLE_BITS)  // WebAssembly has no such setting
#elif defined(__x86_64__)
  Flushed() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~Flushed() { _mm_setcsr(before); }

 private:
  unsigned before;
#elif defined(__aarch64__)
  Flushed() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    __asm__ volatile("msr fpcr, %0" : : "r"(before | (uint64_t(1) << 24)));
  }
  ~Flushed() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }

 private:
  uint64_t before;
#endif
};

}  // namespace meristem
