// Hostile files for the core of the edge. Two ways to run it, both under the sanitizers of addresses and undefined
// behaviour; a finding stops the process:
//
//   clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DMERISTEM_LIBFUZZER \
//       -Inative scripts/fuzz_edge.cpp -o fuzz && ./fuzz CORPUS      # guided by what was covered, as long as wanted
//   c++ -std=c++20 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Inative scripts/fuzz_edge.cpp -o fuzz
//   ./fuzz MODEL SESSION N SEED                                      # N changed files, the same for a seed
//
// A file of the corpus is a weight file or a session; the hash inside is made right again after most changes, so that what
// is behind it is reached.
#include <string>
#include <vector>

#include "edge.cpp"

namespace {

using Content = std::vector<char>;



// Put the right digits where the hash stands.
void seal(char* at, size_t size) {
  static const std::string field = "\"sha256\":\"";
  const std::string_view all(at, size);
  const size_t found = all.find(field);
  if (found == std::string_view::npos || found + field.size() + 64 > size) return;
  char* digits = at + found + field.size();
  std::memset(digits, '0', 64);
  char right[64];
  Sha256 hash;
  hash.add(at, int64_t(size));
  hash.digits(right);
  std::memcpy(digits, right, 64);
}

Content read_file(const char* path) {
  Bytes bytes;
  if (bytes.read(path)) std::abort();
  return {bytes.span().at, bytes.span().at + bytes.span().size};
}

// Everything that a program may do with what was opened.
void use(meristem_model* model) {
  const int32_t tokens[] = {0, meristem_vocabulary(model) - 1, 1};
  int32_t token;
  const void* bytes;
  size_t size;
  for (int i = 0; i < 3; ++i) meristem_read(model, tokens, 3);
  meristem_step(model, nullptr, &token);
  const meristem_sampling how{0.7f, 0.9f, 5, 3};
  meristem_step(model, &how, &token);
  meristem_piece(model, token, &size);
  meristem_noted(model, "turns", &size);
  if (meristem_save_bytes(model, &bytes, &size) != MERISTEM_OK) return;
  const Content saved(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + size);
  if (meristem_load_bytes(model, saved.data(), saved.size()) != MERISTEM_OK) {
    std::fprintf(stderr, "what was saved does not open: %s\n", meristem_error());
    std::abort();
  }
  meristem_step(model, nullptr, &token);
  // What learns is chosen for a session that begins, whatever the last one was; chunks are so short that they end here.
  for (const int32_t which : {MERISTEM_LEARN_HEAD, MERISTEM_LEARN_LAST_MLP}) {
    meristem_forget(model);
    const meristem_learning learning{which, 2, 1.0f, 1.0f};
    meristem_learned learned;
    meristem_learn(model, &learning);
    meristem_read(model, tokens, 3);
    meristem_learning_now(model, &learned);
    if (meristem_save_bytes(model, &bytes, &size) != MERISTEM_OK) continue;
    const Content again(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + size);
    if (meristem_load_bytes(model, again.data(), again.size()) != MERISTEM_OK) {
      std::fprintf(stderr, "what was learned does not open: %s\n", meristem_error());
      std::abort();
    }
    meristem_read(model, tokens, 3);
  }
  meristem_forget(model);
  meristem_learn(model, nullptr);
}

void try_model(Span content) {
  meristem_model* model;
  if (meristem_open_bytes(content.at, size_t(content.size), &model) == MERISTEM_OK) use(model);
  meristem_close(model);
}
void try_session(meristem_model* model, Span content) {
  if (meristem_load_bytes(model, content.at, size_t(content.size)) == MERISTEM_OK) use(model);
}

}  // namespace

#if defined(MERISTEM_LIBFUZZER)
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  size = LLVMFuzzerMutate(data, size, most);
  if (seed % 16) seal(reinterpret_cast<char*>(data), size);
  return size;
}
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static meristem_model* model = [] {
    meristem_model* made;
    const Content content = read_file(std::getenv("MERISTEM_FUZZ_MODEL"));
    if (meristem_open_bytes(content.data(), content.size(), &made)) std::abort();
    return made;
  }();
  const Span content{reinterpret_cast<const char*>(data), int64_t(size)};
  try_model(content);
  try_session(model, content);
  return 0;
}
#else
namespace {

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  size_t below(size_t n) { return n ? size_t(next() % n) : 0; }
};

