// What HOPE brings to a layer of decode.hpp in one token: memories that make the keys, values and gates by which they are
// written (nn.self_reference), and feed-forward levels of several speeds (nn.cms_mlp).
//
// Each counts its tokens in the block of the reader, so that rows that have read differently stand side by side.
#pragma once
#include "decode.hpp"

namespace meristem::decoding {

// An integer that stands among the numbers of a block, bit for bit.
template <class T> inline int64_t count_at(const T* at) {
  int64_t count;
  std::memcpy(&count, at, sizeof count);
  return count;
}
template <class T> inline void put_count(T* at, int64_t count) { std::memcpy(at, &count, sizeof count); }
template <class T> constexpr int64_t COUNT = LANES<T>;  // numbers that it takes

template <class T> class SelfReference final : public Part<T> {
  const HopeShape s;
  const int width, heads, k, n_columns, past;      // n_columns: of the makers side by side; past: tokens in the tail
  const int makers_stride, memory_stride, tail_stride;
  const bool is_writing;
  const T eps, eta_scale;
  Panels<T> open, query, out;
  Numbers<T> conv, gate_bias, norm, open_bias, first_makers;
  HopePlace own{};
  int64_t size_ = 0;

  // Of one head and token. probe: what the memories that began the chunk make their goals of; null where goals are given alone.
  struct Vectors { T *made, *given, *key, *value, *query, *probe, *read; };
  struct Room { T *open, *mixed, *query, *read; Vectors v; };
  Room cut(T* room, int64_t rows) const {
    const int64_t wide = rows * open.out() + 2 * LANES<T>;
    Room c{room, room + wide, room + 2 * wide, room + 3 * wide, {}};
    T* at = room + 4 * wide;
    for (T** each : {&c.v.made, &c.v.given}) { *each = at; at += makers_stride + LANES<T>; }
    for (T** each : {&c.v.key, &c.v.value, &c.v.query, &c.v.probe, &c.v.read}) { *each = at; at += memory_stride; }
    return c;
  }

 public:
  SelfReference(const ModelShape& m, const LayerShape& shape, const LayerWeights<T>& w)
      : s(shape.hope), width(int(m.width)), heads(int(shape.memory_heads)), k(width / heads), n_columns(int(s.n_makers) * k),
        past(int(shape.taps) - 1), makers_stride(int(up(n_columns, LANES<T>))), memory_stride(int(up(k, LANES<T>))),
        tail_stride(int(up(width, LANES<T>))), is_writing(shape.is_writing), eps(T(m.eps)), eta_scale(T(s.eta_scale)) {
    const int64_t d = width;
    for (auto [panels, weight] : {std::pair{&open, w.open}, {&query, w.query}, {&out, w.memory_out}})
      if (weight) { panels->make(d, d); panels->put(weight, d); }
    conv.make(shape.taps * tail_stride);
    for (int64_t j = 0; j < d; ++j) for (int64_t i = 0; i <= past; ++i) conv.get()[i * tail_stride + j] = w.conv[j * (past + 1) + i];
    gate_bias.copy(w.gate_bias, 2 * heads);
    norm.copy(w.memory_norm, k);
    open_bias.copy(w.open_bias, d);
    auto take = [&](int64_t n) { const int64_t here = size_; size_ += up(n, LANES<T>); return here; };
    own = {take(COUNT<T>), take(past * tail_stride), -1, -1, take(d * memory_stride), take(d * memory_stride), tail_stride, 0, memory_stride};
    if (s.is_static) {
      first_makers.make(d * makers_stride);
      for (int64_t i = 0; i < d; ++i) std::memcpy(first_makers.get() + i * makers_stride, w.first_makers + i * n_columns, n_columns * sizeof(T));
      return;
    }
    own.makers_start = take(d * makers_stride);
    own.makers_live = take(d * makers_stride);
    own.makers_stride = makers_stride;
  }
  int64_t size() const override { return size_; }
  int64_t room_size(int64_t rows) const override {
    return 4 * (rows * open.out() + 2 * LANES<T>) + 2 * (makers_stride + LANES<T>) + 5 * memory_stride;
  }
  HopePlace place() const override { return own; }

  void add(int rows, const T* n, T* x, int64_t stride, T* const* blocks, int64_t at, T* room) const override {
    const Room c = cut(room, rows);
    open.times(rows, n, stride, c.open, stride);
    for (int r = 0; r < rows; ++r) mix(n + r * stride, blocks[r] + at + own.tail, c.mixed + r * stride);
    if (!s.is_asking) query.times(rows, c.mixed, stride, c.query, stride);
    for (int r = 0; r < rows; ++r) {
      T *block = blocks[r] + at, *y = c.read + r * stride;
      for (int a = 0; a < heads; ++a) token(a, c.mixed + r * stride, c.query + r * stride, block, c.v, y);
      if (is_writing) pass(block);
      gated(heads, k, norm.get(), open_bias.get(), eps, c.open + r * stride, y);
    }
    out.template times<true>(rows, c.read, stride, x, stride);
  }

 private:
  // The short convolution, and the tail that it leaves, the oldest first.
  void mix(const T* now, T* tail, T* y) const {
    const T* taps = conv.get();
    each<T>(width, [&](int j) { store(y + j, load(now + j) * load(taps + past * tail_stride + j)); });
    for (int i = 0; i < past; ++i)
      each<T>(width, [&](int j) { store(y + j, load(y + j) + load(tail + i * tail_stride + j) * load(taps + i * tail_stride + j)); });
    if (!past) return;
    std::memmove(tail, tail + tail_stride, size_t(past - 1) * tail_stride * sizeof(T));
    std::memcpy(tail + (past - 1) * tail_stride, now, width * sizeof(T));
  }

  // One head of nn.self_scan: everything is made by the memories that began its chunk, and read before it is written.
  void token(int a, const T* mixed, const T* queries, T* block, const Vectors& v, T* y) const {
    const int64_t here = int64_t(a) * k;
    const T* makers = s.is_static ? first_makers.get() : block + own.makers_start;
    product(k, n_columns, makers_stride, mixed + here, makers + here * makers_stride, v.made);
    std::memset(v.value, 0, memory_stride * sizeof(T));
    unit(v.made, v.key);
    if (s.has_unit_value) unit(v.made + k, v.value);
    else std::memcpy(v.value, v.made + k, k * sizeof(T));
    unit(s.is_asking ? v.made + 2 * k : queries + here, v.query);
    T* memory = block + own.memory_live + here * memory_stride;
    if (!is_writing) {
      product(k, k, memory_stride, v.query, memory, v.read);
    } else {
      const T z = mean(v.made + n_columns - 2 * k) + gate_bias.get()[2 * a];
      const T rate = eta_scale * (z > 20 ? z : log1p(exp(z)));  // as torch has the softplus
      const T log_retain = log_sigmoid(mean(v.made + n_columns - k) + gate_bias.get()[2 * a + 1]);
      const T retain = exp(log_retain < T(-30) ? T(-30) : log_retain);
      const T* probe = probed(v);
      write<true>(k, memory_stride, v, v.value, probe, rate, retain, block + own.memory_start + here * memory_stride, memory);
      if (!s.is_static) {
        std::memset(v.given, 0, makers_stride * sizeof(T));
        for (int i = 0; i < s.n_makers; ++i) std::memcpy(v.given + i * k, v.value, k * sizeof(T));
        write<false>(n_columns, makers_stride, v, v.given, probe, rate, retain, makers + here * makers_stride,
                     block + own.makers_live + here * makers_stride);
      }
    }
    std::memcpy(y + here, v.read, k * sizeof(T));
  }
  const T* probed(const Vectors& v) const {
    if (!s.is_generated && !s.is_squared) return nullptr;
    for (int j = 0; j < k; ++j) v.probe[j] = (s.is_generated ? v.value[j] : T(0)) - (s.is_squared ? v.key[j] : T(0));
    return v.probe;
  }
  void unit(const T* from, T* to) const {
    const T scale = 1 / std::sqrt(square(from, k) + T(1e-12));
    for (int j = 0; j < k; ++j) to[j] = from[j] * scale;
  }
  T mean(const T* x) const {
    Vec<T> sum{};
    int j = 0;
    for (; j + LANES<T> <= k; j += LANES<T>) sum += load(x + j);
    T found = total<T>(sum);
    for (; j < k; ++j) found += x[j];
    return found / T(k);
  }

  // M <- retain M + rate k (goal - M k) of memories side by side, and what the query reads of M before.
  template <bool READS>
  void write(int n, int stride, const Vectors& v, const T* given, const T* probe, T rate, T retain, const T* start, T* live) const {
    columns<T>(n, [&]<int W>(int j) {
      Vec<T> goal[W] = {}, recalled[W] = {}, read[W] = {};
      if (!s.is_generated)
#pragma GCC unroll 8
        for (int x = 0; x < W; ++x) goal[x] = load(given + j + x * LANES<T>);
      if (probe)
        for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
          for (int x = 0; x < W; ++x) goal[x] += probe[i] * load(start + i * stride + j + x * LANES<T>);
      for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
        for (int x = 0; x < W; ++x) {
          const Vec<T> held = load(live + i * stride + j + x * LANES<T>);
          recalled[x] += v.key[i] * held;
          if constexpr (READS) read[x] += v.query[i] * held;
        }
#pragma GCC unroll 8
      for (int x = 0; x < W; ++x) {
        goal[x] = rate * (goal[x] - recalled[x]);
        if constexpr (READS) store(v.read + j + x * LANES<T>, read[x]);
      }
      for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
        for (int x = 0; x < W; ++x) {
          T* to = live + i * stride + j + x * LANES<T>;
          store(to, retain * load(to) + v.key[i] * goal[x]);
        }
    });
  }

  // A token more; memories whose chunk ends begin the next with what they are now.
  void pass(T* block) const {
    const int64_t count = count_at(block + own.count) + 1;
    put_count(block + own.count, count);
    if (count % s.chunk_memory == 0) std::memcpy(block + own.memory_start, block + own.memory_live, size_t(width) * memory_stride * sizeof(T));
    if (!s.is_static && count % s.chunk_makers == 0)
      std::memcpy(block + own.makers_start, block + own.makers_live, size_t(width) * makers_stride * sizeof(T));
  }
};

template <class T> class Levels final : public Part<T> {
  struct Level {
    Panels<T> up, down;
    Numbers<T> norm, up_bias, down_bias;
    int64_t period;
    T share;
  };
  const HopeShape s;
  const int width, hidden, row_stride;
  const T eps;
  std::vector<std::unique_ptr<Level>> levels;  // the fastest first
  HopePlace own{};
  int64_t size_ = 0;

  struct Room { T *n, *out, *from, *up, *h; };
  Room cut(T* room, int64_t rows) const {
    const int64_t wide = rows * Panels<T>::padded(width) + 2 * LANES<T>, far = rows * Panels<T>::padded(hidden) + 2 * LANES<T>;
    return {room, room + wide, room + 2 * wide, room + 3 * wide, room + 3 * wide + far};
  }

 public:
  Levels(const ModelShape& m, const LayerShape& shape, const LayerWeights<T>& w)
      : s(shape.hope), width(int(m.width)), hidden(int(shape.hidden)), row_stride(int(meristem::up(width, LANES<T>))), eps(T(m.eps)) {
    const int64_t d = width, f = hidden;
    for (int64_t i = 0; i < s.n_levels; ++i) {
      levels.push_back(std::make_unique<Level>());
      Level& l = *levels.back();
      l.norm.copy(w.mlp_norm + i * d, d);
      l.up.make(f, d);
      l.up.put(w.up + i * f * d, f);
      l.down.make(d, f);
      l.down.put(w.down + i * d * f, d);
      l.up_bias.copy(w.up_bias + i * f, f);
      l.down_bias.copy(w.down_bias + i * d, d);
      l.share = s.is_mixed ? w.shares[i] : T(1);
      l.period = s.is_pooled ? int64_t(w.periods[i]) : 1;
    }
    if (!s.is_pooled) return;
    own.count = 0;
    own.rows = COUNT<T>;
    own.row_stride = row_stride;
    size_ = COUNT<T> + 2 * (s.n_levels - 1) * row_stride;
  }
  int64_t size() const override { return size_; }
  int64_t room_size(int64_t rows) const override {
    return 3 * (rows * Panels<T>::padded(width) + 2 * LANES<T>) + 2 * (rows * Panels<T>::padded(hidden) + 2 * LANES<T>);
  }
  HopePlace place() const override { return own; }

  // Chained, each level reads what those before it have added; independent, all read the same.
  void add(int rows, const T*, T* x, int64_t stride, T* const* blocks, int64_t at, T* room) const override {
    const Room c = cut(room, rows);
    if (s.is_mixed) std::memcpy(c.from, x, size_t(rows) * stride * sizeof(T));
    const T* from = s.is_mixed ? c.from : x;
    for (int64_t i = 0; i < s.n_levels; ++i) {
      const int64_t index = s.is_slowest_first ? s.n_levels - 1 - i : i;
      const Level& l = *levels[index];
      if (s.is_pooled && index > 0) {
        for (int r = 0; r < rows; ++r) pool(l, index, from + r * stride, x + r * stride, blocks[r] + at, c);
        continue;
      }
      answer(l, rows, from, stride, c);
      for (int r = 0; r < rows; ++r) put(l, c.out + r * stride, x + r * stride);
    }
    if (s.is_pooled)
      for (int r = 0; r < rows; ++r) put_count(blocks[r] + at, count_at(blocks[r] + at) + 1);
  }

 private:
  void put(const Level& l, const T* out, T* x) const { for (int j = 0; j < width; ++j) x[j] += l.share * out[j]; }

  // down(gelu(up(norm x))), into the room.
  void answer(const Level& l, int rows, const T* from, int64_t stride, const Room& c) const {
    const int64_t far = l.up.out();
    for (int r = 0; r < rows; ++r) rms(from + r * stride, l.norm.get(), c.n + r * stride, width, eps);
    l.up.times(rows, c.n, stride, c.up, far);
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < hidden; ++j) c.h[r * far + j] = gelu(c.up[r * far + j] + l.up_bias.get()[j]);
    l.down.times(rows, c.h, far, c.out, stride);
    for (int r = 0; r < rows; ++r) for (int j = 0; j < width; ++j) c.out[r * stride + j] += l.down_bias.get()[j];
  }
  // A level that reads means: the tokens of a period get what it made of the mean of the period before.
  void pool(const Level& l, int64_t index, const T* from, T* x, T* block, const Room& c) const {
    T *sum = block + own.rows + 2 * (index - 1) * row_stride, *last = sum + row_stride;
    const bool is_over = (count_at(block) + 1) % l.period == 0;
    for (int j = 0; j < width; ++j) sum[j] += from[j];
    if (is_over) {
      for (int j = 0; j < width; ++j) c.out[j] = sum[j] / T(l.period);
      answer(l, 1, c.out, 0, c);
    }
    put(l, last, x);
    if (!is_over) return;
    std::memcpy(last, c.out, width * sizeof(T));
    std::memset(sum, 0, width * sizeof(T));
  }
};

// What a layer brings beside what decode.hpp has.
template <class T> Parts<T> hope_parts(const ModelShape& m, const LayerShape& s, const LayerWeights<T>& w) {
  Parts<T> found;
  if (s.mixer == SELF_REFERENCE) found.mixer = std::make_unique<SelfReference<T>>(m, s, w);
  if (s.mlp == LEVELS) found.mlp = std::make_unique<Levels<T>>(m, s, w);
  return found;
}

}  // namespace meristem::decoding
