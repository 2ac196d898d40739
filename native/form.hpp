// The exact chunk form of the linear family, forward and backward, one head of one row and one chunk at a time.
//
//   P_t = mu_t P_(t-1) + theta_t e_t        what a write of token r is in the momentum of token t: P_t[r]
//   W_t = rho_t W_(t-1) + P_t               and in the memory
//   h_t = mu_t h_(t-1)                      what enters the chunk: the momentum in the momentum,
//   a_t = rho_t a_(t-1)                     the memory in the memory,
//   b_t = rho_t b_(t-1) + h_t               and the momentum in the memory
//
// with retain rho, momentum mu, write rate theta and the unit vector e_t. With M and S the memory and momentum that enter,
// z the scale of the probe, and ' for one token earlier:
//
//   D N = V - z (a' K M + b' K S),   D = I + z W' * K K^T     what is new in each value
//   Y   = a Q M + b Q S + (W * Q K^T) N                       what is read; a', b', W' where a token reads before it writes
//   M'' = a_c M + b_c S + (W_c K)^T N,   S'' = h_c S + (P_c K)^T N
//
// Source: memory.md 4.2 and 4.3. There W and P are exponentials of summed logarithms; here they follow row by row from
// the factors, two products for each number in the place of an exponential, nothing to clamp, and a short last chunk is
// only shorter. Their gradient is the same recurrence from the last row to the first; no division, nothing cancels.
// D is never inverted: substitution is done inside the tile that makes the right side, from the top for N, from the bottom
// for its gradient. Triangles are worked on as triangles.
#pragma once
#include "tile.hpp"

namespace meristem {

enum Probe : int32_t { NEVER = 0, START = 1, TOKEN = 2 };  // the memory at which a write takes its residual

struct Sizes {
  int key, value, chunk;  // widths are multiples of the lanes
  int levels;             // 2 with momentum, 1 without; memory and momentum stand below each other: [levels key, value]
  Probe probe;
  int32_t reads_before;
  // The width of rows that have a number for each token of a chunk.
  template <class T> int64_t columns() const { return up(chunk, 2 * LANES<T>); }
};

// Hands out parts of one block of bytes, each on a cache line of its own. Without a block it only counts, and what it hands
// out is not to be touched.
class Arena {
 public:
  explicit Arena(void* block) : begin(block ? reinterpret_cast<uintptr_t>(block) : 4096) {}
  template <class T> T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(begin + used);
    used += up(n * int64_t(sizeof(T)), 64);
    return part;
  }
  int64_t used = 0;

 private:
  uintptr_t begin;
};

// What is saved of one chunk for the backward pass: N, and the lower tiles of K K^T and Q K^T.
template <class T> struct Saved { T *new_value, *alike, *match; };

