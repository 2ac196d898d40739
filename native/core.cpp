// The plain C interface of the native core: what Python binds by ctypes. One file, compiled once for each processor level
// (src/meristem/native/build.py), without torch and without any library but that of the compiler.
//
// The interface has a version, ABI. Raise it here and in src/meristem/native/library.py when a function or a structure
// changes. What runs the form keeps no pointer after it has returned, allocates nothing, and returns 0 or a reason.
#include <atomic>
#include <system_error>
#include <thread>

#include "attention.hpp"
#include "decode.hpp"
#include "draw.hpp"
#include "form.hpp"
#include "hope.hpp"
#include "layers.hpp"
#include "write.hpp"

#define MERISTEM_EXPORT extern "C" __attribute__((visibility("default")))

constexpr int ABI = 11;

// Of the interface that this library was compiled with; the caller compares it before it calls anything else.
MERISTEM_EXPORT int meristem_abi() { return ABI; }

// Numbers of the widest vector in bytes: widths are padded to that.
MERISTEM_EXPORT int meristem_vector_bytes() { return meristem::VECTOR_BYTES; }

// ---- the exact chunk form ----

// A tensor [row, time, head, width], or [row, head, ...] without time, by its strides in numbers; ``at`` is null where there
// is none. The last axis has no gaps.
struct MeristemView {
  void* at;
  int64_t row, time, head;
};

// What both passes are given. memory, moving (the momentum), and what is like them: [row, head, key, value]. The last
// are what the backward pass reads again: new_values [row head, chunks, chunk, value], K K^T and Q K^T, or Q K^T alone where
// writes do not depend on each other [row head, chunks, 2 or 1, chunk, columns], and what entered [row head, chunks, levels key,
// value]. Without them nothing is kept.
struct MeristemForm {
  int64_t rows, time, heads, key, value, chunk, threads;
  int32_t levels, probe, reads_before, is_double;
  MeristemView query, keys, values, retain, momentum, write, scale;
  MeristemView memory, moving, read, last, last_moving;
  void *new_values, *products, *entered;
  void* scratch;
  int64_t n_scratch_bytes;
  void* parallel;  // GOMP_parallel of the caller's pool of threads, or null
  MeristemView d_read, d_last, d_last_moving, d_query, d_keys, d_values, d_retain, d_momentum, d_write, d_scale, d_memory,
      d_moving;
};

enum MeristemFault { FINE = 0, BAD_SIZES = 1, BAD_POINTERS = 2 };

namespace {
using namespace meristem;

template <class T> T* at(const MeristemView& x, int64_t row, int64_t head, int64_t time = 0) {
  return static_cast<T*>(x.at) + row * x.row + head * x.head + time * x.time;
}

// Rows of a chunk without gaps: those of the tensor, or a copy.
template <class T>
const T* packed(const MeristemView& x, int64_t row, int64_t head, int64_t time, int c, int width, T* copy) {
  const T* from = at<T>(x, row, head, time);
  if (x.time == width) return from;
  for (int i = 0; i < c; ++i) std::memcpy(copy + i * width, from + i * x.time, width * sizeof(T));
  return copy;
}
template <class T> void unpack(const T* from, const MeristemView& x, int64_t row, int64_t head, int64_t time, int c, int width) {
  T* to = at<T>(x, row, head, time);
  if (to == from) return;
  for (int i = 0; i < c; ++i) std::memcpy(to + i * x.time, from + i * width, width * sizeof(T));
}
// e^-30: a factor of retain or momentum below it counts as it and has the gradient 0, as memory/gates.py says.
constexpr double LEAST_FACTOR = 9.3576229688401746e-14;

template <class T>
void gate(const MeristemView& x, int64_t row, int64_t head, int64_t time, int c, T* to, double least = -INFINITY) {
  if (!x.at) return std::fill(to, to + c, T(1));
  const T* from = at<T>(x, row, head, time);
  for (int i = 0; i < c; ++i) to[i] = from[i * x.time] < T(least) ? T(least) : from[i * x.time];  // NaN stays
}
template <class T>
void ungate(const T* from, const MeristemView& x, int64_t row, int64_t head, int64_t time, int c,
            const MeristemView* floored = nullptr) {
  if (!x.at) return;
  T* to = at<T>(x, row, head, time);
  for (int i = 0; i < c; ++i) {
    const bool counts = !floored || !(at<T>(*floored, row, head, time + i)[0] < T(LEAST_FACTOR));
    to[i * x.time] = counts ? from[i] : T(0);
  }
}

// ``work(thread, item)`` for every item, each by one thread alone: the bits do not depend on how many there are. parallel: calls
// a function in so many threads of a pool, as libgomp's GOMP_parallel; without one, threads are started.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

template <class F> class Team {
 public:
  Team(int64_t n_items, F& work) : n_items(n_items), work(work) {}
  static void join(void* team) { static_cast<Team*>(team)->run(); }

  void run() {
    const Flushed flushed;
    const int64_t thread = n_joined.fetch_add(1);
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < n_items;) work(thread, item);
  }

 private:
  const int64_t n_items;
  F& work;
  std::atomic<int64_t> next{0}, n_joined{0};
};

template <class F> void share(int64_t n_items, int64_t n_threads, void* parallel, F work) {
  Team<F> team(n_items, work);
  n_threads = std::min(n_threads, n_items);
  if (n_threads <= 1) return team.run();
  if (parallel) return reinterpret_cast<Parallel>(parallel)(Team<F>::join, &team, unsigned(n_threads), 0);
  constexpr int64_t MOST = 256;
  std::thread others[MOST];
  int64_t n_others = 0;
  try {
    for (; n_others < std::min(n_threads, MOST) - 1; ++n_others) others[n_others] = std::thread(Team<F>::join, &team);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that are there do the work.
  }
  team.run();
  for (int64_t i = 0; i < n_others; ++i) others[i].join();
}

