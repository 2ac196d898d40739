// What meristem.h promises: a model and one reader of it, from files that are not trusted. One file, compiled once for each
// processor, and for WebAssembly; decode.hpp computes.
#include "meristem.h"

#include <cstdio>
#include <initializer_list>
#include <new>

#include "elementary.hpp"
#include "container.hpp"
#include "decode.hpp"
#include "learn.hpp"

using namespace meristem::container;
using namespace meristem::decoding;
using meristem::learning::Learned;
using meristem::learning::Learner;
using meristem::learning::Learning;

namespace {

constexpr char SCHEMA[] = "meristem.edge/1";
// Of session files, as src/meristem/checkpoint/migrate.py counts them.
constexpr int64_t SESSION = 2, STATE = 2;
constexpr int64_t MOST_NUMBERS = int64_t(1) << 28;  // of what a reader carries, and of any table
constexpr int64_t MOST_CHUNK = 1 << 14;
constexpr const char* KINDS[] = {"head", "last_mlp"};
constexpr const char* SCALARS[] = {"rate_b", "balance_b", "saved_b", "mean_nats_b", "steps_b"};
constexpr const char* CHANGES[2][2] = {{"head_bod"}, {"up_bfd", "out_bdf"}};

#if defined(__wasm__)
char said[512];
#else
thread_local char said[512];
#endif

// A code and its sentence, of up to four pieces.
meristem_code fail(meristem_code code, Span a, Span b = {}, Span c = {}, Span d = {}) {
  size_t at = 0;
  for (const Span& piece : {a, b, c, d})
    for (int64_t i = 0; i < piece.size && at + 1 < sizeof said; ++i) {
      const unsigned char x = static_cast<unsigned char>(piece.at[i]);
      said[at++] = x < 0x20 || x == 0x7f ? '?' : char(x);
    }
  said[at] = 0;
  return code;
}
Span words(const char* s) { return {s, int64_t(std::strlen(s))}; }

constexpr struct { const char* name; int64_t LayerShape::*place; int64_t least, most; } COUNTS[] = {
    {"mixer", &LayerShape::mixer, 0, MEMORY},
    {"combine", &LayerShape::combine, 0, ADDITIVE},
    {"is_residual", &LayerShape::is_residual, 0, 1},
    {"mlp", &LayerShape::mlp, 0, GELU},
    {"hidden", &LayerShape::hidden, 1, 1 << 18},
    {"attention_heads", &LayerShape::attention_heads, 0, 1 << 14},
    {"span", &LayerShape::span, 0, 1 << 16},
    {"is_rotated", &LayerShape::is_rotated, 0, 1},
    {"n_pinned", &LayerShape::n_pinned, 0, 1 << 12},
    {"memory_heads", &LayerShape::memory_heads, 0, 1 << 14},
    {"taps", &LayerShape::taps, 0, 64},
    {"is_writing", &LayerShape::is_writing, 0, 1},
    {"is_warm", &LayerShape::is_warm, 0, 1},
    {"is_proximal", &LayerShape::is_proximal, 0, 1},
    {"reads_before", &LayerShape::reads_before, 0, 1},
    {"has_momentum", &LayerShape::has_momentum, 0, 1},
    {"is_coasting", &LayerShape::is_coasting, 0, 1},
    {"is_scaled", &LayerShape::is_scaled, 0, 1},
    {"has_retain", &LayerShape::has_retain, 0, 1},
    {"has_retain_gate", &LayerShape::has_retain_gate, 0, 1},
};
constexpr struct { const char* name; double LayerShape::*place; } MEASURES[] = {
    {"slope", &LayerShape::slope}, {"write_limit", &LayerShape::write_limit}, {"curvature", &LayerShape::curvature}};

bool attends(const LayerShape& s) { return s.mixer != MEMORY; }
bool remembers(const LayerShape& s) { return s.mixer != ATTENTION; }

// Why a layer is none that decode.hpp computes; null where it is one.
const char* refused(const ModelShape& m, const LayerShape& s) {
  if (attends(s)) {
    if (s.attention_heads < 1 || m.width % s.attention_heads) return "its attention heads do not divide its width";
    if (s.is_rotated && m.width / s.attention_heads % 2) return "its attention heads have an odd width";
    if (s.span < 1) return "its attention has no span";
  }
  if (remembers(s)) {
    if (s.memory_heads < 1 || m.width % s.memory_heads) return "its memory heads do not divide its width";
    if (s.taps < 1) return "its convolution has no taps";
  }
  return nullptr;
}

// Numbers that a reader carries of a layer, or that its tables of angles have; sizes are within the limits of COUNTS.
int64_t carried(const ModelShape& m, const LayerShape& s) {
  int64_t n = 0;
  if (attends(s)) {
    const int64_t k = m.width / s.attention_heads;
    n += m.width * (s.span + 64) + s.attention_heads * s.span * (k + 64) + k * (2 * s.span + 64);
  }
  if (remembers(s)) n += 2 * m.width * (m.width / s.memory_heads + 64) + s.taps * (3 * m.width + 64);
  return n;
}

template <class T> struct Weight {
  const char* name;
  const T* LayerWeights<T>::*place;
  int64_t rows, columns;  // columns 0: a vector
};
using Weights = std::vector<Weight<float>>;

// The weights that a layer has; src/meristem/native/decoding.py has the same.
SELDOM Weights weights_of(const ModelShape& m, const LayerShape& s) {
  using W = LayerWeights<float>;
  const int64_t d = m.width, f = s.hidden;
  const bool is_gated = s.mlp == SWIGLU;
  Weights w{{"mixer_norm", &W::mixer_norm, d, 0}, {"mlp_norm", &W::mlp_norm, d, 0},
            {"up", &W::up, is_gated ? 2 * f : f, d}, {"down", &W::down, d, f}};
  if (!is_gated) w.insert(w.end(), {{"up_bias", &W::up_bias, f, 0}, {"down_bias", &W::down_bias, d, 0}});
  if (attends(s)) {
    w.insert(w.end(), {{"attention", &W::attention, 3 * d, d}, {"attention_out", &W::attention_out, d, d}});
    if (s.n_pinned) w.insert(w.end(), {{"pinned_keys", &W::pinned_keys, s.n_pinned, d}, {"pinned_values", &W::pinned_values, s.n_pinned, d}});
  }
  if (!remembers(s)) return w;
  const int64_t n_gates = (1 + s.has_retain_gate + s.has_momentum) * s.memory_heads;
  w.insert(w.end(), {{"memory", &W::memory, 3 * d, d}, {"conv", &W::conv, 3 * d, s.taps}, {"gates", &W::gates, n_gates, d},
                     {"gate_bias", &W::gate_bias, n_gates, 0}});
  if (s.has_momentum) w.push_back({"most_momentum", &W::most_momentum, s.memory_heads, 0});
  const bool is_by_head = s.mixer != GATE || s.combine == ADDITIVE;
  if (s.mixer == GATE && s.combine == SIGMOID) return w;
  w.push_back({"memory_norm", &W::memory_norm, is_by_head ? d / s.memory_heads : d, 0});
  w.push_back({"open_bias", &W::open_bias, d, 0});
  if (is_by_head || s.combine == PROJECTED) w.push_back({"open", &W::open, d, d});
  if (!is_by_head && s.combine != GATED) w.push_back({"attention_norm", &W::attention_norm, d, 0});
  if (s.mixer != GATE) w.push_back({"memory_out", &W::memory_out, d, d});
  return w;
}

// Whether all of n float32 are numbers; they may stand on any address.
bool are_finite(const char* at, int64_t n) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, at + 4 * i, 4);
    const uint32_t size = bits & 0x7FFFFFFF;
    worst = size > worst ? size : worst;
  }
  return worst < 0x7F800000;
}

