// Rows, strips, windows and writes of random sizes through what stands around the form and the write of a memory, forward and
// backward, in buffers exactly as large as they must be; some numbers are NaN or infinite.
#pragma once

namespace layers {
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
    return fault | entropy() | vectors() | window() | write();
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
  int window() {
    MeristemWindow w{draw(1, 2), draw(1, 150), draw(0, 1) * draw(0, 80), draw(1, 2), LANES<T> * draw(1, 3), draw(1, 90)};
    w.threads = draw(1, 3), w.numbers = numbers;
    const int64_t near = w.heads * w.width, n = w.rows * w.time * near, before = w.rows * w.past * near;
    w.vectors = fresh<S>(3 * n), w.mixed = fresh<S>(n), w.sent = fresh<S>(n), w.d_vectors = fresh<S>(3 * n);
    if (w.past) w.past_keys = fresh<S>(before), w.past_values = fresh<S>(before);
    if (draw(0, 1)) w.d_past_keys = fresh<S>(before), w.d_past_values = fresh<S>(before);
    if (draw(0, 1)) w.cosine = fresh<T>((w.past + w.time) * w.width / 2), w.sine = fresh<T>((w.past + w.time) * w.width / 2);
    const bool keeps = draw(0, 3) > 0;
    if (keeps) w.kept = fresh<T>(w.rows * w.heads * meristem_window_kept(&w));
    int fault = attend(w, false, meristem_window_forward);
    return keeps ? fault | attend(w, true, meristem_window_backward) : fault;
  }
  int attend(MeristemWindow& w, bool is_backward, int (*call)(const MeristemWindow*)) {
    const int64_t bytes = meristem_window_scratch(&w, is_backward) * w.threads;
    const std::unique_ptr<char, decltype(&std::free)> scratch(static_cast<char*>(std::aligned_alloc(64, bytes)), std::free);
    w.scratch = scratch.get(), w.n_scratch_bytes = bytes;
    return call(&w);
  }
  int write() {
    MeristemWrite w{};
    MeristemForm& f = w.form;
    MeristemVectors& v = w.vectors;
    f.rows = v.rows = draw(1, 2), f.time = v.time = draw(1, 40), f.heads = v.heads = draw(1, 3);
    f.key = f.value = v.width = LANES<T> * draw(1, 3), f.threads = v.threads = draw(1, 3);
    f.chunk = draw(1, f.time), f.levels = int32_t(draw(1, 2)), f.probe = draw(0, 1) ? TOKEN : NEVER;
    f.reads_before = int32_t(draw(0, 1)), f.is_double = numbers == FLOAT64;
    v.vectors = 3, v.taps = draw(1, 8), v.units = 2, v.numbers = numbers;
    w.has_retain = int32_t(draw(0, 1)), w.has_retain_gate = w.has_retain * int32_t(draw(0, 1)), w.is_warm = int32_t(draw(0, 1));
    w.slope = draw(0, 1) ? 1 : 0.5, w.write_limit = 1, w.curvature = double(draw(0, 1));
    const int64_t items = f.rows * f.heads, n = items * f.time * f.key, channels = 3 * f.heads * f.key, matrix = f.key * f.key;
    const int64_t gates = 1 + w.has_retain_gate + (f.levels == 2), chunks = (f.time + f.chunk - 1) / f.chunk;
    v.x = fresh<S>(3 * n), v.before = fresh<S>(f.rows * (v.taps - 1) * channels), v.weight = fresh<T>(channels * v.taps);
    w.logits = fresh<T>(items * f.time * gates), w.most = f.levels == 2 ? fresh<T>(f.heads) : nullptr;
    const auto memory = [&] { return MeristemView{fresh<T>(items * matrix), f.heads * matrix, 0, matrix}; };
    const auto by_head = [&] { return MeristemView{fresh<T>(n), f.heads * f.time * f.key, f.key, f.time * f.key}; };
    const auto by_token = [&] { return MeristemView{fresh<T>(n), f.heads * f.time * f.key, f.heads * f.key, f.key}; };
    for (MeristemView* each : {&f.memory, &f.last, &f.d_memory, &f.d_last}) *each = memory();
    if (f.levels == 2) for (MeristemView* each : {&f.moving, &f.last_moving, &f.d_moving, &f.d_last_moving}) *each = memory();
    f.read = by_token(), f.d_read = by_token();
    const bool keeps = draw(0, 3) > 0;
    if (keeps) {
      const int64_t square = f.chunk * up(f.chunk, 2 * LANES<T>) * (f.probe == TOKEN ? 2 : 1);
      f.query = by_head(), f.keys = by_head(), f.new_values = fresh<T>(items * chunks * f.chunk * f.key);
      f.products = fresh<T>(items * chunks * square), f.entered = fresh<T>(items * chunks * f.levels * matrix);
    }
    v.d_x = fresh<S>(3 * n), v.d_weight = fresh<T>(f.rows * channels * v.taps);
    v.d_before = draw(0, 1) ? fresh<S>(f.rows * (v.taps - 1) * channels) : nullptr;
    w.d_logits = fresh<T>(items * f.time * gates), w.d_most = fresh<T>(items);
    int fault = in_room(w, false, meristem_write_forward);
    return keeps ? fault | in_room(w, true, meristem_write_backward) : fault;
  }
  int in_room(MeristemWrite& w, bool is_backward, int (*call)(const MeristemWrite*)) {
    const int64_t bytes = meristem_write_scratch(&w, is_backward) * w.form.threads;
    const std::unique_ptr<char, decltype(&std::free)> scratch(static_cast<char*>(std::aligned_alloc(64, bytes)), std::free);
    w.form.scratch = scratch.get(), w.form.n_scratch_bytes = bytes;
    return call(&w);
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

int drive(unsigned seed, int n) {
  generator.seed(seed);
  Calls<float, float> single(FLOAT32);
  Calls<double, double> twice(FLOAT64);
  Calls<float, Brain> half(BFLOAT16);
  for (int i = 0; i < n; ++i)
    if (single.run() || twice.run() || half.run()) return 1;
  std::printf("%d calls\n", 3 * n);
  return 0;
}
}  // namespace layers
