// One token of a whole language model for several readers at once, their memories in place.
//
// Weights are packed once. What a reader carries is one block of numbers (``Place``), which nothing else reads or writes.
// A row has the same bits alone and in any batch, in whichever place of its rings it stands: every sum runs over its
// terms in one order, that of time or of channels, whatever the number of rows.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "tile.hpp"

namespace meristem::decoding {

// As src/meristem/native/decoding.py has them: the whole model, and each of its layers.
struct ModelShape {
  int64_t width, vocabulary, n_layers;
  double eps;  // of every norm
};
// nn.attention, nn.mag, nn.mal, nn.memory; nn.self_reference is a part of its own (hope.hpp), as nn.cms_mlp is below.
enum Mixer : int64_t { ATTENTION, GATE, LAYER, MEMORY, SELF_REFERENCE };
enum Combination : int64_t { GATED, NORMALISED, PROJECTED, SIGMOID, ADDITIVE };  // nn.combine
enum Feedforward : int64_t { SWIGLU, GELU, LEVELS };
// What hope.hpp reads of a layer. A self-reference: how many memories make what is written, tokens of their chunks and of those
// of the memory that is read, its setting and loss, whether it makes its queries; levels: how they stand together.
struct HopeShape {
  int64_t n_makers, chunk_makers, chunk_memory, is_static, is_generated, is_squared, is_asking, has_unit_value;
  int64_t n_levels, is_mixed, is_pooled, is_slowest_first;
  double eta_scale;
};
struct LayerShape {
  int64_t mixer, combine, is_residual, mlp, hidden;
  int64_t attention_heads, span, is_rotated, n_pinned;
  int64_t memory_heads, taps, is_writing;
  // The rule (memory.rule): a pair is written as ``rate (v - slope M k)``, and so on as ``memory.forms.exact_chunk.one_token``.
  double slope, write_limit, curvature;  // curvature 0: the write rate has no limit (memory.region)
  int64_t is_warm, is_proximal, reads_before, has_momentum, is_coasting, is_scaled, has_retain, has_retain_gate;
  HopeShape hope;
};
// Each as it lies in the model, ``[out, in]``; what a layer does not have is null.
template <class T> struct LayerWeights {
  const T *mixer_norm, *attention, *attention_out, *pinned_keys, *pinned_values;  // pinned: [pinned, head, channel]
  // conv: [channel, tap]; gates: of write, retain, momentum; open: the map, if there is one, and bias of the output gate
  const T *memory, *conv, *gates, *gate_bias, *most_momentum;
  const T *memory_norm, *attention_norm, *open, *open_bias, *memory_out;
  const T *mlp_norm, *up, *up_bias, *down, *down_bias;
  // first_makers: [head, key, makers' values] of a static self-reference; of levels all weights stand behind each other
  const T *query, *first_makers, *periods, *shares;
};
template <class T> struct ModelWeights { const T *embedding, *norm, *head; };

// Where the parts of hope.hpp have their numbers: a count, the tail [token][channel], memories [head][key][value], and of each slow
// level the sum and the last output.
struct HopePlace {
  int64_t count = -1, tail = -1, makers_start = -1, makers_live = -1, memory_start = -1, memory_live = -1;
  int64_t tail_stride = 0, makers_stride = 0, memory_stride = 0, rows = -1, row_stride = 0;
};

// Where a layer's numbers begin in the block of a reader, -1 where it has none, and the steps between them.
struct Place {
  int64_t keys, values, matrix, momentum, tail;       // of keys [head][channel][slot], values [head][slot][channel],
  int64_t key_stride, value_stride, matrix_stride, tail_stride;  // matrices [head][key][value], tail [slot][channel]
  HopePlace mixer{}, mlp{};
};

// In a build without exceptions, as for WebAssembly, the host catches the trap.
[[noreturn]] inline void out_of_memory() {
#if defined(__cpp_exceptions)
  throw std::bad_alloc();
#else
  __builtin_trap();
#endif
}

// Numbers on a line of the cache, none at first.
template <class T> class Numbers {
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T[], Free> at_;

 public:
  void make(size_t n) {
    const size_t bytes = (n * sizeof(T) + 63) / 64 * 64 + 64;
    at_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!at_) out_of_memory();
    std::memset(static_cast<void*>(at_.get()), 0, bytes);
  }
  void copy(const T* from, size_t n) {
    make(n);
    std::memcpy(at_.get(), from, n * sizeof(T));
  }
  T* get() const { return at_.get(); }
  explicit operator bool() const { return bool(at_); }
};

