// Steps of random small models under sanitizers: every mixer, combination and kind of rule, odd sizes, any number of rows,
// rings that wrap, numbers that are none, one to three threads. Every buffer is exactly as large as the interface says, on the
// heap of its own.
#pragma once

namespace decoders {
using namespace meristem::decoding;

std::mt19937_64 draw;
int64_t any(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(draw); }

template <class T> struct Held {
  std::vector<std::unique_ptr<T[]>> all;
  const T* of(int64_t n) {
    all.emplace_back(new T[size_t(n)]);
    std::normal_distribution<double> normal(0, any(0, 9) ? 0.3 : 100.0);
    for (int64_t i = 0; i < n; ++i) all.back()[i] = any(0, 9999) ? T(normal(draw)) : T(NAN);
    return all.back().get();
  }
};


template <class T> LayerWeights<T> weights_of(const LayerShape& s, int64_t d, Held<T>& held) {
  LayerWeights<T> w{};
  const int64_t f = s.hidden, n = s.mlp == LEVELS ? s.hope.n_levels : 1;
  w.mixer_norm = held.of(d); w.mlp_norm = held.of(n * d);
  w.up = held.of((s.mlp == SWIGLU ? 2 : 1) * n * f * d); w.down = held.of(n * d * f);
  if (s.mlp != SWIGLU) { w.up_bias = held.of(n * f); w.down_bias = held.of(n * d); }
  if (s.hope.is_mixed) w.shares = held.of(n);
  if (s.hope.is_pooled) {
    T* periods = new T[size_t(n)];
    held.all.emplace_back(periods);
    for (int64_t i = 0; i < n; ++i) periods[i] = T(1 + i * any(1, 9));
    w.periods = periods;
  }
  if (s.mixer == SELF_REFERENCE) {
    const int64_t k = d / s.memory_heads;
    w.conv = held.of(d * s.taps); w.gate_bias = held.of(2 * s.memory_heads); w.memory_norm = held.of(k);
    w.open = held.of(d * d); w.open_bias = held.of(d); w.memory_out = held.of(d * d);
    if (!s.hope.is_asking) w.query = held.of(d * d);
    if (s.hope.is_static) w.first_makers = held.of(d * s.hope.n_makers * k);
    return w;
  }
  if (s.mixer != MEMORY) {
    w.attention = held.of(3 * d * d); w.attention_out = held.of(d * d);
    if (s.n_pinned) { w.pinned_keys = held.of(s.n_pinned * d); w.pinned_values = held.of(s.n_pinned * d); }
  }
  if (s.mixer == ATTENTION) return w;
  const int64_t gates = (1 + s.has_retain_gate + s.has_momentum) * s.memory_heads, head = d / s.memory_heads;
  w.memory = held.of(3 * d * d); w.conv = held.of(3 * d * s.taps); w.gates = held.of(gates * d); w.gate_bias = held.of(gates);
  if (s.has_momentum) w.most_momentum = held.of(s.memory_heads);
  const bool is_gate = s.mixer == GATE;
  if (!is_gate) { w.memory_norm = held.of(head); w.open = held.of(d * d); w.open_bias = held.of(d); w.memory_out = held.of(d * d); }
  if (!is_gate || s.combine == SIGMOID) return w;
  w.memory_norm = held.of(s.combine == ADDITIVE ? head : d);
  w.open_bias = held.of(d);
  if (s.combine == NORMALISED || s.combine == PROJECTED) w.attention_norm = held.of(d);
  if (s.combine == PROJECTED || s.combine == ADDITIVE) w.open = held.of(d * d);
  return w;
}

LayerShape layer_of(int64_t d, int64_t heads, int64_t memory_heads) {
  LayerShape s{};
  s.mixer = any(0, 4); s.combine = any(0, 4); s.is_residual = any(0, 1); s.mlp = any(0, 2); s.hidden = any(1, 70);
  if (s.mlp == LEVELS) { s.hope.n_levels = any(1, 3); s.hope.is_mixed = any(0, 1); s.hope.is_pooled = s.hope.n_levels > 1 && any(0, 1); s.hope.is_slowest_first = any(0, 1); }
  if (s.mixer == SELF_REFERENCE) {
    s.memory_heads = memory_heads; s.taps = any(1, 5); s.is_writing = any(0, 7) > 0;
    s.hope.is_asking = any(0, 1); s.hope.n_makers = 4 + s.hope.is_asking; s.hope.chunk_makers = any(1, 9); s.hope.chunk_memory = any(1, 9);
    s.hope.is_static = any(0, 1); s.hope.is_generated = any(0, 1); s.hope.is_squared = any(0, 1); s.hope.has_unit_value = any(0, 1);
    s.hope.eta_scale = 0.5;
    return s;
  }
  if (s.mixer != MEMORY) { s.attention_heads = heads; s.span = any(1, 40); s.is_rotated = d / heads % 2 ? 0 : any(0, 1); s.n_pinned = any(0, 3) * any(0, 7); }
  if (s.mixer == ATTENTION) return s;
  s.memory_heads = memory_heads; s.taps = any(1, 5); s.is_writing = any(0, 7) > 0;
  s.slope = double(any(0, 2)); s.write_limit = 1; s.curvature = double(any(0, 2)) / 2;
  s.is_warm = any(0, 1); s.is_proximal = any(0, 1); s.reads_before = any(0, 1); s.has_momentum = any(0, 1);
  s.is_coasting = s.has_momentum && any(0, 1); s.is_scaled = s.has_momentum && any(0, 1);
  s.has_retain_gate = any(0, 1); s.has_retain = s.has_retain_gate || any(0, 1);
  return s;
}

// What Python calls, for one kind of number.
template <class T> struct Interface;
template <> struct Interface<float> {
  decltype(&meristem_decoder_room_f32) room = meristem_decoder_room_f32;
  decltype(&meristem_decoder_step_f32) step = meristem_decoder_step_f32;
  decltype(&meristem_decoder_hidden_f32) hidden = meristem_decoder_hidden_f32;
};
template <> struct Interface<double> {
  decltype(&meristem_decoder_room_f64) room = meristem_decoder_room_f64;
  decltype(&meristem_decoder_step_f64) step = meristem_decoder_step_f64;
  decltype(&meristem_decoder_hidden_f64) hidden = meristem_decoder_hidden_f64;
};

template <class T> int64_t run() {
  const int64_t heads = any(1, 3), memory_heads = any(1, 3), d = heads * memory_heads * any(1, 13), n_layers = any(1, 3);
  const ModelShape model{d, any(1, 80), n_layers, 1e-6};
  Held<T> held;
  std::vector<LayerShape> shapes;
  std::vector<LayerWeights<T>> layers;
  for (int64_t i = 0; i < n_layers; ++i) {
    shapes.push_back(layer_of(d, heads, memory_heads));
    layers.push_back(weights_of(shapes.back(), d, held));
  }
  const ModelWeights<T> ends{held.of(model.vocabulary * d), held.of(d), held.of(model.vocabulary * d)};
  const Decoder<T> decoder(model, shapes.data(), ends, layers.data(), hope_parts<T>);
  held.all.clear();  // what it needs is packed
  const int64_t rows = any(1, 20), threads = any(1, 3);
  std::vector<std::unique_ptr<T[]>> blocks;
  std::vector<T*> pointers;
  std::vector<int64_t> n_read, tokens(rows);
  for (int64_t r = 0; r < rows; ++r) {
    blocks.emplace_back(new T[size_t(decoder.block_size())]());
    pointers.push_back(blocks.back().get());
    n_read.push_back(any(0, 100));
  }
  const Interface<T> call;
  std::unique_ptr<T[]> room(new T[size_t(call.room(&decoder, rows, threads))]);
  std::unique_ptr<T[]> logits(new T[size_t(rows * decoder.logits_stride())]), hidden(new T[size_t(rows * model.width)]);
  const auto step = [&] {
    return !call.step(&decoder, rows, tokens.data(), pointers.data(), n_read.data(), logits.get(), room.get(), threads, nullptr);
  };
  int64_t done = 0;
  for (int i = 0; i < 45; ++i) {
    for (int64_t& token : tokens) token = any(0, model.vocabulary - 1);
    done += step();
    const int is_mlp_left = int(any(0, 1));
    done += !call.hidden(&decoder, rows, tokens.data(), pointers.data(), n_read.data(), hidden.get(), room.get(), threads, nullptr,
                         is_mlp_left);
  }
  tokens.back() = any(0, 1) ? model.vocabulary : -1;
  return done - step();
}

// Draws from rows of any size and distance, some of whose numbers are none or infinite: an id of the vocabulary that is not
// -inf, or -1.
int draws() {
  const int64_t rows = any(1, 5), n = any(1, 200), stride = n + any(0, 3);
  std::unique_ptr<float[]> logits(new float[size_t((rows - 1) * stride + n)]), temperatures(new float[size_t(rows)]);
  std::unique_ptr<double[]> uniforms(new double[size_t(rows)]);
  std::unique_ptr<int64_t[]> ids(new int64_t[size_t(rows)]);
  const float odd[] = {NAN, INFINITY, -INFINITY, -INFINITY, 3e38f, -3e38f, 0};
  std::normal_distribution<float> normal(0, any(0, 1) ? 3.0f : 1e30f);
  for (int64_t i = 0; i < (rows - 1) * stride + n; ++i) logits[i] = any(0, 99) ? normal(draw) : odd[any(2, 6) - 2 * !any(0, 9)];
  const float warmth[] = {0, 1.2e-38f, 1e-3f, 1, 3.4e38f};
  for (int64_t r = 0; r < rows; ++r) {
    temperatures[r] = warmth[any(0, 4)];
    uniforms[r] = any(0, 3) ? std::uniform_real_distribution<double>(0, 1)(draw) : any(0, 1) ? 0 : 1 - 0x1p-53;
  }
  meristem_draw(rows, n, stride, logits.get(), temperatures.get(), uniforms.get(), ids.get());
  for (int64_t r = 0; r < rows; ++r)
    if (ids[r] < -1 || ids[r] >= n || (ids[r] >= 0 && std::isinf(logits[r * stride + ids[r]]))) return 0;
  return 1;
}

int drive(unsigned seed, int n_models) {
  draw.seed(seed);
  int64_t done = 0;
  for (int64_t i = 0; i < n_models; ++i) done += any(0, 1) ? run<float>() : run<double>();
  int64_t drawn = 0;
  for (int64_t i = 0; i < 20 * n_models; ++i) drawn += draws();
  std::printf("%lld steps of %d models, %lld draws\n", static_cast<long long>(done), n_models, static_cast<long long>(drawn));
  return done == 90 * n_models && drawn == 20 * n_models ? 0 : 1;
}
}  // namespace decoders