// What one thread works with: a chunk, and rows without gaps where a tensor has some.
template <class T> struct Bench {
  Chunk<T> chunk;
  Saved<T> saved;  // where the backward pass wants none
  T *keys, *query, *d_keys, *d_query, *d_read, *passing[2], *d_gates[4];

  Bench(const Sizes& s, Arena& arena, bool is_backward) : chunk(s, arena) {
    const int64_t rows = s.chunk, z = int64_t(s.levels) * s.key * s.value;
    keys = arena.take<T>(rows * s.key);
    query = arena.take<T>(rows * s.key);
    for (T*& each : passing) each = arena.take<T>(z);
    if (!is_backward) {
      saved = {arena.take<T>(rows * s.value), arena.take<T>(rows * s.columns<T>()), arena.take<T>(rows * s.columns<T>())};
      return;
    }
    d_keys = arena.take<T>(rows * s.key);
    d_query = arena.take<T>(rows * s.key);
    d_read = arena.take<T>(rows * s.value);
    for (T*& each : d_gates) each = arena.take<T>(rows);
  }
};

template <class T> class Form {
 public:
  explicit Form(const MeristemForm& form)
      : f(form),
        size{int(form.key), int(form.value), int(form.chunk), form.levels, Probe(form.probe), form.reads_before},
        n((form.time + form.chunk - 1) / form.chunk),
        square(form.chunk * size.columns<T>()),
        n_squares(form.probe == TOKEN ? 2 : 1),
        level(form.key * form.value),
        z(form.levels * level) {}

  int64_t scratch_bytes(bool is_backward) const {
    Arena arena(nullptr);
    Bench<T>(size, arena, is_backward);
    return up(arena.used, 4096);
  }

  void forward() const {
    const int64_t each = scratch_bytes(false);
    share(f.rows * f.heads, f.threads, f.parallel, [&](int64_t thread, int64_t item) {
      Arena arena(static_cast<char*>(f.scratch) + thread * each);
      forward(item, Bench<T>(size, arena, false));
    });
  }

  void backward() const {
    const int64_t each = scratch_bytes(true);
    share(f.rows * f.heads, f.threads, f.parallel, [&](int64_t thread, int64_t item) {
      Arena arena(static_cast<char*>(f.scratch) + thread * each);
      backward(item, Bench<T>(size, arena, true));
    });
  }

  // One head of one row.
  void forward(int64_t item, Bench<T> bench) const {
    const int64_t row = item / f.heads, head = item % f.heads;
    T* first = enters(item, 0, bench);
    std::memcpy(first, at<T>(f.memory, row, head), level * sizeof(T));
    if (f.levels == 2) std::memcpy(first + level, at<T>(f.moving, row, head), level * sizeof(T));
    for (int64_t m = 0; m < n; ++m) {
      const int64_t time = m * f.chunk;
      const int c = int(std::min(f.chunk, f.time - time));
      gates(bench, row, head, time, c);
      bench.chunk.forward(c, packed(f.keys, row, head, time, c, size.key, bench.keys),
                          packed(f.query, row, head, time, c, size.key, bench.query), at<T>(f.values, row, head, time),
                          f.values.time, enters(item, m, bench), leaves(item, m, bench), at<T>(f.read, row, head, time),
                          f.read.time, f.entered ? saved(item, m) : bench.saved);
    }
    const T* last = leaves(item, n - 1, bench);
    std::memcpy(at<T>(f.last, row, head), last, level * sizeof(T));
    if (f.levels == 2) std::memcpy(at<T>(f.last_moving, row, head), last + level, level * sizeof(T));
  }

  void backward(int64_t item, Bench<T> bench) const {
    const int64_t row = item / f.heads, head = item % f.heads;
    T *leaving = bench.passing[0], *entering = bench.passing[1];
    std::memcpy(leaving, at<T>(f.d_last, row, head), level * sizeof(T));
    if (f.levels == 2) std::memcpy(leaving + level, at<T>(f.d_last_moving, row, head), level * sizeof(T));
    for (int64_t m = n - 1; m >= 0; --m) {
      const int64_t time = m * f.chunk;
      const int c = int(std::min(f.chunk, f.time - time));
      gates(bench, row, head, time, c);
      T* const d_keys = f.d_keys.time == size.key ? at<T>(f.d_keys, row, head, time) : bench.d_keys;
      T* const d_query = f.d_query.time == size.key ? at<T>(f.d_query, row, head, time) : bench.d_query;
      bench.chunk.backward(
          c, packed(f.keys, row, head, time, c, size.key, bench.keys),
          packed(f.query, row, head, time, c, size.key, bench.query), entered(item, m), saved(item, m),
          packed(f.d_read, row, head, time, c, size.value, bench.d_read), leaving, entering,
          {d_keys, d_query, at<T>(f.d_values, row, head, time), f.d_values.time, bench.d_gates[0], bench.d_gates[1],
           bench.d_gates[2], bench.d_gates[3]});
      unpack(d_keys, f.d_keys, row, head, time, c, size.key);
      unpack(d_query, f.d_query, row, head, time, c, size.key);
      ungate(bench.d_gates[0], f.d_retain, row, head, time, c, &f.retain);
      if (f.levels == 2) ungate(bench.d_gates[1], f.d_momentum, row, head, time, c, &f.momentum);
      ungate(bench.d_gates[2], f.d_write, row, head, time, c);
      ungate(bench.d_gates[3], f.d_scale, row, head, time, c);
      std::swap(leaving, entering);
    }
    std::memcpy(at<T>(f.d_memory, row, head), leaving, level * sizeof(T));
    if (f.levels == 2) std::memcpy(at<T>(f.d_moving, row, head), leaving + level, level * sizeof(T));
  }
  Bench<T> bench(Arena& arena, bool is_backward) const { return Bench<T>(size, arena, is_backward); }

 private:
  const MeristemForm& f;
  const Sizes size;
  const int64_t n, square, n_squares, level, z;

  void gates(Bench<T>& bench, int64_t row, int64_t head, int64_t time, int c) const {
    gate(f.retain, row, head, time, c, bench.chunk.retain, LEAST_FACTOR);
    if (f.levels == 2) gate(f.momentum, row, head, time, c, bench.chunk.momentum, LEAST_FACTOR);
    gate(f.write, row, head, time, c, bench.chunk.write);
    gate(f.scale, row, head, time, c, bench.chunk.scale);
  }
  T* entered(int64_t item, int64_t m) const { return static_cast<T*>(f.entered) + (item * n + m) * z; }
  // Where nothing is kept, two places by turns.
  T* enters(int64_t item, int64_t m, Bench<T>& bench) const { return f.entered ? entered(item, m) : bench.passing[m % 2]; }
  T* leaves(int64_t item, int64_t m, Bench<T>& bench) const {
    return f.entered && m + 1 < n ? entered(item, m + 1) : bench.passing[(m + 1) % 2];
  }
  Saved<T> saved(int64_t item, int64_t m) const {
    const int64_t at = item * n + m;
    T* const products = static_cast<T*>(f.products) + at * n_squares * square;
    return {static_cast<T*>(f.new_values) + at * f.chunk * f.value, products + (n_squares - 1) * square, products};
  }
};