template <class T> class Chunk {
 public:
  Chunk(const Sizes& sizes, Arena& arena) : k(sizes.key), v(sizes.value), levels(sizes.levels), cp(sizes.columns<T>()), size(sizes) {
    const int64_t square = (size.chunk + 1) * cp, rows = size.chunk, z = LANES<T> * 2 + levels * k;
    zt_columns = z;
    // A row of zeros stands before the first of W and P.
    W = arena.take<T>(square) + cp;
    P = arena.take<T>(square) + cp;
    for (T** each : {&G, &D, &dG, &dD, &dL}) *each = arena.take<T>(square);
    KT = arena.take<T>(k * cp);
    NT = arena.take<T>(v * cp);
    for (T** each : {&KW, &KR, &QR}) *each = arena.take<T>(rows * levels * k);
    for (T** each : {&V1, &V2}) *each = arena.take<T>(rows * levels * v);
    dV = arena.take<T>(rows * v);
    for (T** each : {&ZT, &dZT}) *each = arena.take<T>(v * zt_columns);
    dots = arena.take<T>(3 * levels * rows * LANES<T>);
    gW = arena.take<T>(cp);
    gP = arena.take<T>(cp);
    for (T** each : {&retain, &momentum, &write, &scale, &a, &b, &h, &pa, &pb, &dscale}) *each = arena.take<T>(rows + 1) + 1;
  }

  // By token of the chunk, filled in by the caller before ``forward`` and ``backward``. Index -1 of a, b, h is what the
  // value is before the chunk.
  T *retain, *momentum, *write, *scale;

  // Z: what enters. left: what leaves. value and read: rows of ``v`` numbers so far apart.
  void forward(int c, const T* K, const T* Q, const T* value, int64_t value_row, const T* Z, T* left, T* read,
               int64_t read_row, Saved<T> saved) {
    decays(c);
    transpose(K, k, c, k, KT, cp);
    const int columns = int(up(c, LANES<T>));
    lower<T>(c, columns, [&]<int MR, int NR>(int i, int j) {
      Tile<T, MR, NR> x;
      if (size.probe == TOKEN) {
        x.zero();
        x.mac(0, k, K + i * k, k, 1, KT + j, cp);
        x.to(saved.alike + i * cp + j, cp);
      }
      x.zero();
      x.mac(0, k, Q + i * k, k, 1, KT + j, cp);
      x.to(saved.match + i * cp + j, cp);
    });
    weigh(c, saved);
    T* const N = saved.new_value;
    spread_probe(c, K, k, KW);
    const int probed = probed_levels() * k;
    tiles<T>(c, v, [&]<int MR, int NR>(int i, int j) {
      Tile<T, MR, NR> x;
      x.from(value + i * value_row + j, value_row);
      x.template mac<true>(0, probed, KW + i * probed, probed, 1, Z + j, v);
      if (size.probe == TOKEN) {
        x.template mac<true>(0, i, D + i * cp, cp, 1, N + j, v);
        for (int m = 1; m < MR; ++m)
          for (int s = 0; s < m; ++s)
            for (int n = 0; n < NR; ++n) x.sum[m][n] -= D[(i + m) * cp + i + s] * x.sum[s][n];
      }
      x.to(N + i * v + j, v);
    });
    spread_read(c, Q, k, QR);
    tiles<T>(c, v, [&]<int MR, int NR>(int i, int j) {
      Tile<T, MR, NR> x;
      x.zero();
      x.mac(0, levels * k, QR + i * levels * k, levels * k, 1, Z + j, v);
      x.mac(0, i + MR, G + i * cp, cp, 1, N + j, v);
      x.to(read + i * read_row + j, read_row);
    });
    spread_write(c, N, v, V1);
    for (int level = 0; level < levels; ++level)
      tiles<T>(k, v, [&]<int MR, int NR>(int i, int j) {
        Tile<T, MR, NR> x;
        x.zero();
        if (level == 0) x.add(Z + i * v + j, v, a[c - 1]);
        if (levels == 2) x.add(Z + (k + i) * v + j, v, level ? h[c - 1] : b[c - 1]);
        x.mac(0, c, K + i, 1, k, V1 + level * v + j, levels * v);
        x.to(left + (level * k + i) * v + j, v);
      });
  }

  // The gradients that leave the chunk backwards; those of retain and scale may be unwanted.
  struct Sent {
    T *key, *query, *value;
    int64_t value_row;
    T *retain, *momentum, *write, *scale;
  };

  // dY: of what was read. dleft: of what left. dZ: of what entered, which is written.
  void backward(int c, const T* K, const T* Q, const T* Z, Saved<T> saved, const T* dY, const T* dleft, T* dZ, Sent sent) {
    decays(c);
    weigh(c, saved);
    spread_write(c, K, k, KR);
    tiles_up<T>(c, v, [&]<int MR, int NR>(int i, int j) {
      Tile<T, MR, NR> x;
      x.zero();
      x.mac(0, levels * k, KR + i * levels * k, levels * k, 1, dleft + j, v);
      x.mac(i, c, G + i, 1, cp, dY + j, v);
      if (size.probe == TOKEN) {
        x.template mac<true>(i + MR, c, D + i, 1, cp, dV + j, v);
        for (int m = MR - 2; m >= 0; --m)
          for (int s = m + 1; s < MR; ++s)
            for (int n = 0; n < NR; ++n) x.sum[m][n] -= D[(i + s) * cp + i + m] * x.sum[s][n];
      }
      x.to(dV + i * v + j, v);
      x.to(sent.value + i * sent.value_row + j, sent.value_row);
    });
    transpose(dleft, v, levels * k, v, dZT, zt_columns);
    transpose(Z, v, levels * k, v, ZT, zt_columns);
    transpose(saved.new_value, v, c, v, NT, cp);
    through_entering(c, K, Q, saved.new_value, dY, sent);
    through_weights(c, saved, dY);
    tiles<T>(c, k, [&]<int MR, int NR>(int i, int j) {
      Tile<T, MR, NR> x;
      x.from(sent.query + i * k + j, k);
      x.mac(0, i + MR, dL + i * cp, cp, 1, K + j, k);
      x.to(sent.query + i * k + j, k);
      x.from(sent.key + i * k + j, k);
      x.mac(i, c, dL + i, 1, cp, Q + j, k);
      if (size.probe == TOKEN) {
        x.mac(i, c, dD + i, 1, cp, K + j, k);
        x.mac(0, i + MR, dD + i * cp, cp, 1, K + j, k);
      }
      x.to(sent.key + i * k + j, k);
    });
    spread_probe(c, dV, v, V1);
    spread_read(c, dY, v, V2);
    const int probed = probed_levels();
    for (int level = 0; level < levels; ++level)
      tiles<T>(k, v, [&]<int MR, int NR>(int i, int j) {
        Tile<T, MR, NR> x;
        x.zero();
        x.add(dleft + i * v + j, v, level ? b[c - 1] : a[c - 1]);
        if (level == 1) x.add(dleft + (k + i) * v + j, v, h[c - 1]);
        x.mac(0, c, Q + i, 1, k, V2 + level * v + j, levels * v);
        if (level < probed) x.template mac<true>(0, c, K + i, 1, k, V1 + level * v + j, probed * v);
        x.to(dZ + (level * k + i) * v + j, v);
      });
    through_decays(c, Z, dleft, sent);
  }

 private:
  const int k, v, levels;
  const int64_t cp;
  const Sizes size;
  int64_t zt_columns;
  T *W, *P, *G, *D, *dG, *dD, *dL, *KT, *NT, *KW, *KR, *QR, *V1, *V2, *dV, *ZT, *dZT, *dots, *gW, *gP;
  T *a, *b, *h, *pa, *pb, *dscale;

  int probed_levels() const { return size.probe == NEVER ? 0 : size.probe == START ? 1 : levels; }

  void decays(int c) {
    std::fill(W - cp, W, T(0));
    std::fill(P - cp, P, T(0));
    a[-1] = 1;
    b[-1] = 0;
    h[-1] = 1;
    for (int t = 0; t < c; ++t) {
      T *w = W + t * cp, *p = P + t * cp;
      const int64_t past = up(t, LANES<T>);
      for (int64_t r = 0; r < past; r += LANES<T>) {
        Vec<T> kept = retain[t] * load(w - cp + r);
        if (levels == 2) {
          const Vec<T> moved = momentum[t] * load(p - cp + r);
          store(p + r, moved);
          kept += moved;
        }
        store(w + r, kept);
      }
      std::fill(w + past, w + cp, T(0));
      w[t] = write[t];
      a[t] = retain[t] * a[t - 1];
      if (levels == 2) {
        std::fill(p + past, p + cp, T(0));
        p[t] = write[t];
        h[t] = momentum[t] * h[t - 1];
        b[t] = retain[t] * b[t - 1] + h[t];
      }
      pa[t] = size.probe == START ? scale[t] : scale[t] * a[t - 1];
      pb[t] = levels == 2 ? scale[t] * b[t - 1] : T(0);
    }
  }

  // to[c][levels * width] = first x beside second x.
  void spread(int c, const T* x, int width, int levels, const T* first, const T* second, T* to) const {
    for (int t = 0; t < c; ++t)
      for (int j = 0; j < width; j += LANES<T>) {
        const Vec<T> each = load(x + t * width + j);
        store(to + t * levels * width + j, first[t] * each);
        if (levels == 2) store(to + t * levels * width + width + j, second[t] * each);
      }
  }
  void spread_probe(int c, const T* x, int width, T* to) const {
    if (probed_levels()) spread(c, x, width, probed_levels(), pa, pb, to);
  }
  void spread_read(int c, const T* x, int width, T* to) const {
    spread(c, x, width, levels, a - size.reads_before, b - size.reads_before, to);
  }
  void spread_write(int c, const T* x, int width, T* to) const {
    spread(c, x, width, levels, W + (c - 1) * cp, P + (c - 1) * cp, to);
  }

  // Up to where a row of a lower triangle is read: the end of its tile, which is two rows further where the last eight rows
  // are 4 and 4.
  int64_t tile_end(int t) const { return std::min(cp, up((t / ROWS + 1) * ROWS + 2, 2 * LANES<T>)); }

  // G = W * Q K^T, and D = z W' * K K^T; zeros from the diagonal to the end of the tiles, whatever stands there.
  void weigh(int c, Saved<T> saved) {
    for (int t = 0; t < c; ++t) {
      const int64_t row = t * cp, past = up(t + 1, LANES<T>), end = tile_end(t);
      const T *w = W + row - size.reads_before * cp, *earlier = W + row - cp;
      for (int64_t r = 0; r < past; r += LANES<T>) {
        store(G + row + r, load(w + r) * load(saved.match + row + r));
        if (size.probe == TOKEN) store(D + row + r, scale[t] * load(earlier + r) * load(saved.alike + row + r));
      }
      if (past < end) {
        std::fill(G + row + past, G + row + end, T(0));
        if (size.probe == TOKEN) std::fill(D + row + past, D + row + end, T(0));
      }
    }
  }

  // Lanes of three kinds of sums, by level and token: of writes, probes and reads.
  T* lanes(int kind, int level, int t) const {
    return dots + ((kind * levels + level) * int64_t(size.chunk) + t) * LANES<T>;
  }

  // What keys and queries get through the memory that enters and the one that leaves, and the same for their weights.
  void through_entering(int c, const T* K, const T* Q, const T* N, const T* dY, const Sent& sent) {
    std::fill(dots, dots + 3 * levels * int64_t(size.chunk) * LANES<T>, T(0));
    for (int level = 0; level < levels; ++level) {
      const T* const arrives = level ? P + (c - 1) * cp : W + (c - 1) * cp;
      const T *const probes = level ? pb : pa, *const reads = (level ? b : a) - size.reads_before;
      const bool is_probed = level < probed_levels();
      tiles<T>(c, k, [&]<int MR, int NR>(int i, int j) {
        Tile<T, MR, NR> x, y;
        x.zero();
        x.mac(0, v, N + i * v, v, 1, dZT + level * k + j, zt_columns);
        y.zero();
        if (is_probed) y.template mac<true>(0, v, dV + i * v, v, 1, ZT + level * k + j, zt_columns);
        for (int m = 0; m < MR; ++m) {
          Vec<T> of_write{}, of_probe{};
          for (int n = 0; n < NR; ++n) {
            const int64_t at = (i + m) * k + j + n * LANES<T>;
            const Vec<T> key = load(K + at);
            of_write += x.sum[m][n] * key;
            Vec<T> to_key = arrives[i + m] * x.sum[m][n];
            if (is_probed) {
              of_probe += y.sum[m][n] * key;
              to_key += probes[i + m] * y.sum[m][n];
            }
            store(sent.key + at, level ? load(sent.key + at) + to_key : to_key);
          }
          T *const write_lanes = lanes(0, level, i + m), *const probe_lanes = lanes(1, level, i + m);
          store(write_lanes, load(write_lanes) + of_write);
          if (is_probed) store(probe_lanes, load(probe_lanes) + of_probe);
        }
        x.zero();
        x.mac(0, v, dY + i * v, v, 1, ZT + level * k + j, zt_columns);
        for (int m = 0; m < MR; ++m) {
          Vec<T> of_read{};
          for (int n = 0; n < NR; ++n) {
            const int64_t at = (i + m) * k + j + n * LANES<T>;
            of_read += x.sum[m][n] * load(Q + at);
            const Vec<T> to_query = reads[i + m] * x.sum[m][n];
            store(sent.query + at, level ? load(sent.query + at) + to_query : to_query);
          }
          T* const read_lanes = lanes(2, level, i + m);
          store(read_lanes, load(read_lanes) + of_read);
        }
      });
    }
  }

  // The gradients of Q K^T (dL), of K K^T (in dD), of W (in dG) and, through D, of the scale.
  void through_weights(int c, Saved<T> saved, const T* dY) {
    const int columns = int(up(c, LANES<T>));
    lower<T>(c, columns, [&]<int MR, int NR>(int i, int j) {
      Tile<T, MR, NR> x;
      x.zero();
      x.mac(0, v, dY + i * v, v, 1, NT + j, cp);
      x.to(dG + i * cp + j, cp);
      if (size.probe == TOKEN) {
        x.zero();
        x.template mac<true>(0, v, dV + i * v, v, 1, NT + j, cp);
        x.to(dD + i * cp + j, cp);
      }
    });
    // Row t of W gets from the reads of t and from row t + 1 of the system; from the reads of t + 1 where these come first.
    for (int t = 0; t < c; ++t) {
      const int64_t row = t * cp, past = up(t + 1, LANES<T>), end = tile_end(t);
      const T *const w = W + row - size.reads_before * cp, *const earlier = W + row - cp;
      Vec<T> of_scale{};
      for (int64_t r = 0; r < past; r += LANES<T>) {
        const Vec<T> d = load(dG + row + r), of_w = load(saved.match + row + r) * d;
        store(dL + row + r, load(w + r) * d);
        Vec<T> of_earlier{};
        if (size.probe == TOKEN) {
          const Vec<T> system = load(dD + row + r), likeness = load(saved.alike + row + r);
          const Vec<T> past_weight = load(earlier + r);
          of_scale += past_weight * likeness * system;
          store(dD + row + r, scale[t] * past_weight * system);
          of_earlier = scale[t] * likeness * system;
        }
        if (size.reads_before) {
          of_earlier += of_w;
          store(dG + row + r, Vec<T>{});
          if (t) store(dG + row - cp + r, of_earlier);
        } else {
          store(dG + row + r, of_w);
          if (t) store(dG + row - cp + r, load(dG + row - cp + r) + of_earlier);
        }
      }
      dscale[t] = total<T>(of_scale);
      if (past < end) {
        std::fill(dL + row + past, dL + row + end, T(0));
        if (size.probe == TOKEN) std::fill(dD + row + past, dD + row + end, T(0));
      }
    }
  }

  // The gradients of the gates, from the last token to the first.
  void through_decays(int c, const T* Z, const T* dleft, const Sent& sent) {
    constexpr int V = LANES<T>;
    Vec<T> of_a{}, of_b{}, of_h{};
    for (int64_t i = 0; i < int64_t(k) * v; i += V) {
      of_a += load(dleft + i) * load(Z + i);
      if (levels == 2) {
        const Vec<T> entered = load(Z + int64_t(k) * v + i);
        of_b += load(dleft + i) * entered;
        of_h += load(dleft + int64_t(k) * v + i) * entered;
      }
    }
    // Of the rows W_t and P_t, from all that comes after t; the last ones weigh what leaves the chunk.
    std::fill(gW, gW + cp, T(0));
    std::fill(gP, gP + cp, T(0));
    for (int t = 0; t < c; ++t) {
      gW[t] = total<T>(load(lanes(0, 0, t)));
      if (levels == 2) gP[t] = total<T>(load(lanes(0, 1, t)));
    }
    T da = total<T>(of_a), db = total<T>(of_b), dh = total<T>(of_h);
    for (int t = c - 1; t >= 0; --t) {
      const int reader = t + size.reads_before, prober = t + 1;
      if (reader < c) {
        da += total<T>(load(lanes(2, 0, reader)));
        if (levels == 2) db += total<T>(load(lanes(2, 1, reader)));
      }
      if (size.probe == TOKEN && prober < c) {
        da += scale[prober] * total<T>(load(lanes(1, 0, prober)));
        if (levels == 2) db += scale[prober] * total<T>(load(lanes(1, 1, prober)));
      }
      dh += db;
      Vec<T> of_retain{}, of_momentum{};
      T of_write = 0;
      const T *const w = W + (t - 1) * cp, *const p = P + (t - 1) * cp;
      for (int64_t r = 0; r <= t; r += V) {
        const Vec<T> x = load(gW + r) + load(dG + t * cp + r);
        Vec<T> written = x;
        of_retain += x * load(w + r);
        if (levels == 2) {
          written += load(gP + r);
          of_momentum += written * load(p + r);
          store(gP + r, momentum[t] * written);
        }
        store(gW + r, retain[t] * x);
        if (r + V > t) of_write = written[t - r];
      }
      sent.write[t] = of_write;
      sent.retain[t] = total<T>(of_retain) + da * a[t - 1];
      da *= retain[t];
      if (levels == 2) {
        sent.retain[t] += db * b[t - 1];
        sent.momentum[t] = total<T>(of_momentum) + dh * h[t - 1];
        db *= retain[t];
        dh *= momentum[t];
      }
      T of_scale = size.probe == TOKEN ? dscale[t] : T(0);
      if (size.probe == TOKEN) of_scale += a[t - 1] * total<T>(load(lanes(1, 0, t)));
      if (size.probe == TOKEN && levels == 2) of_scale += b[t - 1] * total<T>(load(lanes(1, 1, t)));
      if (size.probe == START) of_scale = total<T>(load(lanes(1, 0, t)));
      sent.scale[t] = of_scale;
    }
  }
};

}  // namespace meristem
