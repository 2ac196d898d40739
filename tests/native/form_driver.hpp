// Windows of random sizes through the chunk form, forward and backward, in buffers exactly as large as they must be; some
// numbers are NaN, some infinite, some too small to be normal.
#pragma once

namespace forms {
std::mt19937 generator;

int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }

template <class T> class Windows {
 public:
  // Returns the fault of the pass, if there was one.
  int run() {
    const int64_t lanes = VECTOR_BYTES / sizeof(T);
    MeristemForm f{};
    f.rows = draw(1, 2), f.time = draw(1, 90), f.heads = draw(1, 3), f.threads = draw(1, 4);
    f.key = lanes * draw(1, 4), f.value = lanes * draw(1, 4), f.chunk = std::min<int64_t>(f.time, draw(1, 64));
    f.levels = int(draw(1, 2)), f.probe = int(draw(0, 2)), f.reads_before = int(draw(0, 1)), f.is_double = sizeof(T) == 8;
    for (auto [view, width] : {std::pair{&f.query, f.key}, {&f.keys, f.key}, {&f.values, f.value}, {&f.read, f.value},
                               {&f.d_read, f.value}, {&f.d_query, f.key}, {&f.d_keys, f.key}, {&f.d_values, f.value}})
      *view = vectors(f, width);
    for (MeristemView* view : {&f.retain, &f.momentum, &f.write, &f.scale, &f.d_retain, &f.d_momentum, &f.d_write, &f.d_scale})
      *view = gates(f);
    if (draw(0, 1)) f.retain.at = f.d_retain.at = nullptr;
    if (draw(0, 1)) f.scale.at = f.d_scale.at = nullptr;
    for (MeristemView* view : {&f.memory, &f.last, &f.d_last, &f.d_memory}) *view = memory(f);
    if (f.levels == 2)
      for (MeristemView* view : {&f.moving, &f.last_moving, &f.d_last_moving, &f.d_moving}) *view = memory(f);
    const int64_t chunks = f.rows * f.heads * ((f.time + f.chunk - 1) / f.chunk);
    const int64_t square = f.chunk * up(f.chunk, 2 * lanes) * (f.probe == TOKEN ? 2 : 1);
    const bool keeps = draw(0, 3) > 0;
    if (keeps) {
      f.new_values = fresh(chunks * f.chunk * f.value);
      f.products = fresh(chunks * square);
      f.entered = fresh(chunks * f.levels * f.key * f.value);
    }
    int fault = pass(f, false, meristem_form_forward);
    if (keeps && !fault) fault = pass(f, true, meristem_form_backward);
    held.clear();
    return fault;
  }

 private:
  std::vector<std::unique_ptr<T[]>> held;

  T* fresh(int64_t n) {
    held.push_back(std::unique_ptr<T[]>(new T[n]));
    std::normal_distribution<T> normal(0, T(0.4));
    for (int64_t i = 0; i < n; ++i) held.back()[i] = normal(generator);
    if (draw(0, 9) == 0) held.back()[draw(0, n - 1)] = std::vector<T>{T(NAN), T(INFINITY), T(1e-40), T(0)}[draw(0, 3)];
    return held.back().get();
  }
  // Heads before time or after it, and at times more numbers between them than the width.
  MeristemView vectors(const MeristemForm& f, int64_t width) {
    const int64_t gap = width + draw(0, 1) * draw(1, 5), first = f.rows * f.time * f.heads * gap - (gap - width);
    if (draw(0, 1)) return {fresh(first), f.time * f.heads * gap, f.heads * gap, gap};
    return {fresh(first), f.time * f.heads * gap, gap, f.time * gap};
  }
  MeristemView gates(const MeristemForm& f) {
    const MeristemView view{fresh(f.rows * f.time * f.heads), f.time * f.heads, f.heads, 1};
    return view;
  }
  MeristemView memory(const MeristemForm& f) {
    const int64_t each = f.key * f.value;
    return {fresh(f.rows * f.heads * each), f.heads * each, 0, each};
  }
  int pass(MeristemForm& f, bool is_backward, int (*call)(const MeristemForm*)) {
    const int64_t bytes = meristem_form_scratch(&f, is_backward) * f.threads;
    const std::unique_ptr<char, decltype(&std::free)> scratch(static_cast<char*>(std::aligned_alloc(64, bytes)), std::free);
    f.scratch = scratch.get(), f.n_scratch_bytes = bytes;
    return call(&f);
  }
};

int drive(unsigned seed, int n) {
  generator.seed(seed);
  Windows<float> single;
  Windows<double> twice;
  for (int i = 0; i < n; ++i)
    if (single.run() || twice.run()) return 1;
  std::printf("%d windows\n", 2 * n);
  return 0;
}
}  // namespace forms