size_t header_end(const Content& c) {
  uint64_t n = 0;
  if (c.size() < 8) return c.size();
  std::memcpy(&n, c.data(), 8);
  return n < c.size() - 8 ? size_t(n) + 8 : c.size();
}

// One change, most of them in the header, where sizes are.
void change(Content& c, Random& random) {
  static const char* const odd[] = {"0", "1", "-1", "2", "64", "4294967296", "9007199254740993", "18446744073709551615", "1e308", "1e-300", "null",
                                    "[]", "{}", "\"\"", "0.5", "2147483648", "1099511627776", "true", "99999999999999999999999999999999999999999999"};
  const size_t end = random.below(4) ? header_end(c) : c.size(), at = random.below(end);
  if (c.empty()) return;
  switch (random.below(9)) {
    case 0: c[at] = char(c[at] ^ 1 << random.below(8)); break;
    case 1: c[at] = char(random.next()); break;
    case 2: c.resize(random.below(c.size()) + 1); break;
    case 3: c.insert(c.begin() + long(at), random.below(9) + 1, "\0{}[]\",:\\0"[random.below(11)]); break;
    case 4: c.erase(c.begin() + long(at), c.begin() + long(std::min(c.size(), at + 1 + random.below(9)))); break;
    case 5: {  // a number becomes another
      size_t from = at;
      while (from < end && (c[from] < '0' || c[from] > '9')) ++from;
      size_t to = from;
      while (to < end && c[to] >= '0' && c[to] <= '9') ++to;
      const std::string_view word = odd[random.below(sizeof odd / sizeof *odd)];
      c.erase(c.begin() + long(from), c.begin() + long(to));
      c.insert(c.begin() + long(from), word.begin(), word.end());
      break;
    }
    case 6: {  // a piece comes again
      const Content piece(c.begin() + long(at), c.begin() + long(std::min(c.size(), at + random.below(80))));
      c.insert(c.begin() + long(random.below(end)), piece.begin(), piece.end());
      break;
    }
    case 7: {  // a number that is none
      static const uint32_t bits[] = {0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1};
      const size_t where = header_end(c) + 4 * random.below((c.size() - header_end(c)) / 4);
      if (where + 4 <= c.size()) std::memcpy(c.data() + where, &bits[random.below(5)], 4);
      break;
    }
    default: {  // the length of the header, so that it is right again after what was put in
      const uint64_t n = random.below(2) ? random.next() >> random.below(64) : uint64_t(header_end(c) - std::min<size_t>(8, c.size()));
      if (c.size() >= 8) std::memcpy(c.data(), &n, 8);
    }
  }
}

// Where what was put in or taken out left the header longer or shorter.
void fit(Content& c, size_t before, size_t header) {
  if (c.size() < 8) return;
  const uint64_t n = header + c.size() - before - 8;
  std::memcpy(c.data(), &n, 8);
}

}  // namespace

int main(int n_words, char** words) {
  if (n_words != 5) return 1;
  const Content model = read_file(words[1]), session = read_file(words[2]);
  const long n = std::atol(words[3]);
  Random random{uint64_t(std::atol(words[4]))};
  meristem_model* opened;
  if (meristem_open_bytes(model.data(), model.size(), &opened)) {
    std::fprintf(stderr, "%s\n", meristem_error());
    return 1;
  }
  long counts[2][16] = {};
  for (long i = 0; i < n; ++i) {
    const bool is_model = i % 2;
    Content c = is_model ? model : session;
    const size_t before = c.size(), header = header_end(c);
    for (size_t each = random.below(3) + 1; each > 0; --each) change(c, random);
    if (random.below(3)) fit(c, before, header);
    if (random.below(8)) seal(c.data(), c.size());
    meristem_model* made = nullptr;
    const meristem_code code = is_model ? meristem_open_bytes(c.data(), c.size(), &made) : meristem_load_bytes(opened, c.data(), c.size());
    ++counts[is_model][code];
    if (code == MERISTEM_OK) use(is_model ? made : opened);
    meristem_close(made);
  }
  meristem_close(opened);
  for (int kind = 0; kind < 2; ++kind)
    for (int code = 0; code < 16; ++code)
      if (counts[kind][code]) std::printf("%s %d: %ld\n", kind ? "model" : "session", code, counts[kind][code]);
  return 0;
}
#endif
