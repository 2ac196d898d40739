// The last part of a model learns from the text just read, in a change that belongs to its reader: the head, or the last
// feed-forward layer. The rule is that of src/meristem/models/weights.py (TailLearner), which says why it is like this.
//
// A chunk of tokens is predicted by W + D, and once the token after it is there D <- D - rate min(1, clip / |g|) g, with g
// the gradient of its mean loss. What stands before the last part does not depend on D: no memory is read again.
#pragma once
#include <cfloat>
#include <cstdint>
#include <vector>

#include "decode.hpp"

namespace meristem::learning {

using namespace meristem::decoding;

enum Which : int64_t { HEAD, LAST_MLP };
struct Learning {
  int64_t which = HEAD, chunk = 64;
  double first_rate = 0, clip = 1;
  bool is_found = true;  // the rate, for the model, instead of given
  bool is_like(const Learning& o) const {
    return which == o.which && chunk == o.chunk && is_found == o.is_found && float(first_rate) == float(o.first_rate) && float(clip) == float(o.clip);
  }
};

constexpr double UNIFORM = 1e-3, MARGIN_NATS = 0.5;  // of what W + D predict; by which the balance may be negative
constexpr int MOST_DROPS = 8;
constexpr int TOGETHER = 16;  // rows of a chunk that are computed at once

enum Scalar { RATE, BALANCE, SAVED, MEAN_NATS, STEPS, N_SCALARS };

// What a session file holds of it. delta: of the weights that learn, in bfloat16; hidden, tokens: of the chunk that is not
// yet learned, [token, width].
struct Learned {
  int64_t n_chunks = 0;
  float scalars[N_SCALARS] = {};
  std::vector<uint16_t> delta[2];
  std::vector<float> hidden;
  std::vector<int64_t> tokens;
};

inline float of_bits(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// The nearest bfloat16, the even one of two.
inline uint16_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The logarithm of normal numbers above 0: Cephes' logf, within two units in the last place.
inline Vec<float> logarithm(Vec<float> x) {
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  Integers bits;
  std::memcpy(&bits, &x, VECTOR_BYTES);
  Integers n = (bits >> 23) - 127;
  bits = (bits & 0x7FFFFF) | 0x3F800000;
  std::memcpy(&x, &bits, VECTOR_BYTES);
  const Integers is_high = x > 1.41421356237f;
  x = is_high ? x * 0.5f : x;
  const Vec<float> e = __builtin_convertvector(n - is_high, Vec<float>), z = x - 1.0f, square = z * z;
  Vec<float> y = all(7.0376836292E-2f);
  for (const float c : {-1.1514610310E-1f, 1.1676998740E-1f, -1.2420140846E-1f, 1.4249322787E-1f, -1.6668057665E-1f, 2.0000714765E-1f, -2.4999993993E-1f, 3.3333331174E-1f})
    y = y * z + c;
  return z + (y * z * square + e * -2.12194440e-4f - 0.5f * square) + e * 0.693359375f;
}

// Logits of n ids become their softmax; what stands behind them, up to the next vector, becomes 0. Gives the greatest, and
// the sum of the exponentials of their distance to it, which is no number where one of them was none.
struct Sum { float top, sum; };
__attribute__((noinline)) inline Sum softmax(float* x, int n) {
  const int whole = int(up(n, LANES<float>));
  for (int i = n; i < whole; ++i) x[i] = -FLT_MAX;
  Vec<float> most = load(x), sum{};
  for (int i = 0; i < whole; i += LANES<float>) { const Vec<float> v = load(x + i); most = v > most ? v : most; }
  float top = most[0];
  for (int i = 1; i < LANES<float>; ++i) top = most[i] > top ? most[i] : top;
  for (int i = 0; i < whole; i += LANES<float>) {
    const Vec<float> part = exponential<float>(load(x + i) - top);
    store(x + i, part);
    sum += part;
  }
  const float all_of_it = total<float>(sum), by = 1 / all_of_it;
  for (int i = 0; i < whole; i += LANES<float>) store(x + i, load(x + i) * by);
  for (int i = n; i < whole; ++i) x[i] = 0;
  return {top, all_of_it};
}

class Learner {
  const Decoder<float>& model_;
  Learning how_;
  int d_, n_ids_, width_, far_, logits_;  // width of the model; strides of its vectors, of the inner ones, of logits
  Panels<float> moved_[2];                // W + D
  std::vector<float> gradient_[2];
  Numbers<float> hidden_, normed_, up_, inner_, z_, by_, by_inner_, by_up_, share_, static_, room_;

  const Layer<float>& layer() const { return model_.last(); }
  int n_weights() const { return how_.which == HEAD ? 1 : 2; }
  const Panels<float>& still(int i) const { return how_.which == HEAD ? model_.head() : i == 0 ? layer().up_ : layer().down; }

 public:
  Learned learned;

  // Sizes of the change i: of [out, in].
  int64_t rows(int i) const { return how_.which == HEAD ? n_ids_ : i == 0 ? n_up() : d_; }
  int64_t columns(int i) const { return i == 0 ? d_ : layer().s.hidden; }
  int64_t n_up() const { return (layer().s.mlp == SWIGLU ? 2 : 1) * layer().s.hidden; }
  const Learning& how() const { return how_; }
  int n_changes() const { return n_weights(); }

  __attribute__((cold)) Learner(const Decoder<float>& model, const ModelShape& shape, const Learning& how) : model_(model), how_(how) {
    d_ = int(shape.width);
    n_ids_ = int(shape.vocabulary);
    width_ = Panels<float>::padded(d_);
    logits_ = int(model.logits_stride());
    far_ = how.which == HEAD ? 0 : Panels<float>::padded(n_up());
    for (int i = 0; i < n_weights(); ++i) {
      moved_[i].make(rows(i), columns(i));
      gradient_[i].resize(size_t(rows(i) * columns(i)));
      learned.delta[i].resize(gradient_[i].size());
    }
    const size_t n = TOGETHER;
    for (Numbers<float>* each : {&hidden_, &normed_, &z_, &by_}) each->make(n * size_t(width_));
    for (Numbers<float>* each : {&up_, &inner_, &by_inner_, &by_up_}) each->make(n * size_t(far_));
    share_.make(n * size_t(logits_));
    static_.make(n * size_t(logits_));
    room_.make(Panels<float>::BACK * size_t(std::max(width_, far_)) * LANES<float>);
    learned.hidden.reserve(size_t(how.chunk * d_));
    learned.tokens.reserve(size_t(how.chunk) + 1);
    begin();
  }

  // Of a reader that has read nothing.
  void begin() {
    learned.n_chunks = 0;
    for (float& each : learned.scalars) each = 0;
    learned.scalars[RATE] = float(how_.first_rate);
    for (auto& each : learned.delta) std::fill(each.begin(), each.end(), uint16_t(0));
    learned.hidden.clear();
    learned.tokens.clear();
    apply();
  }
  // After ``learned`` was filled from a file.
  void apply() {
    for (int i = 0; i < n_weights(); ++i) {
      const uint16_t* delta = learned.delta[i].data();
      moved_[i].sum(still(i), rows(i), [&](int64_t at) { return of_bits(delta[at]); });
    }
  }

  // The prediction after a token that was read, from the vector that the last part is given. A chunk that is whole is
  // learned first: the token is what its last one should have predicted.
  void predict(const float* hidden, int64_t token, float* logits) {
    if (int64_t(learned.tokens.size()) == how_.chunk) {
      learned.tokens.push_back(token);
      step();
      learned.hidden.clear();
      learned.tokens.clear();
    }
    learned.hidden.insert(learned.hidden.end(), hidden, hidden + d_);
    learned.tokens.push_back(token);
    std::memcpy(hidden_.get(), hidden, size_t(d_) * sizeof(float));
    forward(1, true, logits);
    if (!(learned.scalars[STEPS] > 0)) return;
    const float uniform = float(UNIFORM / n_ids_), rest = float(1 - UNIFORM);
    const bool is_number = softmax(logits, n_ids_).sum > 0;
    each<float>(n_ids_, [&](int j) { store(logits + j, logarithm((is_number ? load(logits + j) : all(1.0f / float(n_ids_))) * rest + uniform)); });
  }

 private:
  // Logits of rows of ``hidden_``, by W + D or by W. What the backward pass needs stays in the room.
  __attribute__((noinline, noclone)) void forward(int n, bool is_moved, float* logits) {
    const Panels<float>& first = is_moved ? moved_[0] : still(0);
    if (how_.which == HEAD) { first.times(n, hidden_.get(), width_, logits, logits_); return; }
    const Layer<float>& l = layer();
    const float eps = float(model_.eps());
    for (int r = 0; r < n; ++r) rms(hidden_.get() + r * width_, l.mlp_norm.get(), normed_.get() + r * width_, d_, eps);
    first.times(n, normed_.get(), width_, up_.get(), far_);
    for (int r = 0; r < n; ++r) activate(l, up_.get() + r * far_, inner_.get() + r * far_);
    std::memcpy(z_.get(), hidden_.get(), size_t(n) * size_t(width_) * sizeof(float));
    (is_moved ? moved_[1] : still(1)).times<true>(n, inner_.get(), far_, z_.get(), width_);
    for (int r = 0; r < n; ++r) {
      float* z = z_.get() + r * width_;
      for (int j = 0; l.down_bias && j < d_; ++j) z[j] += l.down_bias.get()[j];
      rms(z, model_.norm().get(), by_.get() + r * width_, d_, eps);
    }
    model_.head().times(n, by_.get(), width_, logits, logits_);
  }

  // Adds the gradient of the weights that learn to ``gradient_``, from that of the logits, whose forward was the last.
  void backward(int n, const float* wrong) {
    if (how_.which == HEAD) { outer(n, wrong, logits_, hidden_.get(), width_, 0); return; }
    const Layer<float>& l = layer();
    const int f = int(l.s.hidden);
    model_.head().back(n, wrong, logits_, by_.get(), width_, room_.get());
    for (int r = 0; r < n; ++r) unnormed(z_.get() + r * width_, by_.get() + r * width_);
    outer(n, by_.get(), width_, inner_.get(), far_, 1);
    moved_[1].back(n, by_.get(), width_, by_inner_.get(), far_, room_.get());
    for (int r = 0; r < n; ++r) {
      const float *up = up_.get() + r * far_, *by = by_inner_.get() + r * far_;
      float* to = by_up_.get() + r * far_;
      for (int j = 0; j < f; ++j) {
        if (l.s.mlp == SWIGLU) {
          const float s = meristem::decoding::share(up[j]);
          to[j] = by[j] * up[f + j] * s * (1 + up[j] * (1 - s));
          to[f + j] = by[j] * up[j] * s;
        } else {
          const float y = up[j] + l.up_bias.get()[j];
          to[j] = by[j] * (0.5f * (1 + erf(y * 0.70710678118654752440f)) + y * exp(-0.5f * y * y) * 0.39894228040143267794f);
        }
      }
    }
    outer(n, by_up_.get(), far_, normed_.get(), width_, 0);
  }

  // gradient_[i] [out, in] += y^T x of n rows.
  __attribute__((noinline, noclone)) void outer(int n, const float* y, int ys, const float* x, int xs, int i) {
    const int64_t out = rows(i), in = columns(i);
    for (int64_t o = 0; o < out; ++o) {
      float* to = gradient_[i].data() + o * in;
      for (int r = 0; r < n; ++r) {
        const float by = y[r * ys + o];
        const float* from = x + r * xs;
        for (int64_t j = 0; j < in; ++j) to[j] += by * from[j];
      }
    }
  }
  // The gradient of rms(z) gain with respect to z, in the place of that with respect to what it gave.
  void unnormed(const float* z, float* by) {
    const float scale = 1 / std::sqrt(square(z, d_) / float(d_) + float(model_.eps()));
    double along = 0;
    for (int j = 0; j < d_; ++j) {
      by[j] *= model_.norm().get()[j];
      along += double(by[j]) * double(z[j]);
    }
    const float shrink = float(along / d_) * scale * scale * scale;
    for (int j = 0; j < d_; ++j) by[j] = by[j] * scale - z[j] * shrink;
  }

  // What a whole chunk makes of what was learned: one step, or the guard drops it all.
  __attribute__((noinline)) void step() {
    const int64_t chunk = how_.chunk;
    float* s = learned.scalars;
    double nats = 0, static_nats = 0;
    for (int i = 0; i < n_weights(); ++i) std::fill(gradient_[i].begin(), gradient_[i].end(), 0.0f);
    for (int64_t first = 0; first < chunk; first += TOGETHER) {
      const int n = int(std::min<int64_t>(TOGETHER, chunk - first));
      const int64_t* targets = learned.tokens.data() + first + 1;
      for (int r = 0; r < n; ++r) std::memcpy(hidden_.get() + r * width_, learned.hidden.data() + (first + r) * d_, size_t(d_) * sizeof(float));
      forward(n, false, static_.get());
      for (int r = 0; r < n; ++r) {
        float* x = static_.get() + r * logits_;
        const double of_target = double(x[targets[r]]);
        const Sum sum = softmax(x, n_ids_);
        static_nats += (log(double(sum.sum)) + double(sum.top) - of_target) / double(chunk);
      }
      forward(n, true, share_.get());
      for (int r = 0; r < n; ++r) {
        float* share = share_.get() + r * logits_;
        softmax(share, n_ids_);
        const double of_target = (1 - UNIFORM) * double(share[targets[r]]) + UNIFORM / n_ids_;
        nats -= log(of_target) / double(chunk);
        share[targets[r]] -= 1;
        for (int j = 0; j < n_ids_; ++j) share[j] /= float(chunk);
        for (int j = n_ids_; j < logits_; ++j) share[j] = 0;
      }
      backward(n, share_.get());
    }
    if (!(s[STEPS] > 0)) nats = static_nats;
    double balance = double(s[BALANCE]) + static_nats - nats, length = 0, moved_length = 0;
    balance = balance > 0 ? 0 : balance;
    const bool is_worse = !(balance >= -MARGIN_NATS) && s[STEPS] > 0;
    for (int i = 0; i < n_weights(); ++i) for (const float g : gradient_[i]) length += double(g) * double(g);
    length = std::sqrt(length);
    const float factor = float(double(s[RATE]) * how_.clip / (length > how_.clip ? length : how_.clip));
    for (int i = 0; i < n_weights(); ++i)
      for (size_t j = 0; j < gradient_[i].size(); ++j) {
        const float moved = of_bits(learned.delta[i][j]) - factor * gradient_[i][j];
        moved_length += double(moved) * double(moved);
        learned.delta[i][j] = bits_of(moved);
      }
    const bool is_dropped = is_worse || !(moved_length <= double(FLT_MAX) * double(FLT_MAX));
    const double lost = MARGIN_NATS + log(n_ids_ / UNIFORM);
    double saved = double(s[SAVED]) + static_nats - nats;
    if (is_dropped) {
      for (auto& each : learned.delta) std::fill(each.begin(), each.end(), uint16_t(0));
      if (!(s[SAVED] >= float(lost))) s[RATE] /= 2;
      if (!(s[RATE] > float(how_.first_rate / (1 << MOST_DROPS)))) s[RATE] = 0;
      balance = saved = 0;
    }
    ++learned.n_chunks;
    s[MEAN_NATS] += float(((is_worse ? static_nats : nats) - double(s[MEAN_NATS])) / double(learned.n_chunks));
    s[STEPS] = is_dropped || s[RATE] == 0 ? 0 : s[STEPS] + 1;
    s[BALANCE] = float(balance);
    s[SAVED] = float(saved);
    apply();
  }
};

}  // namespace meristem::learning
