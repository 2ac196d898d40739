// Rows and strips of random sizes through what stands around the form, forward and backward, in buffers exactly as large as
// they must be. Built by test_layers_sanitized.py with AddressSanitizer and UBSan; some numbers are NaN or infinite.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "core.cpp"

namespace {
std::mt19937 generator;

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }

template <class T, class S> class Calls {
 public:
  explicit Calls(int32_t numbers) : numbers(numbers) {}

  // Returns the fault of a pass, if there was one.
  int run() {
    held.clear();
    const int64_t rows = draw(1, 200), width = LANES<T> * draw(1, 5);
    MeristemRows r{rows, width, draw(1, 3), numbers, 1e-6, fresh<S>(2 * rows * width)};
    r.gate = draw(0, 1) ? fresh<S>(rows * width) : nullptr;
    r.beside = draw(0, 1) ? fresh<S>(rows * width) : nullptr;
    r.gain = fresh<T>(width), r.sent = fresh<S>(rows * width), r.out = fresh<S>(rows * width);
    r.d_x = fresh<S>(2 * rows * width), r.d_gate = fresh<S>(rows * width);
    r.d_gain = fresh<T>((rows + BLOCK - 1) / BLOCK * width);
    int fault = meristem_norm_forward(&r) | meristem_norm_backward(&r);
    fault |= meristem_swiglu_forward(&r) | meristem_swiglu_backward(&r);
    return fault | entropy() | vectors();
  }

 private:
  const int32_t numbers;
  std::vector<std::shared_ptr<void>> held;

  template <class N> N* fresh(int64_t n) {
    std::shared_ptr<N[]> made(new N[n]);
    std::normal_distribution<float> normal(0, 2);
    const auto put = [&](int64_t i, float x) {
      if constexpr (std::is_same_v<N, Brain>) give_one<float>(&made[i], x);
      else made[i] = N(x);
    };
    for (int64_t i = 0; i < n; ++i) put(i, normal(generator));
    if (n && draw(0, 9) == 0) put(draw(0, n - 1), std::vector<float>{NAN, INFINITY, -INFINITY, 1e-40f}[draw(0, 3)]);
    held.push_back(made);
    return made.get();
  }
  int entropy() {
    const int64_t rows = draw(1, 150), width = draw(1, 70);
    std::vector<int64_t> targets(rows);
    for (int64_t& each : targets) each = draw(0, 4) ? draw(0, width - 1) : -100;
    MeristemCrossEntropy c{rows, width, -100, draw(1, 3), numbers, fresh<S>(rows * width), targets.data()};
    c.log_sum = fresh<T>(rows), c.nats = fresh<T>(rows), c.weight = 0.5, c.d_logits = fresh<S>(rows * width);
    return meristem_cross_entropy_forward(&c) | meristem_cross_entropy_backward(&c);
  }
  int vectors() {
    MeristemVectors v{draw(1, 2), draw(1, 40), draw(1, 3), draw(1, 3), LANES<T> * draw(1, 4), draw(1, 8)};
    v.units = draw(0, v.vectors), v.threads = draw(1, 3), v.numbers = numbers;
    const int64_t channels = v.vectors * v.heads * v.width, n = v.rows * v.time * channels;
    v.x = fresh<S>(n), v.before = fresh<S>(v.rows * (v.taps - 1) * channels), v.weight = fresh<T>(channels * v.taps);
    const int64_t head = v.time * v.width;
    for (int64_t i = 0; i < v.vectors; ++i) v.vector[i] = {fresh<T>(n / v.vectors), v.heads * head, v.width, head};
    int fault = meristem_vectors_forward(&v);
    v.d_x = fresh<S>(n), v.d_weight = fresh<T>(v.rows * channels * v.taps);
    v.d_before = draw(0, 1) ? fresh<S>(v.rows * (v.taps - 1) * channels) : nullptr;
    return fault | meristem_vectors_backward(&v);
  }
};
}  // namespace

int main(int, char** words) {
  generator.seed(unsigned(std::atoi(words[1])));
  const int n = std::atoi(words[2]);
  Calls<float, float> single(FLOAT32);
  Calls<double, double> twice(FLOAT64);
  Calls<float, Brain> half(BFLOAT16);
  for (int i = 0; i < n; ++i)
    if (single.run() || twice.run() || half.run()) return 1;
  std::printf("%d calls\n", 3 * n);
}