// The same of n bfloat16.
bool are_finite_halves(const char* at, int64_t n) {
  bool is = true;
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, at + 2 * i, 2);
    is = is && (bits & 0x7F80) != 0x7F80;
  }
  return is;
}

bool is_digest(Span s) {
  return s.size == 64 && std::all_of(s.at, s.at + s.size, [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
}

// What stands in the name of a tensor between its beginning and its end.
Span named(Text& name, const char* begin, int64_t number, const char* end) {
  name.clear();
  name.add(begin);
  name.add(number);
  name.add(end);
  return name.span();
}

Span learned_name(Text& name, const char* leaf) {
  name.clear();
  name.add("state.learned.");
  name.add(leaf);
  return name.span();
}

// A leaf of the state of one layer: where a reader has it, and its sizes without the first, 1.
struct Leaf {
  const char* name;
  int64_t at, sizes[3];           // rings: slots, then two more
  int64_t steps[3];               // between neighbours along each size
  int64_t first, slots;           // of a ring: the slot of the oldest, and how many there are
  int n_sizes;
};

// All leaves of a layer after ``count`` tokens of its rings, in order of time (src/meristem/models/decoding.py).
int leaves_of(const ModelShape& m, const LayerShape& s, const Place& p, int64_t count, Leaf (&to)[5]) {
  int n = 0;
  const bool has_both = s.mixer == GATE || s.mixer == LAYER;
  if (attends(s)) {
    const int64_t a = s.attention_heads, k = m.width / a, held = std::min(count, s.span - 1), first = (count - held) % s.span;
    to[n++] = {has_both ? ".attention.keys_bshk" : ".keys_bshk", p.keys, {held, a, k}, {1, k * p.key_stride, p.key_stride}, first, s.span, 3};
    to[n++] = {has_both ? ".attention.values_bshv" : ".values_bshv", p.values, {held, a, k}, {p.value_stride, s.span * p.value_stride, 1}, first, s.span, 3};
  }
  if (remembers(s)) {
    const int64_t a = s.memory_heads, k = m.width / a, past = s.taps - 1, stride = p.matrix_stride;
    to[n++] = {has_both ? ".recall.memory.matrix_bhkv" : ".memory.matrix_bhkv", p.matrix, {a, k, k}, {k * stride, stride, 1}, 0, a, 3};
    if (s.has_momentum)
      to[n++] = {has_both ? ".recall.memory.matrix_momentum_bhkv" : ".memory.matrix_momentum_bhkv", p.momentum, {a, k, k}, {k * stride, stride, 1}, 0, a, 3};
    to[n++] = {has_both ? ".recall.conv.tail_bsd" : ".conv.tail_bsd", p.tail, {past, 3 * m.width, 1}, {p.tail_stride, 1, 1}, past ? count % past : 0, past, 2};
  }
  return n;
}
// ``f`` with every number of a leaf, in the order of the file.
template <class F> void each_of(const Leaf& l, float* block, F f) {
  for (int64_t x = 0; x < l.sizes[0]; ++x)
    for (int64_t y = 0; y < l.sizes[1]; ++y)
      for (int64_t z = 0; z < l.sizes[2]; ++z) f(block + l.at + (l.first + x) % l.slots * l.steps[0] + y * l.steps[1] + z * l.steps[2]);
}

}  // namespace

// Weights, and one reader. Nothing here is ever half changed.
struct meristem_model {
  ModelShape shape{};
  std::vector<LayerShape> layers;
  std::unique_ptr<Decoder<float>> decoder;
  Text identity[2], pieces;  // fingerprints of model and tokenizer, as written
  std::vector<int64_t> piece_ends;
  Numbers<float> block, room, logits;
  std::vector<std::pair<int64_t, float>> first;  // what a reader that has read nothing carries, where that is not zero
  int64_t n_ring = 0, n_tokens = 0;           // tokens read since the rings were filled from slot 0, and in all
  bool has_read = false, is_broken = false;
  double rates[2] = {};                       // of what learns beside the memory, found for this model
  std::unique_ptr<Learner> learner;           // where something does
  bool is_chosen = false;                     // what learns, so that no session changes it
  Text header, saved;  // header: what the session says of itself, besides where it stands; empty at first

  SELDOM meristem_code open(Span bytes);
  SELDOM meristem_code load(Span bytes);
  SELDOM meristem_code save();
  SELDOM meristem_code note(const char* name, Span value);
  meristem_code read(const int32_t* tokens, size_t n);
  meristem_code step(const meristem_sampling& how, int32_t* token);
  SELDOM meristem_code learn(const meristem_learning* how);
  void forget() {
    std::memset(block.get(), 0, size_t(decoder->block_size()) * sizeof(float));
    for (const auto& [at, number] : first) block.get()[at] = number;
    n_ring = n_tokens = 0;
    has_read = is_broken = false;
    header.clear();
    if (learner) learner->begin();
  }

 private:
  SELDOM meristem_code shapes(Span described);
  SELDOM meristem_code fill(const File& file);
  SELDOM meristem_code tensor(const File& file, Span name, int64_t rows, int64_t columns, std::vector<float>& to);
  SELDOM meristem_code put_pieces(const File& file);
  SELDOM meristem_code begin(const File& file);
  SELDOM meristem_code learning_of(Span header, Learning& how, bool& is_learning) const;
  SELDOM meristem_code learned_of(const File& file, Learner& to) const;
  bool makes_sense(const Learning& how) const;
  int64_t likeliest() const;
  int64_t drawn(const meristem_sampling& how) const;
  SELDOM void describe(Text& to) const;
};

meristem_code meristem_model::open(Span bytes) {
  File file;
  if (const char* why = file.open(bytes)) return fail(MERISTEM_DAMAGED, words("the model is damaged: "), words(why), words(". Export it again."));
  const Span schema = text(file.metadata(), "schema");
  if (!schema.is(SCHEMA))
    return fail(MERISTEM_OTHER_VERSION, words("the file is of version '"), schema, words("', and this library opens '"), words("meristem.edge/1'. Export the model and this library together."));
  Text described;
  if (!unescaped(text(file.metadata(), "model"), described)) return fail(MERISTEM_DAMAGED, words("the model is damaged: what it says of itself is no text. Export it again."));
  if (const meristem_code code = shapes(described.span())) return code;
  if (const meristem_code code = put_pieces(file)) return code;
  return fill(file);
}

meristem_code meristem_model::shapes(Span described) {
  const meristem_code code = MERISTEM_NOT_TAKEN;
  int64_t version;
  identity[0].add(text(described, "model"));
  identity[1].add(text(described, "tokenizer"));
  for (const Text& each : identity)
    if (!is_digest(each.span())) return fail(MERISTEM_DAMAGED, words("the model is damaged: it does not say whose weights it has. Export it again."));
  if (!count(described, "width", shape.width) || shape.width < 1 || shape.width > 1 << 14 || !count(described, "vocabulary", shape.vocabulary) ||
      shape.vocabulary < 1 || shape.vocabulary > 1 << 24 || !number(described, "eps", shape.eps) || !(shape.eps > 0 && shape.eps < 1))
    return fail(code, words("the model has a width, vocabulary or eps that this library does not compute. Export it again."));
  if (!count(described, "session", version) || version != SESSION || !count(described, "state", version) || version != STATE)
    return fail(MERISTEM_OTHER_VERSION, words("the model was exported for session files of another version. Export the model and this library together."));
  const Span of_kinds = member(described, "learn_rates");
  for (int i = 0; i < 2; ++i)
    if (!number(of_kinds, KINDS[i], rates[i]) || !(rates[i] >= 0 && rates[i] < 1e30)) return fail(code, words("the model is not taken: it does not say at which rates its weights learn. Export it again."));
  Json json(member(described, "layers"));
  bool is_first = true;
  int64_t n = 0;
  while (json.element(is_first)) {
    LayerShape s{};
    const Span each = json.value();
    bool is_known = json.ok && layers.size() < 512;
    for (const auto& f : COUNTS) is_known = is_known && count(each, f.name, s.*f.place) && s.*f.place >= f.least && s.*f.place <= f.most;
    for (const auto& f : MEASURES) is_known = is_known && number(each, f.name, s.*f.place);
    const char* why = is_known ? refused(shape, s) : "one of its layers is none that this library knows";
    if (!why && (n += carried(shape, s)) > MOST_NUMBERS) why = "what it carries is more than this library holds";
    if (why) return fail(code, words("the model is not taken: "), words(why), words(". Export it again."));
    layers.push_back(s);
  }
  if (!json.is_over() || layers.empty()) return fail(code, words("the model is not taken: it has no layers. Export it again."));
  shape.n_layers = int64_t(layers.size());
  return MERISTEM_OK;
}

// A float32 tensor, copied to where it may be read as such.
meristem_code meristem_model::tensor(const File& file, Span name, int64_t rows, int64_t columns, std::vector<float>& to) {
  const Tensor* t = file.find(name);
  const int n_axes = columns ? 2 : 1;
  if (!t || !t->type.is("F32") || t->n_axes != n_axes || t->sizes[0] != rows || (columns && t->sizes[1] != columns))
    return fail(MERISTEM_DAMAGED, words("the model is damaged: its tensor '"), name, words("' is missing or has another size. Export it again."));
  if (!are_finite(file.data(*t), t->n)) return fail(MERISTEM_NOT_FINITE, words("the tensor '"), name, words("' of the model has NaN or infinity. Export another checkpoint."));
  to.resize(size_t(t->n));
  if (t->n) std::memcpy(to.data(), file.data(*t), size_t(t->n) * 4);
  return MERISTEM_OK;
}

meristem_code meristem_model::fill(const File& file) {
  std::vector<float> embedding, norm, head;
  if (const meristem_code code = tensor(file, words("embedding"), shape.vocabulary, shape.width, embedding)) return code;
  if (const meristem_code code = tensor(file, words("norm"), shape.width, 0, norm)) return code;
  const bool is_tied = !file.find(words("head"));
  if (!is_tied)
    if (const meristem_code code = tensor(file, words("head"), shape.vocabulary, shape.width, head)) return code;
  std::vector<LayerWeights<float>> of_layers(layers.size());
  std::vector<std::vector<float>> kept;
  Text begin_name, name;
  for (size_t i = 0; i < layers.size(); ++i)
    for (const auto& w : weights_of(shape, layers[i])) {
      named(begin_name, "layers.", int64_t(i), ".");
      name = begin_name;
      name.add(w.name);
      kept.emplace_back();
      if (const meristem_code code = tensor(file, name.span(), w.rows, w.columns, kept.back())) return code;
      of_layers[i].*w.place = kept.back().data();
    }
  const ModelWeights<float> ends{embedding.data(), norm.data(), is_tied ? embedding.data() : head.data()};
  decoder = std::make_unique<Decoder<float>>(shape, layers.data(), ends, of_layers.data());
  const size_t n = size_t(decoder->block_size());
  block.make(n);
  room.make(size_t(decoder->room_size(1)));
  logits.make(size_t(decoder->logits_stride()));
  return begin(file);
}

// What a memory begins with, where that is not zero.
meristem_code meristem_model::begin(const File& file) {
  Text name;
  for (size_t i = 0; i < layers.size(); ++i) {
    Leaf leaves[5];
    const int n = leaves_of(shape, layers[i], decoder->place(int64_t(i)), 0, leaves);
    for (int j = 0; j < n; ++j) {
      named(name, "begin.", int64_t(i), leaves[j].name);
      if (!file.find(name.span())) continue;
      std::vector<float> numbers;
      if (const meristem_code code = tensor(file, name.span(), leaves[j].sizes[0] * leaves[j].sizes[1] * leaves[j].sizes[2], 0, numbers)) return code;
      size_t at = 0;
      each_of(leaves[j], block.get(), [&](float* x) { first.emplace_back(x - block.get(), numbers[at++]); });
    }
  }
  forget();
  return MERISTEM_OK;
}

meristem_code meristem_model::put_pieces(const File& file) {
  const Tensor *bytes = file.find(words("pieces")), *ends = file.find(words("piece_ends"));
  const bool is_there = bytes && ends && bytes->type.is("U8") && ends->type.is("I64") && ends->n == shape.vocabulary;
  int64_t last = 0;
  for (int64_t i = 0; is_there && i < ends->n; ++i) {
    int64_t end;
    std::memcpy(&end, file.data(*ends) + 8 * i, 8);
    if (end < last || end > bytes->n) break;
    piece_ends.push_back(last = end);
  }
  if (int64_t(piece_ends.size()) != shape.vocabulary) return fail(MERISTEM_DAMAGED, words("the model is damaged: the bytes of its tokens are not those of its vocabulary. Export it again."));
  pieces.add(file.data(*bytes), last);
  return MERISTEM_OK;
}

meristem_code meristem_model::read(const int32_t* tokens, size_t n) {
  if (is_broken) return fail(MERISTEM_NOT_FINITE, words("the session cannot go on after a prediction that was not finite. Load a saved one, or forget it."));
  for (size_t i = 0; i < n; ++i)
    if (tokens[i] < 0 || tokens[i] >= shape.vocabulary) {
      Text number, most;
      number.add(int64_t(tokens[i]));
      most.add(shape.vocabulary - 1);
      return fail(MERISTEM_BAD_TOKEN, words("token "), number.span(), words(" was given, and the vocabulary ends at "), most.span());
    }
  float* const blocks[] = {block.get()};
  for (size_t i = 0; i < n; ++i) {
    const int64_t token = tokens[i];
    bool is_number = true;
    if (learner) {
      [[maybe_unused]] const meristem::Flushed flushed;
      const auto left = learner->how().which == meristem::learning::HEAD ? Decoder<float>::HEAD_IS_LEFT : Decoder<float>::MLP_IS_LEFT;
      const float* hidden = decoder->hidden(1, &token, blocks, &n_ring, room.get(), left);
      is_number = are_finite(reinterpret_cast<const char*>(hidden), shape.width);
      if (is_number) learner->predict(hidden, token, logits.get());
    } else {
      decoder->step(1, &token, blocks, &n_ring, logits.get(), room.get());
    }
    ++n_tokens;
    has_read = true;
    if (is_number && are_finite(reinterpret_cast<const char*>(logits.get()), shape.vocabulary)) continue;
    is_broken = true;
    return fail(MERISTEM_NOT_FINITE, words("the prediction after a token is not finite, and the session cannot go on. Load a saved one, or forget it."));
  }
  return MERISTEM_OK;
}

int64_t meristem_model::likeliest() const {
  const float* x = logits.get();
  return std::max_element(x, x + shape.vocabulary) - x;
}

// p_i = softmax(x_i / temperature), cut by top_p, then by top_k (src/meristem/models/generate.py).
int64_t meristem_model::drawn(const meristem_sampling& how) const {
  const float* x = logits.get();
  const int64_t n = shape.vocabulary;
  std::vector<int32_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[size_t(i)] = int32_t(i);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
  std::vector<double> share(static_cast<size_t>(n));
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += share[size_t(i)] = meristem::elementary::exponential((double(x[order[size_t(i)]]) - double(x[order[0]])) / double(how.temperature));
  double kept = 0;
  int64_t n_kept = 0;
  while (n_kept < n && (n_kept == 0 || (kept < double(how.top_p) * sum && (how.top_k == 0 || n_kept < how.top_k)))) kept += share[size_t(n_kept++)];
  // splitmix64 (Steele et al. 2014) of the seed and the number of tokens.
  uint64_t z = (uint64_t(how.seed) << 32 ^ uint64_t(n_tokens)) + 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  double left = double((z ^ z >> 31) >> 11) * 0x1p-53 * kept;
  int64_t at = 0;
  while (at + 1 < n_kept && left >= share[size_t(at)]) left -= share[size_t(at++)];
  return order[size_t(at)];
}

meristem_code meristem_model::step(const meristem_sampling& how, int32_t* token) {
  if (!has_read || is_broken) return fail(is_broken ? MERISTEM_NOT_FINITE : MERISTEM_MISUSED, words(is_broken ? "the session cannot go on after a prediction that was not finite. Load a saved one, or forget it." : "nothing was read, so there is no prediction. Read a token first."));
  if (!(how.temperature >= 0 && how.temperature <= 1e30f) || !(how.top_p > 0 && how.top_p <= 1) || how.top_k < 0)
    return fail(MERISTEM_MISUSED, words("temperature must be 0 or more and finite, top_p above 0 and at most 1, top_k 0 or more."));
  const bool is_greedy = how.temperature < 1.17549435e-38f || how.top_k == 1;
  const int32_t found = int32_t(is_greedy ? likeliest() : drawn(how));
  if (const meristem_code code = read(&found, 1)) return code;
  *token = found;
  return MERISTEM_OK;
}

meristem_code meristem_model::load(Span bytes) {
  const Span again = words(". Take a copy that is whole, or begin a new session.");
  File file;
  if (const char* why = file.open(bytes)) return fail(MERISTEM_DAMAGED, words("the session is damaged: "), words(why), again);
  const Span metadata = file.metadata(), schema = text(metadata, "schema");
  Text own;
  own.add("meristem.session/");
  own.add(SESSION);
  Text state;
  state.add(STATE);
  if (!(schema == own.span()) || !(text(metadata, "state") == state.span()))
    return fail(MERISTEM_OTHER_VERSION, words("the session is of version '"), schema, words("', and this library opens "),
                words("meristem.session/2 with state 2. Open it with the meristem that wrote it, or with a newer one, and save it there; or export anew."));
  Text described;
  if (!unescaped(text(metadata, "session"), described)) return fail(MERISTEM_DAMAGED, words("the session is damaged: what it says of itself is no text"), again);
  const Span header = described.span();
  static const char* const parts[] = {"model", "tokenizer"};
  for (int i = 0; i < 2; ++i) {
    const Span found = text(header, parts[i]);
    if (!(found == identity[i].span()) || !found.size)
      return fail(MERISTEM_OTHER_MODEL, words("the session belongs to another "), words(parts[i]), words(": it was made with SHA-256 "), found);
  }
  Learning how;
  bool is_learning = false;
  if (const meristem_code code = learning_of(header, how, is_learning)) return code;
  std::unique_ptr<Learner> made;
  if (is_learning) made = std::make_unique<Learner>(*decoder, shape, how);
  int64_t tokens;
  if (!count(header, "n_tokens", tokens) || tokens > int64_t(1) << 52) return fail(MERISTEM_DAMAGED, words("the session is damaged: it does not say how much was read"), again);

  // How much the rings hold: all of them as much, but for those that are full.
  int64_t count = 0, n_leaves = 0;
  Text name;
  const Span logits_name = words("logits_bo");
  for (size_t i = 0; i < layers.size(); ++i) {
    Leaf leaves[5];
    const int n = leaves_of(shape, layers[i], decoder->place(int64_t(i)), 0, leaves);
    n_leaves += n;
    const Tensor* t = attends(layers[i]) ? file.find(named(name, "state.layer.", int64_t(i), leaves[0].name)) : nullptr;
    if (t && t->n_axes == 4) count = std::max(count, std::min(t->sizes[1], layers[i].span - 1));
  }
  Numbers<float> filled, prediction;
  const bool is_fresh = file.tensors().empty() && tokens == 0;
  if (!is_fresh) {
    filled.make(size_t(decoder->block_size()));
    prediction.make(size_t(decoder->logits_stride()));
    const Tensor* t = file.find(logits_name);
    if (made) n_leaves += 4 + meristem::learning::N_SCALARS - 1 + made->n_changes();
    if (int64_t(file.tensors().size()) != n_leaves + 1 || !t || !t->type.is("F32") || t->n_axes != 2 || t->sizes[0] != 1 || t->sizes[1] != shape.vocabulary)
      return fail(MERISTEM_DAMAGED, words("the session is damaged: it does not hold what a reader of this model carries"), again);
    if (!are_finite(file.data(*t), t->n)) return fail(MERISTEM_NOT_FINITE, words("the prediction in the session is not finite"), again);
    std::memcpy(prediction.get(), file.data(*t), size_t(t->n) * 4);
  }
  for (size_t i = 0; !is_fresh && i < layers.size(); ++i) {
    Leaf leaves[5];
    const int n = leaves_of(shape, layers[i], decoder->place(int64_t(i)), count, leaves);
    for (int j = 0; j < n; ++j) {
      const Leaf& l = leaves[j];
      const Tensor* t = file.find(named(name, "state.layer.", int64_t(i), l.name));
      bool fits = t && t->type.is("F32") && t->n_axes == l.n_sizes + 1 && t->sizes[0] == 1;
      for (int x = 0; fits && x < l.n_sizes; ++x) fits = t->sizes[x + 1] == l.sizes[x];
      if (!fits) return fail(MERISTEM_DAMAGED, words("the session is damaged: its tensor '"), name.span(), words("' is missing or has another size"), again);
      if (!are_finite(file.data(*t), t->n)) return fail(MERISTEM_NOT_FINITE, words("the tensor '"), name.span(), words("' of the session has NaN or infinity"), again);
      const char* from = file.data(*t);
      each_of(l, filled.get(), [&](float* x) { std::memcpy(x, from, 4); from += 4; });
    }
  }
  if (made && !is_fresh)
    if (const meristem_code code = learned_of(file, *made)) return code;
  learner = nullptr;
  forget();
  learner = std::move(made);
  if (!is_fresh) {
    block = std::move(filled);
    logits = std::move(prediction);
  }
  n_ring = count;
  n_tokens = tokens;
  has_read = !is_fresh;
  this->header = std::move(described);
  return MERISTEM_OK;
}

bool meristem_model::makes_sense(const Learning& how) const {
  return how.chunk >= 2 && how.chunk <= MOST_CHUNK && how.chunk * shape.width <= MOST_NUMBERS && how.first_rate >= 0 && how.first_rate < 1e30 && how.clip > 0 && how.clip < 1e30;
}

meristem_code meristem_model::learn(const meristem_learning* given) {
  if (!given) {
    is_chosen = false;
    return MERISTEM_OK;
  }
  if (has_read || n_tokens) return fail(MERISTEM_MISUSED, words("weights learn from the first token on, and some were read. Forget the session first."));
  std::unique_ptr<Learner> made;
  if (given->which != MERISTEM_LEARN_MEMORY) {
    const bool is_one = given->which == MERISTEM_LEARN_HEAD || given->which == MERISTEM_LEARN_LAST_MLP;
    Learning how{is_one && given->which == MERISTEM_LEARN_LAST_MLP ? meristem::learning::LAST_MLP : meristem::learning::HEAD, given->chunk, double(given->rate), double(given->grad_clip)};
    how.is_found = given->rate < 0;
    if (how.is_found) how.first_rate = rates[how.which];
    if (!is_one || !makes_sense(how))
      return fail(MERISTEM_MISUSED, words("what learns is memory, head or last_mlp, after chunks of 2 tokens or more, at a rate that is finite, with a grad_clip above 0."));
    made = std::make_unique<Learner>(*decoder, shape, how);
  }
  learner = std::move(made);
  is_chosen = true;
  return MERISTEM_OK;
}

// What learns in a session whose header this is, where it learns here, and nothing else was chosen.
meristem_code meristem_model::learning_of(Span header, Learning& how, bool& is_learning) const {
  const Span learn = text(header, "learn"), said = member(header, "learning"), which = text(said, "which");
  is_learning = learn && !learn.is("memory");
  if (is_learning) {
    const Span kind = !learn.is("weights") ? learn : which ? which : words("mlp");
    how.which = kind.is(KINDS[1]) ? meristem::learning::LAST_MLP : meristem::learning::HEAD;
    if (!learn.is("weights") || !kind.is(KINDS[how.which]))
      return fail(MERISTEM_NOT_TAKEN, words("in the session learns '"), kind, words("', and here the head or the last feed-forward layer can. Go on with it in meristem."));
    const Span rate = member(said, "lr");
    how.is_found = !rate || rate.is("null");
    how.first_rate = rates[how.which];
    const bool is_number = (how.is_found || number(said, "lr", how.first_rate)) && (!member(said, "chunk") || count(said, "chunk", how.chunk)) &&
                           (!member(said, "grad_clip") || number(said, "grad_clip", how.clip));
    if (!is_number || !makes_sense(how)) return fail(MERISTEM_NOT_TAKEN, words("in the session weights learn at a rate, chunk or clip that this library does not compute. Go on with it in meristem."));
  }
  if (is_chosen && (is_learning != bool(learner) || (learner && !learner->how().is_like(how)))) {
    const Span own = learner ? words(KINDS[learner->how().which]) : words("memory");
    Text said_so;
    said_so.add("the session was saved while '");
    said_so.add(is_learning ? KINDS[how.which] : "memory");
    said_so.add("' learned, and is to go on with '");
    said_so.add(own);
    return fail(MERISTEM_OTHER_MODEL, said_so.span(), words("' or at another rate, chunk or clip. Open it as it was saved, or begin another."));
  }
  return MERISTEM_OK;
}

meristem_code meristem_model::learned_of(const File& file, Learner& to) const {
  Learned& own = to.learned;
  auto leaf = [&](const char* name, const char* type, std::initializer_list<int64_t> sizes) {
    Text whole;
    whole.add("state.learned.");
    whole.add(name);
    const Tensor* t = file.find(whole.span());
    bool fits = t && t->type.is(type) && t->n_axes == int(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t->sizes[i] == sizes.begin()[i] || sizes.begin()[i] < 0;
    return fits ? t : nullptr;
  };
  auto damaged = [] { return fail(MERISTEM_DAMAGED, words("the session is damaged: what was learned in it is missing or has another size. Take a copy that is whole, or begin a new session.")); };
  const Tensor *n_chunks = leaf("n_chunks", "I64", {}), *tokens = leaf("tokens_bt", "I64", {1, -1});
  if (!n_chunks || !tokens || tokens->n < 1 || tokens->n > to.how().chunk) return damaged();
  const Tensor* hidden = leaf("hidden_btd", "F32", {1, tokens->n, shape.width});
  if (!hidden) return damaged();
  std::memcpy(&own.n_chunks, file.data(*n_chunks), 8);
  if (own.n_chunks < 0 || own.n_chunks > int64_t(1) << 52) return damaged();
  own.tokens.resize(size_t(tokens->n));
  std::memcpy(own.tokens.data(), file.data(*tokens), size_t(tokens->n) * 8);
  for (const int64_t token : own.tokens) if (token < 0 || token >= shape.vocabulary) return damaged();
  bool are_numbers = are_finite(file.data(*hidden), hidden->n);
  own.hidden.resize(size_t(hidden->n));
  std::memcpy(own.hidden.data(), file.data(*hidden), size_t(hidden->n) * 4);
  for (int i = 0; i < meristem::learning::N_SCALARS; ++i) {
    const Tensor* t = leaf(SCALARS[i], "F32", {1});
    if (!t) return damaged();
    are_numbers = are_numbers && are_finite(file.data(*t), 1);
    std::memcpy(own.scalars + i, file.data(*t), 4);
  }
  for (int i = 0; i < to.n_changes(); ++i) {
    Text name;
    name.add("delta.");
    name.add(CHANGES[to.how().which][i]);
    name.add("\0", 1);
    const Tensor* t = leaf(name.span().at, "BF16", {1, to.rows(i), to.columns(i)});
    if (!t) return damaged();
    are_numbers = are_numbers && are_finite_halves(file.data(*t), t->n);
    std::memcpy(own.delta[i].data(), file.data(*t), size_t(t->n) * 2);
  }
  if (!are_numbers) return fail(MERISTEM_NOT_FINITE, words("what was learned in the session has NaN or infinity. Take a copy that is whole, or begin a new session."));
  to.apply();
  return MERISTEM_OK;
}

// Members of an object, each with a comma behind it, but for those of some names.
SELDOM void copy_members(Span object, std::initializer_list<const char*> without, Text& to) {
  Json json(object);
  bool is_first = true;
  Span name;
  while (object.size && json.member(name, is_first)) {
    const Span value = json.value();
    if (std::any_of(without.begin(), without.end(), [&](const char* each) { return name.is(each); })) continue;
    to.add("\"");
    to.add(name);
    to.add("\":");
    to.add(value);
    to.add(",");
  }
}

// The header of the session that is saved: what it was said to be, and where it stands now.
void meristem_model::describe(Text& to) const {
  char digest[64];
  Sha256 hash;
  hash.add(block.get(), decoder->block_size() * int64_t(sizeof(float)));
  hash.digits(digest);
  const struct { const char* name; Span value; } own[] = {
      {"id", {digest, 32}}, {"name", words("edge")}, {"learn", words(learner ? "weights" : "memory")}, {"model", identity[0].span()}, {"tokenizer", identity[1].span()}};
  to.add("{");
  for (const auto& each : own) {
    if (member(header.span(), each.name)) continue;
    to.add("\"");
    to.add(each.name);
    to.add("\":\"");
    to.add(each.value);
    to.add("\",");
  }
  if (learner && !member(header.span(), "learning")) {
    const Learning& how = learner->how();
    to.add("\"learning\":{\"chunk\":");
    to.add(how.chunk);
    to.add(",\"grad_clip\":");
    to.add_number(float(how.clip));
    to.add(",\"lr\":");
    if (how.is_found) to.add("null");
    else to.add_number(float(how.first_rate));
    to.add(",\"which\":\"");
    to.add(KINDS[how.which]);
    to.add("\"},");
  }
  copy_members(header.span(), {"is_open", "n_tokens", "turn"}, to);
  int64_t turn = 0;
  count(header.span(), "turn", turn);
  to.add("\"is_open\":false,\"n_tokens\":");
  to.add(n_tokens);
  to.add(",\"turn\":");
  to.add(turn + 1);
  to.add("}");
}

meristem_code meristem_model::note(const char* name, Span value) {
  static const char* const own[] = {"id", "is_open", "learn", "learning", "model", "n_tokens", "tokenizer", "turn"};
  bool is_name = *name && std::strlen(name) <= 40;
  for (const char* c = name; *c; ++c) is_name = is_name && ((*c >= 'a' && *c <= 'z') || *c == '_');
  for (const char* each : own) is_name = is_name && std::strcmp(each, name);
  Json json(value);
  if (!is_name || !json.value().size || !json.is_over()) return fail(MERISTEM_MISUSED, words("what is noted needs a name of small letters that the session does not use itself, and a value that is JSON."));
  Text after;
  after.add("{");
  copy_members(header.span(), {name}, after);
  after.add("\"");
  after.add(name);
  after.add("\":");
  after.add(value);
  after.add("}");
  header = std::move(after);
  return MERISTEM_OK;
}

meristem_code meristem_model::save() {
  if (is_broken) return fail(MERISTEM_NOT_FINITE, words("the session has a prediction that is not finite, and is not saved. Load a saved one, or forget it."));
  Text described, names, numbers, name;
  describe(described);
  // A tensor whose bytes are the last of ``numbers``. shape: as JSON has it, without brackets.
  auto put_as = [&](const char* type, Span key, Span sizes, int64_t size_bytes) {
    names.add(",\"");
    names.add(key);
    names.add("\":{\"dtype\":\"");
    names.add(type);
    names.add("\",\"shape\":[");
    names.add(sizes);
    names.add("],\"data_offsets\":[");
    names.add(numbers.span().size - size_bytes);
    names.add(",");
    names.add(numbers.span().size);
    names.add("]}");
  };
  auto put = [&](Span key, const int64_t* sizes, int n_sizes, int64_t n) {
    Text written;
    written.add("1");
    for (int x = 0; x < n_sizes; ++x) { written.add(","); written.add(sizes[x]); }
    put_as("F32", key, written.span(), 4 * n);
  };
  if (has_read) {
    numbers.add(reinterpret_cast<const char*>(logits.get()), shape.vocabulary * 4);
    put(words("logits_bo"), &shape.vocabulary, 1, shape.vocabulary);
    for (size_t i = 0; i < layers.size(); ++i) {
      Leaf leaves[5];
      const int n = leaves_of(shape, layers[i], decoder->place(int64_t(i)), n_ring, leaves);
      for (int j = 0; j < n; ++j) {
        int64_t n_numbers = 0;
        each_of(leaves[j], block.get(), [&](float* x) { numbers.add(reinterpret_cast<const char*>(x), 4); ++n_numbers; });
        put(named(name, "state.layer.", int64_t(i), leaves[j].name), leaves[j].sizes, leaves[j].n_sizes, n_numbers);
      }
    }
  }
  if (has_read && learner) {
    const Learned& own = learner->learned;
    for (int i = 0; i < meristem::learning::N_SCALARS; ++i) {
      numbers.add(reinterpret_cast<const char*>(own.scalars + i), 4);
      put(learned_name(name, SCALARS[i]), nullptr, 0, 1);
    }
    numbers.add(reinterpret_cast<const char*>(own.hidden.data()), int64_t(own.hidden.size()) * 4);
    const int64_t n = int64_t(own.tokens.size()), sizes[] = {n, shape.width};
    put(learned_name(name, "hidden_btd"), sizes, 2, n * shape.width);
  }
  // A prediction may be finite where a key is not.
  bool are_numbers = are_finite(numbers.span().at, numbers.span().size / 4);
  if (has_read && learner) {
    const Learned& own = learner->learned;
    Text written;
    numbers.add(reinterpret_cast<const char*>(&own.n_chunks), 8);
    put_as("I64", learned_name(name, "n_chunks"), {}, 8);
    numbers.add(reinterpret_cast<const char*>(own.tokens.data()), int64_t(own.tokens.size()) * 8);
    written.add("1,");
    written.add(int64_t(own.tokens.size()));
    put_as("I64", learned_name(name, "tokens_bt"), written.span(), int64_t(own.tokens.size()) * 8);
    for (int i = 0; i < learner->n_changes(); ++i) {
      const char* at = reinterpret_cast<const char*>(own.delta[i].data());
      const int64_t n = int64_t(own.delta[i].size());
      are_numbers = are_numbers && are_finite_halves(at, n);
      numbers.add(at, 2 * n);
      written.clear();
      written.add("1,");
      written.add(learner->rows(i));
      written.add(",");
      written.add(learner->columns(i));
      learned_name(name, "delta.");
      name.add(CHANGES[learner->how().which][i]);
      put_as("BF16", name.span(), written.span(), 2 * n);
    }
  }
  if (!are_numbers)
    return fail(MERISTEM_NOT_FINITE, words("what the session carries is not finite, and it is not saved. Load a saved one, or forget it."));
  Text head;
  head.add("{\"__metadata__\":{\"schema\":\"meristem.session/");
  head.add(SESSION);
  head.add("\",\"session\":\"");
  head.add_quoted(described.span());
  head.add("\",\"state\":\"");
  head.add(STATE);
  head.add("\",\"sha256\":\"");
  const int64_t digest_at = 8 + head.span().size;
  head.add("0000000000000000000000000000000000000000000000000000000000000000\"}");
  head.add(names.span());
  head.add("}");
  while (head.span().size % 8) head.add(" ");
  saved.clear();
  char length[8];
  for (int i = 0; i < 8; ++i) length[i] = char(uint64_t(head.span().size) >> (8 * i));
  saved.add(length, 8);
  saved.add(head.span());
  saved.add(numbers.span());
  Sha256 hash;
  hash.add(saved.span().at, saved.span().size);
  hash.digits(saved.data() + digest_at);
  return MERISTEM_OK;
}

namespace {

// What an allocation that fails throws stays inside.
template <class F> meristem_code guarded(F f) {
#if defined(__cpp_exceptions)
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return fail(MERISTEM_NO_MEMORY, words("memory ran out."));
  } catch (const std::exception&) {
    return fail(MERISTEM_NO_MEMORY, words("something larger than memory was asked for."));
  }
#else
  return f();
#endif
}

// Called before anything that may need the instructions that the compiler was allowed to use.
const char* lacking() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) return "AVX-512";
#endif
#if defined(__AVX512FP16__)
  if (!__builtin_cpu_supports("avx512fp16")) return "AVX-512 FP16";
#endif
#if defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2")) return "AVX2";
#endif
#if defined(__FMA__)
  if (!__builtin_cpu_supports("fma")) return "FMA";
#endif
#endif
  return nullptr;
}