// A matrix [out, in] as panels of two vectors of outputs, each panel input by input: what a product streams through.
template <class T> class Panels {
  static constexpr int WIDE = 2 * LANES<T>;
  Numbers<T> weight_;
  int in_ = 0, n_ = 0;

  // MANY rows times NEAR panels. One accumulator for each output, whatever MANY and NEAR are: one order of summation.
  template <int MANY, int NEAR, bool ADD> void block(const T* x, int64_t xs, T* y, int64_t ys, int p) const {
    constexpr int V = 2 * NEAR;
    Vec<T> sum[MANY][V];
    y += p * WIDE;
#pragma GCC unroll 8
    for (int m = 0; m < MANY; ++m)
#pragma GCC unroll 8
      for (int q = 0; q < V; ++q) sum[m][q] = ADD ? load(y + m * ys + q * LANES<T>) : Vec<T>{};
    const size_t step = size_t(in_) * WIDE;
    const T* w = weight_.get() + p * step;
    for (int i = 0; i < in_; ++i, w += WIDE) {
      Vec<T> v[V];
#pragma GCC unroll 8
      for (int q = 0; q < V; ++q) v[q] = load(w + (q / 2) * step + (q % 2) * LANES<T>);
#pragma GCC unroll 8
      for (int m = 0; m < MANY; ++m) {
        const Vec<T> s = all<T>(x[m * xs + i]);
#pragma GCC unroll 8
        for (int q = 0; q < V; ++q) sum[m][q] += s * v[q];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MANY; ++m)
#pragma GCC unroll 8
      for (int q = 0; q < V; ++q) store(y + m * ys + q * LANES<T>, sum[m][q]);
  }

  // Each number of x is the sum over all outputs, lane by lane, and over the lanes at the end.
  template <int MANY> void back_of(const T* y, int64_t ys, T* x, int64_t xs, T* room) const {
    std::memset(room, 0, size_t(in_) * MANY * VECTOR_BYTES);
    for (int p = 0; p < n_; ++p) {
      const T* w = weight_.get() + size_t(p) * in_ * WIDE;
      Vec<T> v[MANY][2];
#pragma GCC unroll 8
      for (int m = 0; m < MANY; ++m) { v[m][0] = load(y + m * ys + p * WIDE); v[m][1] = load(y + m * ys + p * WIDE + LANES<T>); }
      for (int i = 0; i < in_; ++i, w += WIDE) {
        const Vec<T> a = load(w), b = load(w + LANES<T>);
#pragma GCC unroll 8
        for (int m = 0; m < MANY; ++m) {
          T* to = room + (size_t(i) * MANY + m) * LANES<T>;
          store(to, load(to) + v[m][0] * a + v[m][1] * b);
        }
      }
    }
    for (int m = 0; m < MANY; ++m) for (int i = 0; i < in_; ++i) x[m * xs + i] = total<T>(load(room + (size_t(i) * MANY + m) * LANES<T>));
  }

 public:
  static int padded(int64_t out) { return int(up(out, WIDE)); }
  int out() const { return n_ * WIDE; }

  void make(int64_t out, int64_t in) {
    in_ = int(in);
    n_ = padded(out) / WIDE;
    weight_.make(size_t(n_) * in_ * WIDE);
  }
  // Rows of a matrix [rows, in] as the outputs from ``first`` on.
  void put(const T* from, int64_t rows, int first = 0) {
    for (int64_t o = 0; o < rows; ++o) {
      T* to = weight_.get() + size_t((first + o) / WIDE) * in_ * WIDE + (first + o) % WIDE;
      for (int i = 0; i < in_; ++i) to[size_t(i) * WIDE] = from[o * in_ + i];
    }
  }
  // Another matrix of the same sizes, plus delta(o * in + i) in its first rows.
  template <class F> void sum(const Panels& other, int64_t rows, F delta) {
    for (int64_t o = 0; o < rows; ++o) {
      const size_t first = size_t(o / WIDE) * in_ * WIDE + o % WIDE;
      for (int64_t i = 0; i < in_; ++i) weight_.get()[first + i * WIDE] = other.weight_.get()[first + i * WIDE] + delta(o * in_ + i);
    }
  }
  static constexpr int BACK = 4;  // rows of ``back`` at once
  // x [rows, in] = y [rows, out()] W. room: BACK * in vectors.
  void back(int rows, const T* y, int64_t ys, T* x, int64_t xs, T* room) const {
    int r = 0;
    for (; r + BACK <= rows; r += BACK) back_of<BACK>(y + r * ys, ys, x + r * xs, xs, room);
    for (; r < rows; ++r) back_of<1>(y + r * ys, ys, x + r * xs, xs, room);
  }
  // y [rows, out()] = x [rows, in] W^T, or that added to it.
  template <bool ADD = false> void times(int rows, const T* x, int64_t xs, T* y, int64_t ys) const {
    if (rows == 1) {  // what counts is how fast the weights arrive: many panels at once
      int p = 0;
      for (; p + 4 <= n_; p += 4) block<1, 4, ADD>(x, xs, y, ys, p);
      for (; p < n_; ++p) block<1, 1, ADD>(x, xs, y, ys, p);
      return;
    }
    for (int p = 0; p < n_; ++p) {
      int r = 0;
      for (; r + 6 <= rows; r += 6) block<6, 1, ADD>(x + r * xs, xs, y + r * ys, ys, p);
      const T* xr = x + r * xs;
      T* yr = y + r * ys;
      switch (rows - r) {
        case 5: block<5, 1, ADD>(xr, xs, yr, ys, p); break;
        case 4: block<4, 1, ADD>(xr, xs, yr, ys, p); break;
        case 3: block<3, 1, ADD>(xr, xs, yr, ys, p); break;
        case 2: block<2, 1, ADD>(xr, xs, yr, ys, p); break;
        case 1: block<1, 1, ADD>(xr, xs, yr, ys, p); break;
      }
    }
  }
};

// The sum of squares of d numbers.
template <class T> inline T square(const T* x, int d) {
  Vec<T> sum{};
  int j = 0;
  for (; j + LANES<T> <= d; j += LANES<T>) { const Vec<T> v = load(x + j); sum += v * v; }
  T found = total<T>(sum);
  for (; j < d; ++j) found += x[j] * x[j];
  return found;
}
// y = x / sqrt(mean(x^2) + eps) * gain, of d numbers.
template <class T> inline void rms(const T* x, const T* gain, T* y, int d, T eps) {
  const T scale = 1 / std::sqrt(square(x, d) / T(d) + eps);
  for (int j = 0; j < d; ++j) y[j] = x[j] * scale * gain[j];
}
// f over whole vectors that cover d numbers: what stands between d and the next vector is computed as well.
template <class T, class F> inline void each(int d, F f) { for (int j = 0; j < d; j += LANES<T>) f(j); }
// f(from, W) over whole vectors that cover d numbers, W of them at once.
template <class T, class F> inline void columns(int d, F f) {
  const int n = up(d, LANES<T>);
  int j = 0;
  if constexpr (VECTOR_BYTES == 64)
    for (; j + 8 * LANES<T> <= n; j += 8 * LANES<T>) f.template operator()<8>(j);
  for (; j + 4 * LANES<T> <= n; j += 4 * LANES<T>) f.template operator()<4>(j);
  for (; j + 2 * LANES<T> <= n; j += 2 * LANES<T>) f.template operator()<2>(j);
  for (; j < n; j += LANES<T>) f.template operator()<1>(j);
}

// What the gates of a head are inside the region where no memory runs away: ``within`` of memory/region.py.
template <class T> struct Gates { T retain, write, momentum; };

template <class T> inline T share(T x) { return 1 / (1 + exp(-x)); }  // the sigmoid of one number
template <class T> inline T log_sigmoid(T x) { return (x < 0 ? x : T(0)) - log1p(exp(x < 0 ? x : -x)); }
template <class T> inline T excess(T x) {
  constexpr T sharpness = 64, soft = 40;
  return x * sharpness > soft ? x : log1p(exp(x * sharpness)) / sharpness;
}
template <class T> inline Gates<T> bounded(const LayerShape& s, T raw_write, T raw_retain, T raw_momentum, T most) {
  constexpr T fade = T(1) / 65536, overshoot = T(0.9), tiny = T(1e-30);
  Gates<T> g{1, T(s.write_limit) * share(raw_write), 0};
  if (s.is_scaled) g.write -= g.write * share(raw_momentum);
  T log_retain = 0;
  if (s.has_retain) {
    const T least = fade * g.write;
    log_retain = -(s.has_retain_gate ? hypot(log_sigmoid(raw_retain), least) : least);
    g.retain = exp(log_retain);
  }
  if (s.has_momentum) {
    T log_most = log(most) + (s.is_coasting ? log_retain : T(0));
    log_most = log_most < T(-1e4) ? T(-1e4) : log_most;
    const T log_momentum = log_sigmoid(raw_momentum);
    g.momentum = exp(log_momentum - excess(log_momentum - log_most));
  }
  if (s.curvature > 0) {
    T limit = overshoot / T(s.curvature) * (1 + g.retain);
    if (s.has_momentum) {
      const T room = overshoot / T(s.curvature) * (1 - most);
      limit = room + room * g.retain - 2 * (room / most) * g.momentum;
    }
    const T of_limit = g.write / (limit < tiny ? tiny : limit);
    g.write /= exp(excess(log(of_limit < tiny ? tiny : of_limit)));
  }
  return g;
}

// y [columns] = x [rows] M, each column's sum in the order of the rows.
template <class T> inline void product(int n_rows, int n_columns, int stride, const T* x, const T* matrix, T* y) {
  columns<T>(n_columns, [&]<int W>(int j) {
    Vec<T> sum[W] = {};
    for (int i = 0; i < n_rows; ++i)
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) sum[w] += x[i] * load(matrix + i * stride + j + w * LANES<T>);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(y + j + w * LANES<T>, sum[w]);
  });
}
// Every head normed, times sigmoid(open + bias).
template <class T> inline void gated(int heads, int k, const T* gain, const T* bias, T eps, const T* open, T* y) {
  for (int a = 0; a < heads; ++a) rms(y + a * k, gain, y + a * k, k, eps);
  each<T>(heads * k, [&](int j) { store(y + j, load(y + j) * sigmoid<T>(load(open + j) + load(bias + j))); });
}
template <class T> inline T gelu(T y) { return y * T(0.5) * (1 + erf(y * T(0.70710678118654752440))); }