template <class F> void for_its_numbers(const MeristemForm& f, F call) {
  if (f.is_double) call(Form<double>(f));
  else call(Form<float>(f));
}

bool fits(const MeristemForm& f) {
  const int64_t lanes = VECTOR_BYTES / (f.is_double ? 8 : 4), most = 1 << 20;
  for (int64_t size : {f.rows, f.time, f.heads, f.key, f.value, f.chunk, f.threads})
    if (size < 1) return false;
  if (f.key % lanes || f.value % lanes || f.key > most || f.value > most || f.chunk > most) return false;
  return f.chunk <= f.time && (f.levels == 1 || f.levels == 2) && f.probe >= NEVER && f.probe <= TOKEN &&
         (f.reads_before == 0 || f.reads_before == 1);
}
int whole(const MeristemForm& f, bool is_backward, std::initializer_list<const void*> pointers) {
  if (!fits(f)) return BAD_SIZES;
  int fault = FINE;
  for_its_numbers(f, [&](auto form) {
    if (f.n_scratch_bytes < form.scratch_bytes(is_backward) * f.threads) fault = BAD_SIZES;
  });
  if (fault != FINE) return fault;
  for (const void* each : pointers)
    if (!each) return BAD_POINTERS;
  if ((f.entered || is_backward) && !(f.entered && f.new_values && f.products)) return BAD_POINTERS;
  return FINE;
}
}  // namespace

// Bytes that one thread needs of ``scratch``; all threads stand behind each other. 0 where the sizes do not fit.
MERISTEM_EXPORT int64_t meristem_form_scratch(const MeristemForm* form, int32_t is_backward) {
  int64_t bytes = 0;
  if (fits(*form)) for_its_numbers(*form, [&](auto run) { bytes = run.scratch_bytes(is_backward); });
  return bytes;
}

// read, last and last_moving from query, keys, values, the gates, memory and moving; and what is kept, where there is a place.
MERISTEM_EXPORT int meristem_form_forward(const MeristemForm* form) {
  const MeristemForm& f = *form;
  const bool moves = f.levels == 2;
  const int fault = whole(f, false, {f.query.at, f.keys.at, f.values.at, f.write.at, f.memory.at, f.last.at, f.read.at,
                                     f.scratch, moves ? f.momentum.at : form, moves ? f.moving.at : form,
                                     moves ? f.last_moving.at : form});
  if (fault == FINE) for_its_numbers(f, [](auto run) { run.forward(); });
  return fault;
}

// The gradients, from those of read, last and last_moving; those of gates are written where there is a place for them.
MERISTEM_EXPORT int meristem_form_backward(const MeristemForm* form) {
  const MeristemForm& f = *form;
  const bool moves = f.levels == 2;
  const int fault = whole(f, true, {f.query.at, f.keys.at, f.write.at, f.scratch, f.d_read.at, f.d_last.at,
                                    f.d_query.at, f.d_keys.at, f.d_values.at, f.d_memory.at, moves ? f.momentum.at : form,
                                    moves ? f.d_last_moving.at : form, moves ? f.d_moving.at : form});
  if (fault == FINE) for_its_numbers(f, [](auto run) { run.backward(); });
  return fault;
}

// ---- around the products of a training step (layers.hpp) ----

// How numbers are stored; what is computed of bfloat16 is float.
enum MeristemNumbers : int32_t { FLOAT32 = 0, FLOAT64 = 1, BFLOAT16 = 2 };

// Short convolution, SiLU and unit length. x: [rows, time, vectors heads width]; before: the inputs before the first, the same of
// ``taps`` - 1; weight: [vectors heads width, taps]. The first ``units`` vectors are made units. vector: what each becomes, or,
// in the backward pass, its gradient. d_weight: [rows, vectors heads width, taps].
// x, before, d_x and d_before (which may be null) are stored as ``numbers`` says, all else as it is computed.
struct MeristemVectors {
  int64_t rows, time, vectors, heads, width, taps, units, threads;
  int32_t numbers;
  const void *x, *before, *weight;
  MeristemView vector[3];
  void *d_x, *d_before, *d_weight, *parallel;
};

// Rows of ``width`` numbers, one after the other. As a norm (layers.hpp, Norm): gate and beside may be null; gain and d_gain are
// stored as they are computed, d_gain [blocks of BLOCK rows, width]. As SwiGLU: x and d_x have rows of twice the width.
struct MeristemRows {
  int64_t rows, width, threads;
  int32_t numbers;
  double eps;
  const void *x, *gate, *beside, *gain, *sent;
  void *out, *d_x, *d_gate, *d_gain, *parallel;
};

