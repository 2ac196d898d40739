// Files of named tensors (safetensors) whose header says what they are and has the hash of all bytes: the weights of the
// edge, and sessions (src/meristem/serve/store.py). Nothing in a file is believed: every size is checked against the
// bytes that are there before it is multiplied, added or read.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

// Compiled for size: what is not called once for each token.
#define SELDOM __attribute__((cold))

namespace meristem::container {

// Bytes of something that outlives this.
struct Span {
  const char* at = nullptr;
  int64_t size = 0;
  bool is(const char* word) const { return int64_t(std::strlen(word)) == size && std::memcmp(at, word, size_t(size)) == 0; }
  bool operator==(const Span& o) const { return size == o.size && (size == 0 || std::memcmp(at, o.at, size_t(size)) == 0); }
  explicit operator bool() const { return at != nullptr; }
};

// SHA-256 (FIPS 180-4).
class Sha256 {
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char rest_[64];
  uint64_t n_ = 0;

  static uint32_t turned(uint32_t x, int by) { return x >> by | x << (32 - by); }
  void block(const unsigned char* p) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
        0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
        0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
        0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
        0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
        0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) w[i] = uint32_t(p[4 * i]) << 24 | uint32_t(p[4 * i + 1]) << 16 | uint32_t(p[4 * i + 2]) << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; ++i)
      w[i] = w[i - 16] + w[i - 7] + (turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3) +
             (turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10);
    uint32_t s[8];
    std::memcpy(s, state_, sizeof s);
    for (int i = 0; i < 64; ++i) {
      const uint32_t one = s[7] + (turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
      const uint32_t two = (turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      for (int j = 7; j > 0; --j) s[j] = s[j - 1];
      s[4] += one;
      s[0] = one + two;
    }
    for (int i = 0; i < 8; ++i) state_[i] += s[i];
  }

 public:
  void add(const void* from, int64_t size) {
    const unsigned char* p = static_cast<const unsigned char*>(from);
    while (size > 0) {
      const int64_t held = int64_t(n_ % 64);
      if (held == 0 && size >= 64) {
        block(p);
        p += 64, size -= 64, n_ += 64;
        continue;
      }
      const int64_t taken = size < 64 - held ? size : 64 - held;
      std::memcpy(rest_ + held, p, size_t(taken));
      p += taken, size -= taken, n_ += uint64_t(taken);
      if (n_ % 64 == 0) block(rest_);
    }
  }
  // 64 digits.
  void digits(char* to) {
    const uint64_t n_bits = n_ * 8;
    const unsigned char one = 0x80, zero = 0;
    add(&one, 1);
    while (n_ % 64 != 56) add(&zero, 1);
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(n_bits >> (56 - 8 * i));
    add(length, 8);
    for (int i = 0; i < 64; ++i) to[i] = "0123456789abcdef"[state_[i / 8] >> (28 - 4 * (i % 8)) & 15];
  }
};

// Reads JSON from front to back. After the first thing that is none, ``ok`` is false and stays it, and all else is empty.
class Json {
  const char *p_, *end_;

  void word(const char* wanted) {
    const int64_t size = int64_t(std::strlen(wanted));
    if (end_ - p_ < size || std::memcmp(p_, wanted, size_t(size))) ok = false;
    else p_ += size;
  }
  void space() { while (p_ < end_ && (*p_ == ' ' || *p_ == '\n' || *p_ == '\t' || *p_ == '\r')) ++p_; }

 public:
  bool ok = true;
  explicit Json(Span text) : p_(text.at), end_(text.at + text.size) {}