__attribute__((noinline)) meristem_code opened(Span bytes, meristem_model** model) {
  return guarded([&] {
    auto made = std::make_unique<meristem_model>();
    const meristem_code code = made->open(bytes);
    if (code == MERISTEM_OK) *model = made.release();
    return code;
  });
}

#if !defined(__wasm__)
// The bytes of a file, and where they are of no more use, freed.
class Bytes {
  char* at_ = nullptr;
  int64_t size_ = 0;

 public:
  Bytes() = default;
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { std::free(at_); }
  Span span() const { return {at_, size_}; }
  meristem_code read(const char* path) {
    if (!path) return fail(MERISTEM_MISUSED, words("no path was given."));
    std::FILE* file = std::fopen(path, "rb");
    long size = -1;
    if (file && std::fseek(file, 0, SEEK_END) == 0) size = std::ftell(file);
    bool is_read = size >= 0 && size < (1L << 46) && std::fseek(file, 0, SEEK_SET) == 0;
    if (is_read && !(at_ = static_cast<char*>(std::malloc(size_t(size) + 1)))) {
      std::fclose(file);
      return fail(MERISTEM_NO_MEMORY, words("there is no memory for the bytes of "), words(path));
    }
    is_read = is_read && std::fread(at_, 1, size_t(size), file) == size_t(size);
    if (file) std::fclose(file);
    if (!is_read) return fail(MERISTEM_NO_FILE, words(path), words(" cannot be read. Give a file that is there."));
    size_ = size;
    return MERISTEM_OK;
  }
};
#endif

}  // namespace