// Logits [rows, width] and the target of each row; a row whose target is ``ignored`` costs nothing. log_sum and nats: [rows], as
// they are computed. The gradient is that of ``weight`` times the sum of nats.
struct MeristemCrossEntropy {
  int64_t rows, width, ignored, threads;
  int32_t numbers;
  const void* logits;
  const int64_t* targets;
  void *log_sum, *nats;
  double weight;
  void *d_logits, *parallel;
};

// Rows that one thread takes at a time.
constexpr int64_t BLOCK = 64;
MERISTEM_EXPORT int64_t meristem_block_rows() { return BLOCK; }

namespace {
template <class F> int for_numbers(int32_t numbers, F call) {
  switch (numbers) {
    case FLOAT32: return call.template operator()<float, float>();
    case FLOAT64: return call.template operator()<double, double>();
    case BFLOAT16: return call.template operator()<float, Brain>();
    default: return BAD_SIZES;
  }
}

bool has_null(std::initializer_list<const void*> pointers) {
  for (const void* each : pointers) if (!each) return true;
  return false;
}

template <class F> int over_rows(int64_t rows, int64_t threads, void* parallel, F work) {
  share((rows + BLOCK - 1) / BLOCK, threads, parallel, [&](int64_t, int64_t block) {
    for (int64_t row = block * BLOCK; row < std::min(rows, (block + 1) * BLOCK); ++row) work(block, row);
  });
  return FINE;
}

template <class T> bool fits(const MeristemVectors& v) {
  if (v.width % LANES<T> || v.width > MOST_WIDTH || v.taps > MOST_TAPS || v.vectors > 3 || v.units > v.vectors) return false;
  for (int64_t size : {v.rows, v.time, v.vectors, v.heads, v.width, v.taps, v.threads}) if (size < 1) return false;
  return true;
}
bool has_no_inputs(const MeristemVectors& v) { return has_null({v.x, v.weight, v.taps > 1 ? v.before : v.x}); }

// One vector of one head of a row, with where its numbers stand.
template <class T, class S> struct Place {
  int64_t channels, first, row;
  const MeristemVectors& v;
  Place(const MeristemVectors& v, int64_t row, int64_t vector, int64_t head)
      : channels(v.vectors * v.heads * v.width), first((vector * v.heads + head) * v.width), row(row), v(v),
        strip(v.time, int(v.width), int(v.taps), vector < v.units, channels,
              static_cast<const S*>(v.x) + row * v.time * channels + first,
              static_cast<const S*>(v.before) + row * (v.taps - 1) * channels + first,
              static_cast<const T*>(v.weight) + first * v.taps) {}

  void forward(T* to, int64_t step) const { strip.forward(to, step); }
  void backward(const T* sent, int64_t step) const {
    S* const d_before = static_cast<S*>(v.d_before);
    strip.backward(sent, step, static_cast<S*>(v.d_x) + row * v.time * channels + first,
                   d_before ? d_before + row * (v.taps - 1) * channels + first : nullptr,
                   static_cast<T*>(v.d_weight) + (row * channels + first) * v.taps);
  }

 private:
  const Strip<T, S> strip;
};

// f(place, its view), each by one thread.
template <class T, class S, class F> int over_strips(const MeristemVectors& v, F f) {
  if (!fits<T>(v)) return BAD_SIZES;
  for (int64_t i = 0; i < v.vectors; ++i) if (!v.vector[i].at) return BAD_POINTERS;
  share(v.rows * v.vectors * v.heads, v.threads, v.parallel, [&](int64_t, int64_t item) {
    const int64_t head = item % v.heads, vector = item / v.heads % v.vectors, row = item / v.heads / v.vectors;
    f(Place<T, S>(v, row, vector, head), at<T>(v.vector[vector], row, head), v.vector[vector].time);
  });
  return FINE;
}
}  // namespace

MERISTEM_EXPORT int meristem_vectors_forward(const MeristemVectors* vectors) {
  const MeristemVectors& v = *vectors;
  if (has_no_inputs(v)) return BAD_POINTERS;
  return for_numbers(v.numbers, [&]<class T, class S>() {
    return over_strips<T, S>(v, [](const Place<T, S>& place, T* to, int64_t step) { place.forward(to, step); });
  });
}

MERISTEM_EXPORT int meristem_vectors_backward(const MeristemVectors* vectors) {
  const MeristemVectors& v = *vectors;
  if (has_no_inputs(v) || has_null({v.d_x, v.d_weight})) return BAD_POINTERS;
  return for_numbers(v.numbers, [&]<class T, class S>() {
    return over_strips<T, S>(v, [](const Place<T, S>& place, const T* sent, int64_t step) { place.backward(sent, step); });
  });
}

// ---- the write of a memory: vectors, gates and form as one (write.hpp) ----

// What is written is made of what is projected: vectors has the inputs of queries, keys and values, and where their gradients go, but
// no places for the vectors themselves; form has memory and momentum, what is read, and all that is kept, with query and keys among it
// ([row, head, time, key]; without a place they are not kept), and no gates. logits: what the gates are made of, [rows, time, gates,
// heads], of write rate, retain and momentum, as far as the rule has them; most: of each head, with momentum. d_logits is like logits,
// d_most [rows, heads]. slope and is_warm: how much of what is recalled a write takes away, and if retain scales it.
struct MeristemWrite {
  MeristemForm form;
  MeristemVectors vectors;
  const void *logits, *most;
  void *d_logits, *d_most;
  double slope, write_limit, curvature;
  int32_t is_warm, has_retain, has_retain_gate;
};

