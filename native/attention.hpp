// Attention over a sliding window, forward and backward, one head of one row at a time, in blocks of queries.
//
//   S = Q K^T where query t sees the ``span`` keys that end with its own,   P = softmax S,   Y = P V
//   dV = P^T dY,   dS = P (dY V^T - rowsum(P dY V^T)),   dQ = dS K,   dK = dS^T Q
//
// Scores are made in tiles, those outside of the band left out; products with P and dS run over the band alone. Queries are
// scaled by 1 / sqrt(width), and queries and keys rotated by their position (Su et al. 2104.09864), while they are copied out of
// what was projected. P is kept for the backward pass.
#pragma once
#include "form.hpp"
#include "layers.hpp"

namespace meristem {

constexpr int QUERIES = 64;  // in a block

struct WindowSizes {
  int64_t time, past;  // queries, and keys before the first of them
  int heads, width;    // of a head: whole vectors
  int64_t span;
  int64_t read() const { return past + time; }
  int block() const { return int(std::min<int64_t>(QUERIES, time)); }
  int64_t blocks() const { return (time + block() - 1) / block(); }
  // Columns of the scores of a block, and of keys that lie transposed: with room for the last tile of a block that ends late, and
  // no multiple of a page.
  template <class T> int64_t columns() const { return up(block() + std::min(span, read()) - 1, 2 * LANES<T>); }
  template <class T> int64_t across() const { return up(read(), 2 * LANES<T>) + 3 * LANES<T>; }
};

template <class T, class S> class WindowHead {
 public:
  // cosine, sine: [read, width / 2], or null without rotation.
  WindowHead(const WindowSizes& sizes, const T* cosine, const T* sine, Arena& arena, bool is_backward)
      : s(sizes), k(sizes.width), cp(sizes.columns<T>()), ld(sizes.across<T>()), cosine(cosine), sine(sine) {
    Q = arena.take<T>(s.time * k);
    K = arena.take<T>(s.read() * k);
    V = arena.take<T>(s.read() * k);
    across = arena.take<T>(k * ld);
    score = arena.take<T>(s.block() * cp);
    if (!is_backward) {
      Y = arena.take<T>(s.block() * k);
      return;
    }
    dY = arena.take<T>(s.time * k);
    dQ = arena.take<T>(s.time * k);
    dK = arena.take<T>(s.read() * k);
    dV = arena.take<T>(s.read() * k);
  }

  // vectors: [time, 3, heads, width] of the row, from this head on. past: keys and values, [past, heads, width].
  void read(const S* vectors, const S* past_keys, const S* past_values) {
    const int64_t near = int64_t(s.heads) * k, step = 3 * near;
    const T scale = T(1) / std::sqrt(T(k));
    for (int64_t t = 0; t < s.read(); ++t) {
      const bool is_past = t < s.past;
      const S* const own = vectors + (t - s.past) * step;
      copy(is_past ? past_keys + t * near : own + near, K + t * k, T(1));
      copy(is_past ? past_values + t * near : own + 2 * near, V + t * k, T(1));
      turn(K + t * k, t, 1);
      if (is_past) continue;
      copy(own, Q + (t - s.past) * k, scale);
      turn(Q + (t - s.past) * k, t, 1);
    }
  }

  // mixed: [time, heads, width] from this head on. kept: [blocks, block, columns], or null.
  void forward(S* mixed, T* kept) {
    lay_across(K);
    for (int64_t n = 0; n < s.blocks(); ++n) {
      const Band band(s, n);
      T* const P = kept ? kept + n * s.block() * cp : score;
      products(band, Q + band.first_query * k, P);
      for (int i = 0; i < band.queries; ++i) soften(band, i, P + i * cp);
      tiles<T>(band.queries, k, [&]<int MR, int NR>(int i, int j) {
        Tile<T, MR, NR> x;
        x.zero();
        x.mac(band.from(i), band.end(i + MR - 1), P + i * cp, cp, 1, V + band.first_key * k + j, k);
        x.to(Y + i * k + j, k);
      });
      for (int i = 0; i < band.queries; ++i) {
        S* const to = mixed + (band.first_query + i) * s.heads * k;
        for (int j = 0; j < k; j += LANES<T>) give<T>(to + j, load(Y + i * k + j));
      }
    }
  }

  // sent: the gradient of ``mixed``. d_vectors, d_past_keys, d_past_values: as in ``read``; the last two may be null.
  void backward(const S* sent, const T* kept, S* d_vectors, S* d_past_keys, S* d_past_values) {
    lay_across(V);
    std::fill(dK, dK + s.read() * k, T(0));
    std::fill(dV, dV + s.read() * k, T(0));
    for (int64_t t = 0; t < s.time; ++t) copy(sent + t * s.heads * k, dY + t * k, T(1));
    for (int64_t n = 0; n < s.blocks(); ++n) {
      const Band band(s, n);
      const T *const P = kept + n * s.block() * cp, *const d = dY + band.first_query * k, *const q = Q + band.first_query * k;
      products(band, d, score);
      for (int i = 0; i < band.queries; ++i) through_softmax(band, i, P + i * cp, score + i * cp);
      tiles<T>(band.queries, k, [&]<int MR, int NR>(int i, int j) {
        Tile<T, MR, NR> x;
        x.zero();
        x.mac(band.from(i), band.end(i + MR - 1), score + i * cp, cp, 1, K + band.first_key * k + j, k);
        x.to(dQ + (band.first_query + i) * k + j, k);
      });
      tiles<T>(band.keys, k, [&]<int MR, int NR>(int i, int j) {
        const int first = band.first_seeing(i), end = band.end_seeing(i + MR - 1);
        Tile<T, MR, NR> x;
        x.from(dK + (band.first_key + i) * k + j, k);
        x.mac(first, end, score + i, 1, cp, q + j, k);
        x.to(dK + (band.first_key + i) * k + j, k);
        x.from(dV + (band.first_key + i) * k + j, k);
        x.mac(first, end, P + i, 1, cp, d + j, k);
        x.to(dV + (band.first_key + i) * k + j, k);
      });
    }
    write(d_vectors, d_past_keys, d_past_values);
  }

 private:
  const WindowSizes s;
  const int k;
  const int64_t cp, ld;
  const T *cosine, *sine;
  T *Q, *K, *V, *across, *score, *Y, *dY, *dQ, *dK, *dV;

  // The queries of a block and the keys that they see, both counted from the first.
  struct Band {
    int64_t first_query, first_key;
    int queries, keys, before, span;  // before: keys before that of the first query
    Band(const WindowSizes& s, int64_t n) {
      first_query = n * s.block();
      queries = int(std::min<int64_t>(s.block(), s.time - first_query));
      const int64_t own = s.past + first_query;
      span = int(std::min(s.span, s.read()));
      first_key = std::max<int64_t>(0, own - span + 1);
      before = int(own - first_key);
      keys = before + queries;
    }
    int from(int i) const { return std::max(0, before + i - span + 1); }
    int end(int i) const { return before + i + 1; }
    int first_seeing(int key) const { return std::max(0, key - before); }
    int end_seeing(int key) const { return std::min(queries, key - before + span); }
  };

  void copy(const S* from, T* to, T scale) const {
    for (int j = 0; j < k; j += LANES<T>) store(to + j, take<T>(from + j) * scale);
  }
  void turn(T* x, int64_t t, T way) const {
    if (!cosine) return;
    const int half = k / 2;
    const T *const c = cosine + t * half, *const n = sine + t * half;
    for (int j = 0; j < half; ++j) {
      const T left = x[j], right = x[half + j], turned = way * n[j];
      x[j] = left * c[j] - right * turned;
      x[half + j] = right * c[j] + left * turned;
    }
  }
  void lay_across(const T* x) { transpose(x, k, int(s.read()), k, across, ld); }

  // Rows times what lies across, where the tile meets the band.
  void products(const Band& band, const T* rows, T* to) const {
    const T* const b = across + band.first_key;
    tiles<T>(band.queries, int(up(band.keys, LANES<T>)), [&]<int MR, int NR>(int i, int j) {
      if (j >= band.end(i + MR - 1) || j + NR * LANES<T> <= band.from(i)) return;
      Tile<T, MR, NR> x;
      x.zero();
      x.mac(0, k, rows + i * k, k, 1, b + j, ld);
      x.to(to + i * cp + j, cp);
    });
  }
  // A row of scores becomes one of weights, and zeros outside of its band.
  void soften(const Band& band, int i, T* row) const {
    const int from = band.from(i), end = band.end(i), first = from / LANES<T> * LANES<T>, last = int(up(end, LANES<T>));
    const T nothing = -std::numeric_limits<T>::infinity();
    std::fill(row + first, row + from, nothing);
    std::fill(row + end, row + last, nothing);
    Vec<T> most = all(nothing);
    for (int j = first; j < last; j += LANES<T>) { const Vec<T> x = load(row + j); most = x > most ? x : most; }
    T top = most[0];
    for (int l = 1; l < LANES<T>; ++l) top = most[l] > top ? most[l] : top;
    Vec<T> sum{};
    for (int j = first; j < last; j += LANES<T>) {
      const Vec<T> p = quick_exponential<T>(load(row + j) - top);
      sum += p;
      store(row + j, p);
    }
    const T share = 1 / total<T>(sum);
    for (int j = first; j < last; j += LANES<T>) store(row + j, load(row + j) * share);
    std::fill(row, row + first, T(0));
    std::fill(row + last, row + cp, T(0));
  }
  // d: of the weights; becomes that of the scores.
  void through_softmax(const Band& band, int i, const T* P, T* d) const {
    const int first = band.from(i) / LANES<T> * LANES<T>, last = int(up(band.end(i), LANES<T>));
    Vec<T> along{};
    for (int j = first; j < last; j += LANES<T>) along += load(P + j) * load(d + j);
    const T sum = total<T>(along);
    for (int j = first; j < last; j += LANES<T>) store(d + j, load(P + j) * (load(d + j) - sum));
    std::fill(d, d + first, T(0));
    std::fill(d + last, d + cp, T(0));
  }
  void write(S* d_vectors, S* d_past_keys, S* d_past_values) {
    const int64_t near = int64_t(s.heads) * k, step = 3 * near;
    const T scale = T(1) / std::sqrt(T(k));
    const auto put = [&](const T* from, S* to, T by) {
      for (int j = 0; j < k; j += LANES<T>) give<T>(to + j, load(from + j) * by);
    };
    for (int64_t t = 0; t < s.read(); ++t) {
      const bool is_past = t < s.past;
      if (is_past && !d_past_keys) continue;
      S* const own = d_vectors + (t - s.past) * step;
      turn(dK + t * k, t, -1);
      put(dK + t * k, is_past ? d_past_keys + t * near : own + near, T(1));
      put(dV + t * k, is_past ? d_past_values + t * near : own + 2 * near, T(1));
      if (is_past) continue;
      turn(dQ + (t - s.past) * k, t, -1);
      put(dQ + (t - s.past) * k, own, scale);
    }
  }
};

}  // namespace meristem