// A part of a layer that another header brings. ``at`` is where its numbers begin in each block; rows are ``stride`` apart.
template <class T> struct Part {
  virtual ~Part() = default;
  virtual int64_t size() const = 0;
  virtual int64_t room_size(int64_t rows) const = 0;
  virtual HopePlace place() const = 0;  // from ``at`` on
  // x, the residual stream, and what the part makes of it; n: x normed.
  virtual void add(int rows, const T* n, T* x, int64_t stride, T* const* blocks, int64_t at, T* room) const = 0;
};
template <class T> struct Parts {
  std::unique_ptr<Part<T>> mixer, mlp;
  int64_t mixer_at = 0, mlp_at = 0;
};
template <class T> using MakeParts = Parts<T> (*)(const ModelShape&, const LayerShape&, const LayerWeights<T>&);

template <class T> struct Layer {
  LayerShape s;
  Place place;
  Parts<T> brought;
  int key_width = 0, head_width = 0;                              // of attention, of the memory
  int at_attention = -1, at_memory = -1, at_gates = -1, at_open = -1;  // in what ``in`` gives
  Panels<T> in, late, open, attention_out, memory_out, up_, down;  // late: queries, keys and values of attention after the memory
  Numbers<T> mixer_norm, mlp_norm, memory_norm, attention_norm, gate_bias, most, conv, open_bias, up_bias, down_bias;
  Numbers<T> pinned_keys, pinned_values, cosine, sine;

  bool attends() const { return s.mixer != MEMORY && s.mixer != SELF_REFERENCE; }
  bool remembers() const { return s.mixer != ATTENTION && s.mixer != SELF_REFERENCE; }
  bool is_attention_late() const { return s.mixer == LAYER; }
  int n_gates() const { return 1 + int(s.has_retain_gate) + int(s.has_momentum); }
  int value_stride() const { return int(up(key_width, LANES<T>)); }

  __attribute__((cold)) Layer(const ModelShape& m, const LayerShape& shape, const LayerWeights<T>& w) : s(shape) {
    const int64_t d = m.width;
    mixer_norm.copy(w.mixer_norm, d);
    mlp_norm.copy(w.mlp_norm, d);
    if (attends()) attend(d, w);
    int n = 0;
    if (attends() && !is_attention_late()) { at_attention = n; n += Panels<T>::padded(3 * d); }
    if (remembers()) remember(d, w, n);
    in.make(n, d);
    if (at_attention >= 0) in.put(w.attention, 3 * d, at_attention);
    if (at_memory >= 0) in.put(w.memory, 3 * d, at_memory);
    if (at_gates >= 0) in.put(w.gates, n_gates() * s.memory_heads, at_gates);
    if (at_open >= 0) in.put(w.open, d, at_open);
    if (s.mlp == LEVELS) return;
    const int64_t f = s.hidden, g = s.mlp == SWIGLU ? 2 * f : f;
    up_.make(g, d);
    up_.put(w.up, g);
    down.make(d, f);
    down.put(w.down, d);
    if (w.up_bias) up_bias.copy(w.up_bias, g);
    if (w.down_bias) down_bias.copy(w.down_bias, d);
  }

 private:
  void attend(int64_t d, const LayerWeights<T>& w) {
    key_width = int(d / s.attention_heads);
    if (is_attention_late()) {
      late.make(3 * d, d);
      late.put(w.attention, 3 * d);
    }
    attention_out.make(d, d);
    attention_out.put(w.attention_out, d);
    if (s.n_pinned) {
      const int v = value_stride();
      pinned_keys.copy(w.pinned_keys, s.n_pinned * d);
      pinned_values.make(s.n_pinned * s.attention_heads * v);
      for (int64_t r = 0; r < s.n_pinned * s.attention_heads; ++r)
        std::memcpy(pinned_values.get() + r * v, w.pinned_values + r * key_width, key_width * sizeof(T));
    }
    if (!s.is_rotated) return;
    // By channel, for the slots of a ring in order of their number: what stands in slot i of a ring whose present is in
    // slot j was read (j - i) mod span tokens ago. From span - j on, the table is in the order of the slots.
    const int64_t half = key_width / 2, n = turns();
    cosine.make(half * n);
    sine.make(half * n);
    for (int64_t j = 0; j < half; ++j) {
      const double pace = pow(10000.0, -2.0 * double(j) / key_width);
      for (int64_t i = 0; i < 2 * s.span; ++i) {
        const double angle = pace * double((2 * s.span - i) % s.span);
        cosine.get()[j * n + i] = T(cos(angle));
        sine.get()[j * n + i] = T(sin(angle));
      }
    }
  }
  void remember(int64_t d, const LayerWeights<T>& w, int& n) {
    head_width = int(d / s.memory_heads);
    at_memory = n;
    n += Panels<T>::padded(3 * d);
    at_gates = n;
    n += Panels<T>::padded(n_gates() * s.memory_heads);
    gate_bias.copy(w.gate_bias, n_gates() * s.memory_heads);
    if (s.has_momentum) most.copy(w.most_momentum, s.memory_heads);
    const int c = up(3 * d, LANES<T>);
    conv.make(s.taps * c);
    for (int64_t j = 0; j < 3 * d; ++j) for (int64_t i = 0; i < s.taps; ++i) conv.get()[i * c + j] = w.conv[j * s.taps + i];
    const bool is_by_head = s.mixer != GATE || s.combine == ADDITIVE;
    if (w.memory_norm) memory_norm.copy(w.memory_norm, is_by_head ? head_width : d);
    if (w.attention_norm) attention_norm.copy(w.attention_norm, d);
    if (w.open_bias) open_bias.copy(w.open_bias, d);
    if (w.open && is_by_head) { at_open = n; n += Panels<T>::padded(d); }
    if (w.open && !is_by_head) { open.make(d, d); open.put(w.open, d); }
    if (w.memory_out) { memory_out.make(d, d); memory_out.put(w.memory_out, d); }
  }

 public:
  int64_t turns() const { return 2 * s.span + LANES<T>; }
};