namespace {
// One head of one row, in a room of its own.
template <class T, class S> class WriteHead {
 public:
  WriteHead(const MeristemWrite& w, Arena& arena, bool is_backward)
      : w(w), f(w.form), gates(region(), f.time, f.heads, arena), sent(f.time, arena) {
    for (MeristemView* each : {&f.d_query, &f.d_keys, &f.d_values}) {
      if (is_backward) *each = apart(arena.take<T>(f.time * f.key), f.key);
    }
    if (!is_backward) {
      if (!f.query.at) f.query = apart(arena.take<T>(f.time * f.key), f.key);
      if (!f.keys.at) f.keys = apart(arena.take<T>(f.time * f.key), f.key);
      f.values = apart(arena.take<T>(f.time * f.value), f.value);
    }
    scale = arena.take<T>(f.time);
    d_scale = arena.take<T>(f.time);
    f.write = apart(gates.factors.write, 1);
    f.retain = w.has_retain ? apart(gates.factors.retain, 1) : MeristemView{};
    f.momentum = apart(gates.factors.momentum, 1);
    f.scale = is_scaled() ? apart(scale, 1) : MeristemView{};
    f.d_write = apart(sent.write, 1);
    f.d_retain = w.has_retain ? apart(sent.retain, 1) : MeristemView{};
    f.d_momentum = apart(sent.momentum, 1);
    f.d_scale = is_scaled() ? apart(d_scale, 1) : MeristemView{};
  }

  void forward(int64_t item, Arena& arena) const {
    const int64_t row = item / f.heads, head = item % f.heads;
    const MeristemView* const made[] = {&f.query, &f.keys, &f.values};
    for (int vector = 0; vector < 3; ++vector)
      Place<T, S>(w.vectors, row, vector, head).forward(at<T>(*made[vector], row, head), made[vector]->time);
    read_gates(row, head);
    const Form<T> form(f);
    form.forward(item, form.bench(arena, false));
  }
  void backward(int64_t item, Arena& arena) const {
    const int64_t row = item / f.heads, head = item % f.heads;
    read_gates(row, head);
    for (T* each : {sent.write, sent.retain, sent.momentum}) std::fill(each, each + up(f.time, LANES<T>), T(0));
    const Form<T> form(f);
    form.backward(item, form.bench(arena, true));
    for (int64_t t = 0; t < f.time && w.is_warm && is_scaled(); ++t) sent.retain[t] += T(w.slope) * d_scale[t];
    T* const d_logits = static_cast<T*>(w.d_logits) + row * f.time * f.heads * region().n_gates() + head;
    const T d_most = gates.backward(sent, most(head), d_logits);
    if (w.d_most) static_cast<T*>(w.d_most)[item] = d_most;
    const MeristemView* const back[] = {&f.d_query, &f.d_keys, &f.d_values};
    for (int vector = 0; vector < 3; ++vector)
      Place<T, S>(w.vectors, row, vector, head).backward(at<T>(*back[vector], row, head), back[vector]->time);
  }

 private:
  const MeristemWrite& w;
  MeristemForm f;
  HeadGates<T> gates;
  GateRows<T> sent;
  T *scale, *d_scale;

  // Of one head alone: the same place for each.
  static MeristemView apart(T* at, int64_t width) { return {at, 0, width, 0}; }
  Region region() const { return {w.write_limit, w.curvature, w.has_retain, w.has_retain_gate, w.form.levels == 2}; }
  bool is_scaled() const { return w.form.probe != NEVER && (w.is_warm || w.slope != 1); }
  T most(int64_t head) const { return w.most ? static_cast<const T*>(w.most)[head] : T(0); }
  void read_gates(int64_t row, int64_t head) const {
    gates.forward(static_cast<const T*>(w.logits) + row * f.time * f.heads * region().n_gates() + head, most(head));
    for (int64_t t = 0; t < f.time && is_scaled(); ++t)
      scale[t] = w.is_warm ? T(w.slope) * gates.factors.retain[t] : T(w.slope);
  }
};

template <class T, class S> int64_t scratch_of(const MeristemWrite& w, bool is_backward) {
  Arena arena(nullptr);
  WriteHead<T, S>(w, arena, is_backward);
  return up(arena.used, 64) + Form<T>(w.form).scratch_bytes(is_backward);
}
bool fits(const MeristemWrite& w) {
  const MeristemForm& f = w.form;
  const MeristemVectors& v = w.vectors;
  const bool is_alike = f.rows == v.rows && f.time == v.time && f.heads == v.heads && f.key == v.width && f.value == v.width;
  return is_alike && v.vectors == 3 && (v.numbers == FLOAT64) == (f.is_double != 0) && fits(f);
}
int over_heads(const MeristemWrite& w, bool is_backward) {
  if (!fits(w)) return BAD_SIZES;
  const MeristemForm& f = w.form;
  const bool moves = f.levels == 2, keeps = f.entered || is_backward;
  if (has_no_inputs(w.vectors) || has_null({w.logits, f.scratch, moves ? w.most : &w})) return BAD_POINTERS;
  if (keeps && has_null({f.entered, f.new_values, f.products, f.query.at, f.keys.at})) return BAD_POINTERS;
  return for_numbers(w.vectors.numbers, [&]<class T, class S>() -> int {
    if (!fits<T>(w.vectors)) return BAD_SIZES;
    const int64_t each = scratch_of<T, S>(w, is_backward);
    if (f.n_scratch_bytes < each * f.threads) return BAD_SIZES;
    share(f.rows * f.heads, f.threads, f.parallel, [&](int64_t thread, int64_t item) {
      Arena arena(static_cast<char*>(f.scratch) + thread * each);
      const WriteHead<T, S> head(w, arena, is_backward);
      if (is_backward) head.backward(item, arena);
      else head.forward(item, arena);
    });
    return FINE;
  });
}
}  // namespace