  const char* place() const { return p_; }
  bool at(char c) {
    space();
    return ok && p_ < end_ && *p_ == c;
  }
  bool take(char c) {
    if (!at(c)) return ok = false;
    ++p_;
    return true;
  }
  bool is_over() {
    space();
    return ok && p_ == end_;
  }
  // What stands between the quotes, as it is written.
  Span string() {
    if (!take('"')) return {};
    const char* begin = p_;
    while (p_ < end_ && *p_ != '"') {
      if (static_cast<unsigned char>(*p_) < 0x20) { ok = false; return {}; }
      p_ += *p_ == '\\' && p_ + 1 < end_ ? 2 : 1;
    }
    if (p_ >= end_) { ok = false; return {}; }
    return {begin, p_++ - begin};
  }
  // Members of an object: true while there is one, with its name read.
  bool member(Span& name, bool& is_first) {
    if (is_first) {
      is_first = false;
      if (!take('{')) return false;
      if (at('}')) { ++p_; return false; }
    } else if (at('}')) {
      ++p_;
      return false;
    } else if (!take(',')) {
      return false;
    }
    name = string();
    return take(':');
  }
  bool element(bool& is_first) {
    if (is_first) {
      is_first = false;
      if (!take('[')) return false;
    } else if (!at(']')) {
      return take(',');
    }
    if (!at(']')) return ok;
    ++p_;
    return false;
  }
  // Any value, as it is written.
  SELDOM Span value(int depth = 0) {
    space();
    const char* begin = p_;
    bool is_first = true;
    Span name;
    if (depth > 32 || p_ >= end_) ok = false;
    else if (*p_ == '{') while (member(name, is_first)) value(depth + 1);
    else if (*p_ == '[') while (element(is_first)) value(depth + 1);
    else if (*p_ == '"') string();
    else if (*p_ == 't') word("true");
    else if (*p_ == 'f') word("false");
    else if (*p_ == 'n') word("null");
    else number();
    if (!ok || p_ == begin) { ok = false; return {}; }
    return {begin, p_ - begin};
  }
  // A whole number from 0 up to 2^53.
  int64_t count() {
    space();
    int64_t n = 0;
    const char* begin = p_;
    while (p_ < end_ && *p_ >= '0' && *p_ <= '9' && n <= (int64_t(1) << 53) / 10) n = 10 * n + (*p_++ - '0');
    if (p_ == begin || (p_ < end_ && *p_ >= '0' && *p_ <= '9')) ok = false;
    return ok ? n : 0;
  }
  // Any number that is finite, within two units in the last place of a double; those of up to 15 digits exactly.
  SELDOM double number() {
    space();
    const bool is_negative = p_ < end_ && *p_ == '-' && ++p_;
    double digits = 0;
    int n_digits = 0, tens = 0, given = 0;
    bool is_behind = false;
    for (; p_ < end_ && ((*p_ >= '0' && *p_ <= '9') || (*p_ == '.' && !is_behind)); ++p_) {
      if (*p_ == '.') { is_behind = true; continue; }
      if (++n_digits > 40) { ok = false; return 0; }
      digits = digits * 10 + (*p_ - '0');
      tens -= is_behind;
    }
    if (p_ < end_ && (*p_ == 'e' || *p_ == 'E')) {
      const bool is_down = ++p_ < end_ && *p_ == '-';
      if (p_ < end_ && (*p_ == '-' || *p_ == '+')) ++p_;
      const char* begin = p_;
      while (p_ < end_ && *p_ >= '0' && *p_ <= '9' && given < 400) given = 10 * given + (*p_++ - '0');
      if (p_ == begin) ok = false;
      tens += is_down ? -given : given;
    }
    if (n_digits == 0 || tens > 300 || tens < -300) ok = false;
    if (!ok) return 0;
    double power = 1;
    for (int i = tens < 0 ? -tens : tens; i > 0; --i) power *= 10;
    digits = tens < 0 ? digits / power : digits * power;
    return is_negative ? -digits : digits;
  }
};

// The value of a member of an object, as it is written; nothing where it has none of the name, or the text is no object.
SELDOM inline Span member(Span object, const char* wanted) {
  Json json(object);
  bool is_first = true;
  Span name;
  while (json.member(name, is_first)) {
    const Span value = json.value();
    if (json.ok && name.is(wanted)) return value;
  }
  return {};
}
// The same of a string without its quotes, as it is written.
inline Span text(Span object, const char* wanted) {
  const Span found = member(object, wanted);
  return found.size >= 2 && *found.at == '"' ? Span{found.at + 1, found.size - 2} : Span{};
}
inline bool count(Span object, const char* wanted, int64_t& to) {
  Json json(member(object, wanted));
  to = json.count();
  return json.is_over();
}
inline bool number(Span object, const char* wanted, double& to) {
  Json json(member(object, wanted));
  to = json.number();
  return json.is_over();
}