extern "C" {

const char* meristem_error(void) { return said; }
int meristem_version(void) { return MERISTEM_VERSION; }

meristem_code meristem_open_bytes(const void* bytes, size_t size, meristem_model** model) {
  if (model) *model = nullptr;
  if (const char* what = lacking()) return fail(MERISTEM_NO_VECTORS, words("this processor lacks "), words(what), words(", for which this library was compiled. Compile source/edge.cpp for it."));
  if (!bytes || !model) return fail(MERISTEM_MISUSED, words("no bytes, or no place for the model, were given."));
  return opened({static_cast<const char*>(bytes), int64_t(size)}, model);
}
void meristem_close(meristem_model* model) { delete model; }

int32_t meristem_vocabulary(const meristem_model* model) { return model ? int32_t(model->shape.vocabulary) : 0; }
int64_t meristem_n_tokens(const meristem_model* model) { return model ? model->n_tokens : 0; }
const float* meristem_logits(const meristem_model* model) { return model && model->has_read ? model->logits.get() : nullptr; }
const char* meristem_piece(const meristem_model* model, int32_t token, size_t* size) {
  const bool is_one = model && token >= 0 && token < model->shape.vocabulary;
  const int64_t begin = is_one && token ? model->piece_ends[size_t(token) - 1] : 0, end = is_one ? model->piece_ends[size_t(token)] : 0;
  if (size) *size = size_t(end - begin);
  return is_one ? model->pieces.span().at + begin : nullptr;
}

meristem_code meristem_read(meristem_model* model, const int32_t* tokens, size_t n) {
  if (!model || (!tokens && n)) return fail(MERISTEM_MISUSED, words("no model, or no tokens, were given."));
  return guarded([&] { return model->read(tokens, n); });
}
meristem_code meristem_step(meristem_model* model, const meristem_sampling* how, int32_t* token) {
  if (!model || !token) return fail(MERISTEM_MISUSED, words("no model, or no place for the token, were given."));
  return guarded([&] { return model->step(how ? *how : meristem_sampling{0, 1, 0, 0}, token); });
}
void meristem_forget(meristem_model* model) { if (model) model->forget(); }
meristem_code meristem_learn(meristem_model* model, const meristem_learning* how) {
  if (!model) return fail(MERISTEM_MISUSED, words("no model was given."));
  return guarded([&] { return model->learn(how); });
}
meristem_code meristem_learning_now(const meristem_model* model, meristem_learned* to) {
  if (!model || !to) return fail(MERISTEM_MISUSED, words("no model, or no place for what it learned, were given."));
  *to = {};
  if (!model->learner) return MERISTEM_OK;
  const Learned& own = model->learner->learned;
  const float* s = own.scalars;
  using namespace meristem::learning;
  const float steps = std::min(s[STEPS], 2147483392.0f);
  *to = {int32_t(model->learner->how().which) + MERISTEM_LEARN_HEAD, int32_t(steps > 0 ? steps : 0), own.n_chunks, s[RATE], s[SAVED]};
  return MERISTEM_OK;
}

meristem_code meristem_save_bytes(meristem_model* model, const void** bytes, size_t* size) {
  if (!model || !bytes || !size) return fail(MERISTEM_MISUSED, words("no model, or no place for the bytes, were given."));
  const meristem_code code = guarded([&] { return model->save(); });
  *bytes = code ? nullptr : model->saved.span().at;
  *size = code ? 0 : size_t(model->saved.span().size);
  return code;
}
meristem_code meristem_load_bytes(meristem_model* model, const void* bytes, size_t size) {
  if (!model || !bytes) return fail(MERISTEM_MISUSED, words("no model, or no bytes, were given."));
  return guarded([&] { return model->load({static_cast<const char*>(bytes), int64_t(size)}); });
}

meristem_code meristem_note(meristem_model* model, const char* name, const char* json, size_t size) {
  if (!model || !name || !json) return fail(MERISTEM_MISUSED, words("no model, no name or no value were given."));
  return guarded([&] { return model->note(name, {json, int64_t(size)}); });
}
const char* meristem_noted(const meristem_model* model, const char* name, size_t* size) {
  const Span found = model && name ? member(model->header.span(), name) : Span{};
  if (size) *size = size_t(found.size);
  return found.at;
}

#if !defined(__wasm__)
meristem_code meristem_open(const char* path, meristem_model** model) {
  if (model) *model = nullptr;
  Bytes bytes;
  if (const meristem_code code = bytes.read(path)) return code;
  return meristem_open_bytes(bytes.span().at, size_t(bytes.span().size), model);
}
meristem_code meristem_load(meristem_model* model, const char* path) {
  Bytes bytes;
  if (const meristem_code code = bytes.read(path)) return code;
  return meristem_load_bytes(model, bytes.span().at, size_t(bytes.span().size));
}
meristem_code meristem_save(meristem_model* model, const char* path) {
  const void* bytes;
  size_t size;
  if (!path) return fail(MERISTEM_MISUSED, words("no path was given."));
  if (const meristem_code code = meristem_save_bytes(model, &bytes, &size)) return code;
  return guarded([&] {
    // Whole or not at all: what stands there already stays until the new one is complete.
    Text partial;
    partial.add(path);
    partial.add(".part\0", 6);
    std::FILE* file = std::fopen(partial.span().at, "wb");
    bool is_written = file && std::fwrite(bytes, 1, size, file) == size;
    if (file) is_written = std::fclose(file) == 0 && is_written;
    if (is_written && std::rename(partial.span().at, path) == 0) return MERISTEM_OK;
    std::remove(partial.span().at);
    return fail(MERISTEM_NO_FILE, words(path), words(" cannot be written. Choose a place that can be, or free some of the disk."));
  });
}
#endif

}  // extern "C"

#if defined(__wasm__)
// Without what would write messages: the host catches the trap.
void* operator new(size_t size) {
  void* made = std::malloc(size ? size : 1);
  if (!made) __builtin_trap();
  return made;
}
void operator delete(void* at) noexcept { std::free(at); }
void operator delete(void* at, size_t) noexcept { std::free(at); }
extern "C" void abort() { __builtin_trap(); }
#endif

#if defined(MERISTEM_SMALL)
// The C++ library, where it is linked in, would print the names of types at the end: half of its bytes.
#include <cstdlib>
#include <exception>
namespace __cxxabiv1 {
extern std::terminate_handler __terminate_handler;
__attribute__((visibility("hidden"))) std::terminate_handler __terminate_handler = std::abort;
}  // namespace __cxxabiv1
#endif