// Bytes that one thread needs of the form's ``scratch``; 0 where the sizes do not fit.
MERISTEM_EXPORT int64_t meristem_write_scratch(const MeristemWrite* write, int32_t is_backward) {
  int64_t bytes = 0;
  if (!fits(*write)) return 0;
  for_numbers(write->vectors.numbers, [&]<class T, class S>() -> int {
    if (fits<T>(write->vectors)) bytes = scratch_of<T, S>(*write, is_backward);
    return FINE;
  });
  return bytes;
}

// As meristem_form_forward, from what is projected.
MERISTEM_EXPORT int meristem_write_forward(const MeristemWrite* write) {
  const MeristemForm& f = write->form;
  const bool moves = f.levels == 2;
  if (has_null({f.memory.at, f.last.at, f.read.at, moves ? f.moving.at : &f, moves ? f.last_moving.at : &f})) return BAD_POINTERS;
  return over_heads(*write, false);
}

// The gradients of what is projected, of the weights of the convolution, logits, most, memory and momentum.
MERISTEM_EXPORT int meristem_write_backward(const MeristemWrite* write) {
  const MeristemForm& f = write->form;
  const MeristemVectors& v = write->vectors;
  const bool moves = f.levels == 2;
  if (has_null({f.d_read.at, f.d_last.at, f.d_memory.at, v.d_x, v.d_weight, write->d_logits})) return BAD_POINTERS;
  if (moves && has_null({f.d_last_moving.at, f.d_moving.at, write->d_most})) return BAD_POINTERS;
  return over_heads(*write, true);
}

namespace {
template <class T, class S> Norm<T, S> norm_of(const MeristemRows& r) {
  return {int(r.width), T(r.eps), static_cast<const S*>(r.x), static_cast<const S*>(r.gate), static_cast<const S*>(r.beside),
          static_cast<const T*>(r.gain)};
}
template <class T> bool fits(const MeristemRows& r) {
  return r.rows > 0 && r.width > 0 && r.width < 1 << 30 && r.width % LANES<T> == 0 && r.threads > 0;
}
}  // namespace

MERISTEM_EXPORT int meristem_norm_forward(const MeristemRows* rows) {
  const MeristemRows& r = *rows;
  if (has_null({r.x, r.gain, r.out})) return BAD_POINTERS;
  return for_numbers(r.numbers, [&]<class T, class S>() -> int {
    if (!fits<T>(r)) return BAD_SIZES;
    const Norm<T, S> norm = norm_of<T, S>(r);
    return over_rows(r.rows, r.threads, r.parallel, [&](int64_t, int64_t row) { norm.forward(row, static_cast<S*>(r.out)); });
  });
}

MERISTEM_EXPORT int meristem_norm_backward(const MeristemRows* rows) {
  const MeristemRows& r = *rows;
  if (has_null({r.x, r.gain, r.sent, r.d_x, r.d_gain, r.gate ? r.d_gate : r.x})) return BAD_POINTERS;
  return for_numbers(r.numbers, [&]<class T, class S>() -> int {
    if (!fits<T>(r)) return BAD_SIZES;
    const Norm<T, S> norm = norm_of<T, S>(r);
    return over_rows(r.rows, r.threads, r.parallel, [&](int64_t block, int64_t row) {
      T* const d_gain = static_cast<T*>(r.d_gain) + block * r.width;
      if (row == block * BLOCK) std::fill(d_gain, d_gain + r.width, T(0));
      norm.backward(row, static_cast<const S*>(r.sent), static_cast<S*>(r.d_x), static_cast<S*>(r.d_gate), d_gain);
    });
  });
}

MERISTEM_EXPORT int meristem_swiglu_forward(const MeristemRows* rows) {
  const MeristemRows& r = *rows;
  if (has_null({r.x, r.out})) return BAD_POINTERS;
  return for_numbers(r.numbers, [&]<class T, class S>() -> int {
    if (!fits<T>(r)) return BAD_SIZES;
    return over_rows(r.rows, r.threads, r.parallel, [&](int64_t, int64_t row) {
      swiglu<T>(static_cast<const S*>(r.x) + row * 2 * r.width, r.width, static_cast<S*>(r.out) + row * r.width);
    });
  });
}

MERISTEM_EXPORT int meristem_swiglu_backward(const MeristemRows* rows) {
  const MeristemRows& r = *rows;
  if (has_null({r.x, r.sent, r.d_x})) return BAD_POINTERS;
  return for_numbers(r.numbers, [&]<class T, class S>() -> int {
    if (!fits<T>(r)) return BAD_SIZES;
    return over_rows(r.rows, r.threads, r.parallel, [&](int64_t, int64_t row) {
      swiglu_back<T>(static_cast<const S*>(r.x) + row * 2 * r.width, r.width, static_cast<const S*>(r.sent) + row * r.width,
                     static_cast<S*>(r.d_x) + row * 2 * r.width);
    });
  });
}

namespace {
// Also where a target is no logit's.
bool is_bad(const MeristemCrossEntropy& c) {
  if (c.rows < 1 || c.width < 1 || c.threads < 1) return true;
  for (int64_t row = 0; row < c.rows; ++row)
    if (c.targets[row] != c.ignored && (c.targets[row] < 0 || c.targets[row] >= c.width)) return true;
  return false;
}
}  // namespace

MERISTEM_EXPORT int meristem_cross_entropy_forward(const MeristemCrossEntropy* given) {
  const MeristemCrossEntropy& c = *given;
  if (has_null({c.logits, c.targets, c.log_sum, c.nats})) return BAD_POINTERS;
  if (is_bad(c)) return BAD_SIZES;
  return for_numbers(c.numbers, [&]<class T, class S>() {
    return over_rows(c.rows, c.threads, c.parallel, [&](int64_t, int64_t row) {
      const S* const logits = static_cast<const S*>(c.logits) + row * c.width;
      const int64_t target = c.targets[row];
      T &log_sum = static_cast<T*>(c.log_sum)[row], &nats = static_cast<T*>(c.nats)[row];
      log_sum = nats = 0;
      if (target == c.ignored) return;
      log_sum = meristem::log_sum<T>(logits, c.width);
      nats = log_sum - take_one<T>(logits + target);
    });
  });
}