// Text that grows.
class Text {
  std::vector<char> bytes_;

 public:
  void add(const char* from, int64_t size) { bytes_.insert(bytes_.end(), from, from + size); }
  void add(Span s) { if (s.size) add(s.at, s.size); }
  void add(const char* word) { add(word, int64_t(std::strlen(word))); }
  void add(int64_t n) {
    char digits[24];
    int at = 24;
    const bool is_negative = n < 0;
    uint64_t left = is_negative ? 0 - uint64_t(n) : uint64_t(n);
    do digits[--at] = char('0' + left % 10); while (left /= 10);
    if (is_negative) digits[--at] = '-';
    add(digits + at, 24 - at);
  }
  // A number from 0 on, with the nine digits that tell one float from all others.
  void add_number(float x) {
    int tens = 0;
    double digits = double(x);
    for (; digits >= 1e9; digits /= 10) ++tens;
    for (; digits < 1e8 && digits > 0 && tens > -100; digits *= 10) --tens;
    add(int64_t(digits + 0.5));
    add("e");
    add(int64_t(tens));
  }
  // As what stands between the quotes of a JSON string.
  void add_quoted(Span s) {
    for (int64_t i = 0; i < s.size; ++i) {
      const unsigned char c = static_cast<unsigned char>(s.at[i]);
      if (c == '"' || c == '\\') add("\\", 1);
      if (c >= 0x20) { add(s.at + i, 1); continue; }
      const char escape[] = {'\\', 'u', '0', '0', "0123456789abcdef"[c >> 4], "0123456789abcdef"[c & 15]};
      add(escape, 6);
    }
  }
  Span span() const { return {bytes_.data(), int64_t(bytes_.size())}; }
  char* data() { return bytes_.data(); }
  void clear() { bytes_.clear(); }
};

// What a JSON string says that is written like this; nothing where an escape is none.
SELDOM inline bool unescaped(Span s, Text& to) {
  auto hexadecimal = [&](int64_t at, uint32_t& c) {
    if (at + 4 > s.size) return false;
    c = 0;
    for (int i = 0; i < 4; ++i) {
      const char x = s.at[at + i];
      const int digit = x >= '0' && x <= '9' ? x - '0' : x >= 'a' && x <= 'f' ? x - 'a' + 10 : x >= 'A' && x <= 'F' ? x - 'A' + 10 : -1;
      if (digit < 0) return false;
      c = c << 4 | uint32_t(digit);
    }
    return true;
  };
  for (int64_t i = 0; i < s.size; ++i) {
    if (s.at[i] != '\\') { to.add(s.at + i, 1); continue; }
    if (++i >= s.size) return false;
    static const char from[] = "\"\\/bfnrt", what[] = "\"\\/\b\f\n\r\t";
    if (const char* found = s.at[i] ? std::strchr(from, s.at[i]) : nullptr) { to.add(what + (found - from), 1); continue; }
    uint32_t c, low;
    if (s.at[i] != 'u' || !hexadecimal(i + 1, c)) return false;
    i += 4;
    if (c >= 0xD800 && c < 0xDC00 && i + 2 < s.size && s.at[i + 1] == '\\' && s.at[i + 2] == 'u' && hexadecimal(i + 3, low) && low >= 0xDC00 && low < 0xE000) {
      c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
      i += 6;
    }
    const char utf8[4] = {char(c < 0x80 ? c : c < 0x800 ? 0xC0 | c >> 6 : c < 0x10000 ? 0xE0 | c >> 12 : 0xF0 | c >> 18),
                          char(0x80 | (c < 0x800 ? c : c < 0x10000 ? c >> 6 : c >> 12) % 64), char(0x80 | (c < 0x10000 ? c : c >> 6) % 64), char(0x80 | c % 64)};
    to.add(utf8, c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4);
  }
  return true;
}

