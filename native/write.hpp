// The gates of a memory inside the region where it cannot run away (memory/region.py, nn/gates.py), over the tokens of one head,
// and their gradients:
//
//   write = limit s(w) s(-m),   log retain = -hypot(log s(r), FADE write),   momentum = s(m)      s the sigmoid
//   momentum <- soft(momentum, most retain),   write <- soft(write, OVERSHOOT / L (1 - most) (1 + retain - 2 momentum / most))
//
// with w, r and m what the map gives; without momentum s(-m) is 1 and most 0. soft(x, y) = x (1 + (x / y)^64)^(-1/64) is the least of two numbers, made smooth: what
// tensor code writes as a difference of softplus and logarithm. Powers of two are products and square roots.
#pragma once
#include "form.hpp"
#include "layers.hpp"

namespace meristem {

// What a rule and its layer settle.
struct Region {
  double write_limit, curvature;  // curvature 0: the write rate has no limit
  int32_t has_retain, has_retain_gate, has_momentum;
  int n_gates() const { return 1 + (has_retain_gate != 0) + (has_momentum != 0); }
};

// log(1 + u) = 2 artanh(u / (2 + u)), for u from 0 to 1.
template <class T> MERISTEM_INLINE Vec<T> log_of_one_and(Vec<T> u) {
  constexpr int MOST = sizeof(T) == 4 ? 17 : 35;
  const Vec<T> s = u / (T(2) + u), square = s * s;
  Vec<T> sum = all(T(1) / MOST);
#pragma GCC unroll 20
  for (int i = MOST - 2; i > 0; i -= 2) sum = sum * square + T(1) / T(i);
  return T(2) * s * sum;
}
template <class T> MERISTEM_INLINE Vec<T> log_sigmoid(Vec<T> x) {
  const Vec<T> size = x < T(0) ? -x : x;
  return (x < T(0) ? x : Vec<T>{}) - log_of_one_and<T>(exponential<T>(-size));
}
template <class T> MERISTEM_INLINE Vec<T> root(Vec<T> x) {
  for (int i = 0; i < LANES<T>; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// soft(x, y), and how much of its logarithm is that of y.
template <class T> struct Soft {
  Vec<T> value, share;
  MERISTEM_INLINE Soft(Vec<T> x, Vec<T> y) {
    constexpr T FAR = T(1.8682459574322223);  // e^(40 / 64), from where tensor code takes y
    const Vec<T> of_y = x / y;
    const auto is_far = of_y > FAR;
    Vec<T> power = is_far ? all(T(1)) : of_y;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) power *= power;
    Vec<T> by = T(1) + power;
    share = is_far ? all(T(1)) : power / by;
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) by = root<T>(by);
    value = is_far ? y : x / by;
  }
};

// One number for each token, from the places that the gates are read from and written to.
template <class T> struct GateRows {
  T *write, *retain, *momentum;
  GateRows(int64_t time, Arena& arena) {
    for (T** each : {&write, &retain, &momentum}) *each = arena.take<T>(up(time, LANES<T>));
  }
};

template <class T> class HeadGates {
 public:
  // raw: what the map gives, filled in by ``read``; factors: the gates; sent: their gradients.
  GateRows<T> raw, factors;
  HeadGates(const Region& region, int64_t time, int64_t heads, Arena& arena)
      : raw(time, arena), factors(time, arena), r(region), time(time), heads(heads) {}

  // logits: [time, gates, heads], from this head on. most: of the head.
  void forward(const T* logits, T most) const {
    each_gate([&](int gate, T* row) {
      for (int64_t t = 0; t < time; ++t) row[t] = logits[(t * r.n_gates() + gate) * heads];
      std::fill(row + time, row + up(time, LANES<T>), T(0));
    });
    for (int64_t t = 0; t < time; t += LANES<T>) {
      const Step x(*this, t, most);
      store(factors.write + t, x.written.value);
      store(factors.retain + t, x.retain);
      store(factors.momentum + t, x.moved.value);
    }
  }
  // sent: the gradients of the factors, zeros behind the last token; they are written over. d_logits: as in ``forward``. Returns the
  // gradient of most.
  T backward(GateRows<T> sent, T most, T* d_logits) const {
    Vec<T> d_most{};
    for (int64_t t = 0; t < time; t += LANES<T>) {
      const Step x(*this, t, most);
      Vec<T> d_retain = load(sent.retain + t), d_momentum = load(sent.momentum + t);
      const Vec<T> of_write = load(sent.write + t) * x.written.value;
      Vec<T> d_log_write = of_write, d_log_momentum{}, of_most{};
      if (r.curvature > 0) {
        d_log_write = of_write * (T(1) - x.written.share);
        const Vec<T> d_limit = x.limit > T(TINY) ? of_write * x.written.share / x.limit : Vec<T>{};
        d_retain += d_limit * x.room;
        if (r.has_momentum) {
          d_momentum -= d_limit * (T(2) / most * x.room);
          of_most = d_limit * x.overshoot * (T(2) / (most * most) * x.moved.value - T(1) - x.retain);
        }
      }
      Vec<T> d_log_retain = d_retain * x.retain;
      if (r.has_momentum) {
        const Vec<T> of_momentum = d_momentum * x.moved.value, of_bound = of_momentum * x.moved.share;
        d_log_momentum = of_momentum - of_bound;
        of_most += of_bound / most;
        d_log_retain += of_bound;
      }
      Vec<T> d_log_own{};  // of log s(r)
      if (r.has_retain) {
        // log retain = -hypot(a, b): the gradient of a is -a / hypot.
        const Vec<T> size = x.size > T(0) ? x.size : all(T(1));
        d_log_own = -d_log_retain * x.log_own / size;
        d_log_write -= d_log_retain * (x.least / size) * x.least;
      }
      d_most += of_most;
      // d log s(x) = 1 - s(x), d log s(-x) = -s(x).
      store(sent.write + t, d_log_write * (T(1) - x.share));
      store(sent.retain + t, d_log_own * sigmoid<T>(-load(raw.retain + t)));
      store(sent.momentum + t, d_log_momentum * x.unmoved - d_log_write * x.momentum);
    }
    HeadGates(*this, sent).each_gate([&](int gate, const T* row) {
      for (int64_t t = 0; t < time; ++t) d_logits[(t * r.n_gates() + gate) * heads] = row[t];
    });
    return total<T>(d_most);
  }

 private:
  static constexpr double FADE = 1.0 / 65536, OVERSHOOT = 0.9, TINY = 1e-30;
  const Region r;
  const int64_t time, heads;

  HeadGates(const HeadGates& other, GateRows<T> raw)
      : raw(raw), factors(other.factors), r(other.r), time(other.time), heads(other.heads) {}

  template <class F> void each_gate(F f) const {
    int gate = 0;
    f(gate++, raw.write);
    if (r.has_retain_gate) f(gate++, raw.retain);
    if (r.has_momentum) f(gate++, raw.momentum);
  }

  // A vector of tokens. written, moved: write rate and momentum; room = overshoot (1 - most), or overshoot without momentum.
  struct Step {
    Vec<T> share, momentum{}, unmoved{}, retain = all(T(1)), log_own{}, least, size{}, limit{};
    Soft<T> moved, written;
    T overshoot = 0, room = 0;

    MERISTEM_INLINE Step(const HeadGates& g, int64_t t, T most) : moved(Vec<T>{}, all(T(1))), written(Vec<T>{}, all(T(1))) {
      const Region& r = g.r;
      share = sigmoid<T>(load(g.raw.write + t));
      Vec<T> write = T(r.write_limit) * share;
      if (r.has_momentum) {
        const Vec<T> raw = load(g.raw.momentum + t);
        momentum = sigmoid<T>(raw);
        unmoved = sigmoid<T>(-raw);
        write *= unmoved;
      }
      least = T(FADE) * write;
      if (r.has_retain) {
        if (r.has_retain_gate) log_own = log_sigmoid<T>(load(g.raw.retain + t));
        size = root<T>(log_own * log_own + least * least);
        retain = exponential<T>(-size);
      }
      if (r.has_momentum) moved = Soft<T>(momentum, above_tiny(most * retain));
      written.value = write;
      if (r.curvature > 0) {
        overshoot = T(OVERSHOOT / r.curvature);
        room = r.has_momentum ? overshoot * (1 - most) : overshoot;
        limit = room + room * retain;
        if (r.has_momentum) limit -= T(2) * (room / most) * moved.value;
        written = Soft<T>(write, above_tiny(limit));
      }
    }
    static MERISTEM_INLINE Vec<T> above_tiny(Vec<T> x) { return x < T(TINY) ? all(T(TINY)) : x; }
  };
};

}  // namespace meristem