// What the last projection of a feed-forward layer is given, from what the first gave, without its bias.
template <class T> inline void activate(const Layer<T>& l, const T* up, T* h) {
  const int f = int(l.s.hidden);
  if (l.s.mlp == SWIGLU) {
    each<T>(f, [&](int j) { const Vec<T> y = load(up + j); store(h + j, y * sigmoid<T>(y) * load(up + f + j)); });
    return;
  }
  for (int j = 0; j < f; ++j) h[j] = gelu(up[j] + l.up_bias.get()[j]);
}

template <class T> class Decoder {
  ModelShape m_;
  std::vector<std::unique_ptr<Layer<T>>> layers_;
  Numbers<T> embedding_, norm_;
  Panels<T> head_;
  int64_t block_ = 0;
  int width_ = 0, wide_ = 0, far_ = 0, most_seen_ = 0, channels_ = 0;  // of rows: of the model, of what ``in`` gives, of the MLP

  // What a step writes beside blocks and logits; ``at`` is where each begins, and last, where all end.
  struct Room { T *x, *n, *mixed, *recalled, *in, *up, *h, *score, *u, *brought; };
  void offsets(int64_t rows, int64_t (&at)[11]) const {
    int64_t brought = 0;
    for (const auto& l : layers_)
      for (const Part<T>* part : {l->brought.mixer.get(), l->brought.mlp.get()})
        if (part) brought = std::max(brought, part->room_size(rows));
    const int64_t d = rows * width_, sizes[] = {d, d, d, d, rows * wide_, rows * far_, rows * far_, most_seen_, channels_, brought};
    at[0] = 0;
    for (int i = 0; i < 10; ++i) at[i + 1] = at[i] + up(sizes[i] + 2 * LANES<T>, LANES<T>);
  }
  Room cut(T* room, int64_t rows) const {
    int64_t at[11];
    offsets(rows, at);
    return {room, room + at[1], room + at[2], room + at[3], room + at[4], room + at[5], room + at[6], room + at[7], room + at[8], room + at[9]};
  }

 public:
  // parts: what makes the parts of layers that decode.hpp lacks.
  __attribute__((cold)) Decoder(const ModelShape& m, const LayerShape* shapes, const ModelWeights<T>& w, const LayerWeights<T>* layers,
                                MakeParts<T> parts = nullptr)
      : m_(m) {
    const int64_t d = m.width;
    width_ = Panels<T>::padded(d);
    wide_ = Panels<T>::padded(3 * d);
    embedding_.copy(w.embedding, m.vocabulary * d);
    norm_.copy(w.norm, d);
    head_.make(m.vocabulary, d);
    head_.put(w.head, m.vocabulary);
    auto take = [&](int64_t n) { const int64_t here = block_; block_ += up(n, LANES<T>); return here; };
    for (int64_t i = 0; i < m.n_layers; ++i) {
      layers_.push_back(std::make_unique<Layer<T>>(m, shapes[i], layers[i]));
      Layer<T>& l = *layers_.back();
      Place& p = l.place = {-1, -1, -1, -1, -1, 0, 0, 0, 0, {}, {}};
      if (l.attends()) {
        p.key_stride = up(l.s.span, LANES<T>);
        p.value_stride = l.value_stride();
        p.keys = take(d * p.key_stride);
        p.values = take(l.s.attention_heads * l.s.span * p.value_stride);
        most_seen_ = std::max(most_seen_, int(l.s.n_pinned + p.key_stride + l.key_width) + 2 * LANES<T>);
      }
      if (l.remembers()) {
        p.matrix_stride = up(l.head_width, LANES<T>);
        p.tail_stride = up(3 * d, LANES<T>);
        p.matrix = take(d * p.matrix_stride);
        if (l.s.has_momentum) p.momentum = take(d * p.matrix_stride);
        p.tail = take((l.s.taps - 1) * p.tail_stride);
        channels_ = std::max(channels_, int(p.tail_stride + 4 * p.matrix_stride));
      }
      if (parts) {
        l.brought = parts(m, shapes[i], layers[i]);
        auto put = [&](const Part<T>* part, int64_t& at, HopePlace& own) {
          if (!part) return;
          at = take(part->size());
          own = part->place();
          for (int64_t* each : {&own.count, &own.tail, &own.makers_start, &own.makers_live, &own.memory_start, &own.memory_live, &own.rows})
            if (*each >= 0) *each += at;
        };
        put(l.brought.mixer.get(), l.brought.mixer_at, p.mixer);
        put(l.brought.mlp.get(), l.brought.mlp_at, p.mlp);
      }
      wide_ = std::max(wide_, l.in.out());
      far_ = std::max(far_, l.up_.out());
    }
  }
  int64_t block_size() const { return block_; }
  int64_t logits_stride() const { return head_.out(); }
  int64_t room_size(int64_t rows) const {
    int64_t at[11];
    offsets(rows, at);
    return at[10];
  }
  const Place& place(int64_t layer) const { return layers_[layer]->place; }
  const Layer<T>& last() const { return *layers_.back(); }
  const Panels<T>& head() const { return head_; }
  const Numbers<T>& norm() const { return norm_; }
  double eps() const { return m_.eps; }
  int64_t width() const { return m_.width; }

  // One token for each row. blocks: of the readers; n_read: how many tokens each has read since its rings were filled from
  // slot 0 on, and in the end one more. logits: [rows, logits_stride()]. False, and nothing was done, where a token is none
  // of the vocabulary.
  bool step(int rows, const int64_t* tokens, T* const* blocks, int64_t* n_read, T* logits, T* room) const {
    if (!are_known(rows, tokens)) return false;
    [[maybe_unused]] const Flushed flushed;
    head_.times(rows, hidden(rows, tokens, blocks, n_read, room, HEAD_IS_LEFT), width_, logits, logits_stride());
    return true;
  }
  bool are_known(int rows, const int64_t* tokens) const {
    for (int r = 0; r < rows; ++r) if (tokens[r] < 0 || tokens[r] >= m_.vocabulary) return false;
    return true;
  }

  // The same without the last part: what the head is given, or the last feed-forward layer before its norm. The vectors
  // stand in the room, as far apart as the outputs of a matrix of that width. Tokens are of the vocabulary.
  enum Left { HEAD_IS_LEFT, MLP_IS_LEFT };
  const T* hidden(int rows, const int64_t* tokens, T* const* blocks, int64_t* n_read, T* room, Left left) const {
    const Room c = cut(room, rows);
    const int d = int(m_.width);
    for (int r = 0; r < rows; ++r) {
      std::memcpy(c.x + r * width_, embedding_.get() + tokens[r] * d, d * sizeof(T));
      std::memset(c.x + r * width_ + d, 0, (width_ - d) * sizeof(T));
    }
    for (const auto& each_layer : layers_) {
      const Layer<T>& l = *each_layer;
      normed(rows, c.x, l.mixer_norm, c.n);
      l.in.times(rows, c.n, width_, c.in, wide_);
      mix(l, rows, blocks, n_read, c);
      if (left == MLP_IS_LEFT && &l == &last()) break;
      normed(rows, c.x, l.mlp_norm, c.n);
      if (const auto& part = l.brought.mlp) part->add(rows, c.n, c.x, width_, blocks, l.brought.mlp_at, c.brought);
      else feed(l, rows, c);
    }
    for (int r = 0; r < rows; ++r) ++n_read[r];
    if (left == MLP_IS_LEFT) return c.x;
    normed(rows, c.x, norm_, c.n);
    return c.n;
  }
  // The same into ``to`` [rows, width], where all tokens are of the vocabulary; else false, and nothing was done.
  bool read(int rows, const int64_t* tokens, T* const* blocks, int64_t* n_read, T* to, T* room, Left left) const {
    if (!are_known(rows, tokens)) return false;
    [[maybe_unused]] const Flushed flushed;
    const T* from = hidden(rows, tokens, blocks, n_read, room, left);
    for (int r = 0; r < rows; ++r) std::memcpy(to + r * m_.width, from + r * width_, size_t(m_.width) * sizeof(T));
    return true;
  }

 private:
  void normed(int rows, const T* x, const Numbers<T>& gain, T* y) const {
    for (int r = 0; r < rows; ++r) rms(x + r * width_, gain.get(), y + r * width_, int(m_.width), T(m_.eps));
  }

  void mix(const Layer<T>& l, int rows, T* const* blocks, const int64_t* n_read, const Room& c) const {
    const int d = int(m_.width);
    if (const auto& part = l.brought.mixer) return part->add(rows, c.n, c.x, width_, blocks, l.brought.mixer_at, c.brought);
    if (l.remembers())
      for (int r = 0; r < rows; ++r) remember(l, c.in + r * wide_, blocks[r], n_read[r], c, c.recalled + r * width_);
    if (l.s.mixer == MEMORY || l.s.mixer == LAYER) {
      for (int r = 0; r < rows; ++r) {
        const T* open = c.in + r * wide_ + l.at_open;
        gated(int(l.s.memory_heads), l.head_width, l.memory_norm.get(), l.open_bias.get(), T(m_.eps), open, c.recalled + r * width_);
      }
      if (l.s.mixer == MEMORY) { l.memory_out.template times<true>(rows, c.recalled, width_, c.x, width_); return; }
      if (l.s.is_residual) l.memory_out.template times<true>(rows, c.recalled, width_, c.n, width_);
      else l.memory_out.times(rows, c.recalled, width_, c.n, width_);
      l.late.times(rows, c.n, width_, c.in, wide_);
    }
    const int at = l.is_attention_late() ? 0 : l.at_attention;
    for (int r = 0; r < rows; ++r) attend(l, c.in + r * wide_ + at, blocks[r], n_read[r], c, c.mixed + r * width_);
    if (l.s.mixer == GATE) {
      if (l.s.combine == PROJECTED) {
        for (int r = 0; r < rows; ++r) { T* y = c.recalled + r * width_; rms(y, l.memory_norm.get(), y, d, T(m_.eps)); }
        l.open.times(rows, c.recalled, width_, c.n, width_);
      }
      for (int r = 0; r < rows; ++r)
        combine(l, c.in + r * wide_ + l.at_open, c.n + r * width_, c.recalled + r * width_, c.mixed + r * width_);
    }
    l.attention_out.template times<true>(rows, c.mixed, width_, c.x, width_);
  }

  // nn.combine: y of attention and m of the memory become one, in the place of y.
  void combine(const Layer<T>& l, const T* open, const T* projected, T* m, T* y) const {
    const int d = int(m_.width), k = l.head_width;
    const T *bias = l.open_bias.get(), eps = T(m_.eps);
    switch (l.s.combine) {
      case SIGMOID:
        each<T>(d, [&](int j) { store(y + j, load(y + j) * sigmoid<T>(load(m + j))); });
        return;
      case ADDITIVE:
        for (int a = 0; a < l.s.memory_heads; ++a) rms(m + a * k, l.memory_norm.get(), m + a * k, k, eps);
        each<T>(d, [&](int j) { store(y + j, load(y + j) + load(m + j) * sigmoid<T>(load(open + j) + load(bias + j))); });
        return;
      case NORMALISED:
      case PROJECTED:
        rms(y, l.attention_norm.get(), y, d, eps);
    }
    if (l.s.combine != PROJECTED) rms(m, l.memory_norm.get(), m, d, eps);
    const T* gate = l.s.combine == PROJECTED ? projected : m;
    each<T>(d, [&](int j) { store(y + j, load(y + j) * sigmoid<T>(load(gate + j) + load(bias + j))); });
  }

  void feed(const Layer<T>& l, int rows, const Room& c) const {
    const int d = int(m_.width);
    l.up_.times(rows, c.n, width_, c.up, far_);
    for (int r = 0; r < rows; ++r) activate(l, c.up + r * far_, c.h + r * far_);
    l.down.template times<true>(rows, c.h, far_, c.x, width_);
    if (l.down_bias)
      for (int r = 0; r < rows; ++r) for (int j = 0; j < d; ++j) c.x[r * width_ + j] += l.down_bias.get()[j];
  }

  // Sliding-window attention of one token (nn.attention). A ring holds keys as they were made: the angle between a query
  // and a key depends on how long ago that was read alone, so that a reader's future does not depend on where its ring began.
  void attend(const Layer<T>& l, const T* in, T* block, int64_t n_read, const Room& c, T* y) const {
    const int d = int(m_.width), k = l.key_width, span = int(l.s.span), pinned = int(l.s.n_pinned);
    const int stride = int(l.place.key_stride), vs = int(l.place.value_stride);
    const int slot = int(n_read % span), seen = int(std::min<int64_t>(n_read + 1, span));
    const int covered = up(seen, LANES<T>);
    T *score = c.score, *first = score + covered, *query = first + up(pinned, LANES<T>);
    const T scale = 1 / std::sqrt(T(k));
    for (int a = 0; a < l.s.attention_heads; ++a) {
      T* keys = block + l.place.keys + int64_t(a) * k * stride;
      T* values = block + l.place.values + int64_t(a) * span * vs;
      for (int j = 0; j < k; ++j) {
        query[j] = in[a * k + j] * scale;
        keys[j * stride + slot] = in[d + a * k + j];
      }
      std::memcpy(values + slot * vs, in + 2 * d + a * k, k * sizeof(T));
      scores(l, query, keys, slot, covered, score);
      for (int t = seen; t < covered; ++t) score[t] = -std::numeric_limits<T>::infinity();
      for (int g = 0; g < pinned; ++g) {
        const T* key = l.pinned_keys.get() + int64_t(g) * d + a * k;
        T sum = 0;
        for (int j = 0; j < k; ++j) sum += query[j] * key[j];
        first[g] = sum;
      }
      softmax(score, covered, first, pinned);
      // The oldest first; the slots of a full ring begin behind the present one.
      const int begin = seen == span ? (slot + 1) % span : 0;
      T sum = 0;
      for (int g = 0; g < pinned; ++g) sum += first[g];
      for (int t = begin; t < seen; ++t) sum += score[t];
      for (int t = 0; t < begin; ++t) sum += score[t];
      const T by = 1 / sum;
      const T* still = pinned ? l.pinned_values.get() + int64_t(a) * vs : nullptr;
      columns<T>(k, [&]<int W>(int j) {
        Vec<T> e[W] = {};
        auto add = [&](T s, const T* value) {
#pragma GCC unroll 8
          for (int i = 0; i < W; ++i) e[i] += s * load(value + j + i * LANES<T>);
        };
        for (int g = 0; g < pinned; ++g) add(first[g], still + int64_t(g) * l.s.attention_heads * vs);
        for (int t = begin; t < seen; ++t) add(score[t], values + t * vs);
        for (int t = 0; t < begin; ++t) add(score[t], values + t * vs);
        T out[W * LANES<T>];
#pragma GCC unroll 8
        for (int i = 0; i < W; ++i) store(out + i * LANES<T>, e[i] * by);
        std::memcpy(y + a * k + j, out, std::min(W * LANES<T>, k - j) * sizeof(T));
      });
    }
  }

  // The products of a query with all keys of a ring, slot by slot.
  void scores(const Layer<T>& l, const T* query, const T* keys, int slot, int n, T* score) const {
    const int k = l.key_width, half = k / 2, stride = int(l.place.key_stride);
    const int64_t turns = l.turns();
    const T *cosine = l.cosine.get() + (l.s.span - slot), *sine = l.sine.get() + (l.s.span - slot);
    columns<T>(n, [&]<int W>(int t) {
      Vec<T> e[W] = {};
      if (l.s.is_rotated) {
        for (int j = 0; j < half; ++j) {
          const T left = query[j], right = query[j + half];
#pragma GCC unroll 8
          for (int i = 0; i < W; ++i) {
            const int at = t + i * LANES<T>;
            const Vec<T> kl = load(keys + j * stride + at), kr = load(keys + (j + half) * stride + at);
            e[i] += (left * kl + right * kr) * load(cosine + j * turns + at);
            e[i] -= (right * kl - left * kr) * load(sine + j * turns + at);
          }
        }
      } else {
        for (int j = 0; j < k; ++j)
#pragma GCC unroll 8
          for (int i = 0; i < W; ++i) e[i] += query[j] * load(keys + j * stride + t + i * LANES<T>);
      }
#pragma GCC unroll 8
      for (int i = 0; i < W; ++i) store(score + t + i * LANES<T>, e[i]);
    });
  }

  // The exponentials of scores less the greatest of them; n a multiple of the lanes.
  static void softmax(T* score, int n, T* first, int pinned) {
    Vec<T> most = load(score);
    for (int t = LANES<T>; t < n; t += LANES<T>) { const Vec<T> e = load(score + t); most = e > most ? e : most; }
    T top = most[0];
    for (int i = 1; i < LANES<T>; ++i) top = most[i] > top ? most[i] : top;
    for (int g = 0; g < pinned; ++g) top = first[g] > top ? first[g] : top;
    for (int t = 0; t < n; t += LANES<T>) store(score + t, exponential<T>(load(score + t) - top));
    for (int g = 0; g < pinned; g += LANES<T>) store(first + g, exponential<T>(load(first + g) - top));
  }

  // A memory of one matrix for each head (nn.decode): short convolution, gates, write and read.
  void remember(const Layer<T>& l, const T* in, T* block, int64_t n_read, const Room& c, T* y) const {
    const LayerShape& s = l.s;
    const int d = int(m_.width), k = l.head_width, past = int(s.taps) - 1;
    const int cs = int(l.place.tail_stride), ms = int(l.place.matrix_stride);
    T *u = c.u, *tail = block + l.place.tail;
    const T *now = in + l.at_memory, *conv = l.conv.get();
    each<T>(3 * d, [&](int j) { store(u + j, load(now + j) * load(conv + past * cs + j)); });
    for (int i = 0; i < past; ++i) {
      const T *then = tail + (n_read + i) % past * cs, *tap = conv + i * cs;
      each<T>(3 * d, [&](int j) { store(u + j, load(u + j) + load(then + j) * load(tap + j)); });
    }
    each<T>(3 * d, [&](int j) { const Vec<T> sum = load(u + j); store(u + j, sum * sigmoid<T>(sum)); });
    if (past) std::memcpy(tail + n_read % past * cs, now, 3 * d * sizeof(T));
    T *query = u + cs, *key = query + ms, *value = key + ms, *read = value + ms;
    std::memset(value, 0, ms * sizeof(T));
    const T tiny = T(1e-12);
    for (int a = 0; a < s.memory_heads; ++a) {
      const T query_scale = 1 / std::sqrt(square(u + a * k, k) + tiny);
      const T key_scale = 1 / std::sqrt(square(u + d + a * k, k) + tiny);
      for (int j = 0; j < k; ++j) {
        query[j] = u[a * k + j] * query_scale;
        key[j] = u[d + a * k + j] * key_scale;
        value[j] = u[2 * d + a * k + j];
      }
      T* matrix = block + l.place.matrix + int64_t(a) * k * ms;
      T* momentum = s.has_momentum ? block + l.place.momentum + int64_t(a) * k * ms : nullptr;
      if (!s.is_writing) product(k, k, ms, query, matrix, read);
      else write(l, in + l.at_gates, a, {query, key, value}, matrix, momentum, read);
      std::memcpy(y + a * k, read, k * sizeof(T));
    }
  }
  struct Vectors { const T *query, *key, *value; };

  // S <- momentum S + rate k (v - slope M k), M <- retain M + S, and what the query reads of M.
  void write(const Layer<T>& l, const T* raw, int a, const Vectors& v, T* matrix, T* momentum, T* read) const {
    const LayerShape& s = l.s;
    const int k = l.head_width, ms = int(l.place.matrix_stride), heads = int(s.memory_heads);
    const T* bias = l.gate_bias.get();
    int at = a;
    const T raw_write = raw[at] + bias[at];
    T raw_retain = 0, raw_momentum = 0;
    if (s.has_retain_gate) { at += heads; raw_retain = raw[at] + bias[at]; }
    if (s.has_momentum) { at += heads; raw_momentum = raw[at] + bias[at]; }
    const Gates<T> g = bounded<T>(s, raw_write, raw_retain, raw_momentum, s.has_momentum ? l.most.get()[a] : T(0));
    const T rate = s.is_proximal ? g.write / (1 + g.write * square(v.key, k)) : g.write;
    const T probe = T(s.slope) * (s.is_warm ? g.retain : T(1));
    if (s.reads_before) product(k, k, ms, v.query, matrix, read);
    columns<T>(k, [&]<int W>(int j) {
      Vec<T> e[W] = {}, r[W] = {};
      if (s.slope != 0)
        for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
          for (int x = 0; x < W; ++x) e[x] += v.key[i] * load(matrix + i * ms + j + x * LANES<T>);
#pragma GCC unroll 8
      for (int x = 0; x < W; ++x) e[x] = rate * (load(v.value + j + x * LANES<T>) - probe * e[x]);
      for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
        for (int x = 0; x < W; ++x) {
          const int64_t here = i * ms + j + x * LANES<T>;
          Vec<T> moved = v.key[i] * e[x];
          if (s.has_momentum) {
            moved += g.momentum * load(momentum + here);
            store(momentum + here, moved);
          }
          const Vec<T> held = g.retain * load(matrix + here) + moved;
          store(matrix + here, held);
          r[x] += v.query[i] * held;
        }
      if (!s.reads_before)
#pragma GCC unroll 8
        for (int x = 0; x < W; ++x) store(read + j + x * LANES<T>, r[x]);
    });
  }
};

}  // namespace meristem::decoding