MERISTEM_EXPORT int meristem_cross_entropy_backward(const MeristemCrossEntropy* given) {
  const MeristemCrossEntropy& c = *given;
  if (has_null({c.logits, c.targets, c.log_sum, c.d_logits})) return BAD_POINTERS;
  if (is_bad(c)) return BAD_SIZES;
  return for_numbers(c.numbers, [&]<class T, class S>() {
    return over_rows(c.rows, c.threads, c.parallel, [&](int64_t, int64_t row) {
      const int64_t target = c.targets[row];
      S* const d_logits = static_cast<S*>(c.d_logits) + row * c.width;
      if (target == c.ignored) return std::fill(d_logits, d_logits + c.width, S{});
      softmax_back<T>(static_cast<const S*>(c.logits) + row * c.width, c.width, target, static_cast<const T*>(c.log_sum)[row],
                      T(c.weight), d_logits);
    });
  });
}

// Attention over a sliding window (attention.hpp). vectors: queries, keys and values as they are projected, [rows, time, 3, heads,
// width]; past_keys, past_values: those before, [rows, past, heads, width], null where past is 0; mixed: [rows, time, heads,
// width]; all stored as ``numbers`` says. cosine, sine: [past + time, width / 2], or null; kept: the weights, [rows, heads, blocks,
// block, columns], null where no backward pass follows, as computed. d_past_keys and d_past_values may be null.
struct MeristemWindow {
  int64_t rows, time, past, heads, width, span, threads;
  int32_t numbers;
  const void *vectors, *past_keys, *past_values, *cosine, *sine;
  void *kept, *mixed;
  const void* sent;
  void *d_vectors, *d_past_keys, *d_past_values, *scratch;
  int64_t n_scratch_bytes;
  void* parallel;
};

namespace {
WindowSizes sizes_of(const MeristemWindow& w) { return {w.time, w.past, int(w.heads), int(w.width), w.span}; }

template <class T> bool fits(const MeristemWindow& w) {
  const int64_t most = 1 << 24;
  for (int64_t size : {w.rows, w.time, w.heads, w.width, w.span, w.threads}) if (size < 1) return false;
  return w.past >= 0 && w.width % LANES<T> == 0 && w.width <= most && w.heads <= most && w.time <= most && w.past <= most;
}
template <class T, class S> int64_t scratch_of(const MeristemWindow& w, bool is_backward) {
  Arena arena(nullptr);
  WindowHead<T, S>(sizes_of(w), nullptr, nullptr, arena, is_backward);
  return up(arena.used, 4096);
}
template <class T, class S, class F> int over_heads(const MeristemWindow& w, bool is_backward, F f) {
  if (!fits<T>(w) || w.n_scratch_bytes < scratch_of<T, S>(w, is_backward) * w.threads) return BAD_SIZES;
  if (has_null({w.vectors, w.scratch, w.past ? w.past_keys : &w, w.past ? w.past_values : &w})) return BAD_POINTERS;
  if ((w.cosine == nullptr) != (w.sine == nullptr)) return BAD_POINTERS;
  const int64_t each = scratch_of<T, S>(w, is_backward), near = w.heads * w.width;
  share(w.rows * w.heads, w.threads, w.parallel, [&](int64_t thread, int64_t item) {
    Arena arena(static_cast<char*>(w.scratch) + thread * each);
    WindowHead<T, S> head(sizes_of(w), static_cast<const T*>(w.cosine), static_cast<const T*>(w.sine), arena, is_backward);
    const int64_t row = item / w.heads, first = item % w.heads * w.width, before = row * w.past * near + first;
    const auto past = [&](const void* x) { return x ? static_cast<const S*>(x) + before : nullptr; };
    head.read(static_cast<const S*>(w.vectors) + row * w.time * 3 * near + first, past(w.past_keys), past(w.past_values));
    f(head, item, row * w.time * near + first, before);
  });
  return FINE;
}
// Of the weights of a head that are kept.
template <class T> int64_t kept_of(const MeristemWindow& w) {
  const WindowSizes s = sizes_of(w);
  return s.blocks() * s.block() * s.columns<T>();
}
}  // namespace

// Bytes that one thread needs of ``scratch``, and numbers of ``kept`` for each head of each row; 0 where the sizes do not fit.
MERISTEM_EXPORT int64_t meristem_window_scratch(const MeristemWindow* window, int32_t is_backward) {
  int64_t bytes = 0;
  for_numbers(window->numbers, [&]<class T, class S>() -> int {
    if (fits<T>(*window)) bytes = scratch_of<T, S>(*window, is_backward);
    return FINE;
  });
  return bytes;
}
MERISTEM_EXPORT int64_t meristem_window_kept(const MeristemWindow* window) {
  int64_t n = 0;
  for_numbers(window->numbers, [&]<class T, class S>() -> int {
    if (fits<T>(*window)) n = kept_of<T>(*window);
    return FINE;
  });
  return n;
}

MERISTEM_EXPORT int meristem_window_forward(const MeristemWindow* window) {
  const MeristemWindow& w = *window;
  if (!w.mixed) return BAD_POINTERS;
  return for_numbers(w.numbers, [&]<class T, class S>() {
    return over_heads<T, S>(w, false, [&](WindowHead<T, S>& head, int64_t item, int64_t at, int64_t) {
      head.forward(static_cast<S*>(w.mixed) + at, w.kept ? static_cast<T*>(w.kept) + item * kept_of<T>(w) : nullptr);
    });
  });
}