constexpr int MOST_AXES = 4;
struct Tensor {
  Span name, type;
  int n_axes = 0;
  int64_t sizes[MOST_AXES] = {}, n = 1, first = 0, end = 0;  // bytes of the data
};

constexpr int64_t MOST = int64_t(1) << 40;  // of anything that is multiplied

class File {
  Span data_;
  std::vector<Tensor> tensors_;
  Span metadata_;

  SELDOM bool tensor(Json& json, Span name) {
    Tensor t;
    t.name = name;
    bool is_first = true, has_offsets = false;
    Span key;
    while (json.member(key, is_first)) {
      bool is_begun = true;
      if (key.is("dtype")) {
        t.type = json.string();
      } else if (key.is("shape")) {
        while (json.element(is_begun)) {
          const int64_t size = json.count();
          if (t.n_axes == MOST_AXES || size > MOST || __builtin_mul_overflow(t.n, size, &t.n) || t.n > MOST) return false;
          t.sizes[t.n_axes++] = size;
        }
      } else if (key.is("data_offsets")) {
        int64_t* to[] = {&t.first, &t.end};
        int n = 0;
        while (json.element(is_begun)) {
          if (n == 2) return false;
          *to[n++] = json.count();
        }
        has_offsets = n == 2;
      } else {
        return false;
      }
    }
    const int64_t width = t.type.is("F32") || t.type.is("I32") ? 4 : t.type.is("U8") ? 1 : t.type.is("I64") ? 8 : t.type.is("BF16") ? 2 : 0;
    if (!json.ok || !has_offsets || t.first > t.end || t.end > data_.size) return false;
    if (width && t.n * width != t.end - t.first) return false;
    tensors_.push_back(t);
    return true;
  }

 public:
  // Why the bytes are no such file, as a clause; null where they are one. They outlive this.
  SELDOM const char* open(Span bytes) {
    if (bytes.size < 10) return "it is shorter than any such file";
    uint64_t length = 0, other = 0;
    for (int i = 0; i < 8; ++i) {
      length |= uint64_t(static_cast<unsigned char>(bytes.at[i])) << (8 * i);
      other |= uint64_t(static_cast<unsigned char>(bytes.at[i])) << (56 - 8 * i);
    }
    const uint64_t room = uint64_t(bytes.size - 8);
    if (length > room) return other <= room ? "its bytes are in the other order, the greatest first" : "it is cut off, or none of ours";
    const Span header{bytes.at + 8, int64_t(length)};
    data_ = {header.at + header.size, int64_t(room - length)};
    Json json(header);
    bool is_first = true;
    Span name;
    while (json.member(name, is_first)) {
      if (name.is("__metadata__")) metadata_ = json.value();
      else if (!tensor(json, name)) return "its header has a tensor that its bytes do not hold";
    }
    if (!json.is_over()) return "its header is not JSON";
    return sealed(bytes);
  }
  // The hash stands inside the file, and is taken with its own 64 digits as zeros.
  const char* sealed(Span bytes) const {
    const Span said = text(metadata_, "sha256");
    if (said.size != 64) return "it has no hash";
    static const char zeros[] = "0000000000000000000000000000000000000000000000000000000000000000";
    char found[64];
    Sha256 hash;
    hash.add(bytes.at, said.at - bytes.at);
    hash.add(zeros, 64);
    hash.add(said.at + 64, bytes.at + bytes.size - said.at - 64);
    hash.digits(found);
    return std::memcmp(found, said.at, 64) ? "its bytes do not have the hash written in it" : nullptr;
  }
  Span metadata() const { return metadata_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }
  const Tensor* find(Span name) const {
    for (const Tensor& t : tensors_) if (t.name == name) return &t;
    return nullptr;
  }
  const char* data(const Tensor& t) const { return data_.at + t.first; }
};

}  // namespace meristem::container