MERISTEM_EXPORT int meristem_window_backward(const MeristemWindow* window) {
  const MeristemWindow& w = *window;
  if (has_null({w.kept, w.sent, w.d_vectors})) return BAD_POINTERS;
  if ((w.d_past_keys == nullptr) != (w.d_past_values == nullptr)) return BAD_POINTERS;
  return for_numbers(w.numbers, [&]<class T, class S>() {
    return over_heads<T, S>(w, true, [&](WindowHead<T, S>& head, int64_t item, int64_t at, int64_t before) {
      const int64_t near = w.heads * w.width, row = item / w.heads, first = item % w.heads * w.width;
      const auto past = [&](void* x) { return x ? static_cast<S*>(x) + before : nullptr; };
      head.backward(static_cast<const S*>(w.sent) + at, static_cast<const T*>(w.kept) + item * kept_of<T>(w),
                    static_cast<S*>(w.d_vectors) + row * w.time * 3 * near + first, past(w.d_past_keys), past(w.d_past_values));
    });
  });
}

namespace {
// Readers side by side in parts, each read by one thread: a thread is not worth waking for fewer than LEAST, and a product
// takes eight rows at once.
struct Parts {
  static constexpr int64_t LEAST = 8;
  int64_t each, n;
  Parts(int64_t rows, int64_t threads) {
    const int64_t share = (rows + std::max<int64_t>(threads, 1) - 1) / std::max<int64_t>(threads, 1);
    each = std::min(rows, (share + LEAST - 1) / LEAST * LEAST);
    n = each ? (rows + each - 1) / each : 0;
  }
};

// ``work(first, rows, room)`` for every part. Gives 1, and has done nothing, where a token is none of the vocabulary.
template <class T, class F>
int over_readers(const decoding::Decoder<T>& decoder, int64_t rows, const int64_t* tokens, T* room, int64_t threads, void* parallel, F work) {
  if (!decoder.are_known(int(rows), tokens)) return 1;
  const Parts parts(rows, threads);
  share(parts.n, threads, parallel, [&](int64_t, int64_t part) {
    const int64_t first = part * parts.each;
    work(first, int(std::min(parts.each, rows - first)), room + part * decoder.room_size(parts.each));
  });
  return 0;
}
}  // namespace

// One token of a whole model (decode.hpp), in float32 and in float64. A decoder never changes and may serve several threads,
// each with readers and room of its own; sizes are in numbers, the room's for so many threads as a step is then given.
// ``open`` gives null where there is no memory for the weights; ``step`` gives 1, and has done nothing, where a token is none of
// the vocabulary. ``hidden`` is the same without the head, or without the last feed-forward layer and all behind it, into
// [rows, width].
#define MERISTEM_DECODER(NAME, T) \
  MERISTEM_EXPORT void* meristem_decoder_open_##NAME( \
      const meristem::decoding::ModelShape* model, const meristem::decoding::LayerShape* shapes, \
      const meristem::decoding::ModelWeights<T>* ends, const meristem::decoding::LayerWeights<T>* layers) { \
    try { \
      return new meristem::decoding::Decoder<T>(*model, shapes, *ends, layers, meristem::decoding::hope_parts<T>); \
    } catch (const std::bad_alloc&) { \
      return nullptr; \
    } \
  } \
  MERISTEM_EXPORT void meristem_decoder_close_##NAME(meristem::decoding::Decoder<T>* decoder) { delete decoder; } \
  MERISTEM_EXPORT int64_t meristem_decoder_block_##NAME(const meristem::decoding::Decoder<T>* decoder) { \
    return decoder->block_size(); \
  } \
  MERISTEM_EXPORT int64_t meristem_decoder_logits_##NAME(const meristem::decoding::Decoder<T>* decoder) { \
    return decoder->logits_stride(); \
  } \
  MERISTEM_EXPORT int64_t meristem_decoder_room_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t rows, \
                                                       int64_t threads) { \
    const Parts parts(rows, threads); \
    return parts.n * decoder->room_size(parts.each); \
  } \
  MERISTEM_EXPORT void meristem_decoder_place_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t layer, \
                                                     meristem::decoding::Place* place) { \
    *place = decoder->place(layer); \
  } \
  MERISTEM_EXPORT int meristem_decoder_step_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t rows, \
                                                   const int64_t* tokens, T* const* blocks, int64_t* n_read, T* logits, \
                                                   T* room, int64_t threads, void* parallel) { \
    return over_readers(*decoder, rows, tokens, room, threads, parallel, [&](int64_t first, int n, T* own) { \
      decoder->step(n, tokens + first, blocks + first, n_read + first, logits + first * decoder->logits_stride(), own); \
    }); \
  } \
  MERISTEM_EXPORT int meristem_decoder_hidden_##NAME(const meristem::decoding::Decoder<T>* decoder, int64_t rows, \
                                                     const int64_t* tokens, T* const* blocks, int64_t* n_read, T* hidden, \
                                                     T* room, int64_t threads, void* parallel, int32_t is_mlp_left) { \
    using Decoder = meristem::decoding::Decoder<T>; \
    const auto left = is_mlp_left ? Decoder::MLP_IS_LEFT : Decoder::HEAD_IS_LEFT; \
    return over_readers(*decoder, rows, tokens, room, threads, parallel, [&](int64_t first, int n, T* own) { \
      decoder->read(n, tokens + first, blocks + first, n_read + first, hidden + first * decoder->width(), own, left); \
    }); \
  }
MERISTEM_DECODER(f32, float)
MERISTEM_DECODER(f64, double)

// One id for each row of logits, rows ``stride`` numbers apart (draw.hpp).
MERISTEM_EXPORT void meristem_draw(int64_t rows, int64_t n, int64_t stride, const float* logits, const float* temperatures,
                                   const double* uniforms, int64_t* ids) {
  for (int64_t r = 0; r < rows; ++r)
    ids[r] = meristem::drawing::drawn(logits + r * stride, n, temperatures[r], uniforms[r]);
}
