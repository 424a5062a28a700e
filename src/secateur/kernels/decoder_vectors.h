// The variants, in vectors of LANES floats: one source for every processor.
#pragma once
#include "decoder.h"
#include "vectors.h"

namespace {

enum {
  AT_ONCE = 4,   // queries that share what is loaded
  PARTS = 4,     // vectors of a value whose sums are in registers
  TOGETHER = 64  // tokens whose values are gone through for one such part after another, from the first cache
};

inline float whole_of(Vector some) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += some[lane];
  return sum;
}

// Of each of as many vectors as one has lanes, the sum of its floats.
inline Vector added_up(Vector (&some)[LANES]) {
#pragma GCC unroll 4
  for (int count = LANES / 2; count; count /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) some[i] = evens(some[2 * i], some[2 * i + 1]) + odds(some[2 * i], some[2 * i + 1]);
  return some[0];
}

// The first numbers of a vector, with zeros behind them.
template <class T>
inline Vector load_first(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T some[LANES] = {};
  for (int64_t i = 0; i < count; i++) some[i] = from[i];
  return load(some);
}

template <class T>
inline void store_first(T* to, Vector value, int64_t count) {
  if (count >= LANES) return store(to, value);
  T some[LANES];
  store(some, value);
  for (int64_t i = 0; i < count; i++) to[i] = some[i];
}

inline Vector rounded(Vector value, float) { return value; }

inline Vector rounded(Vector value, uint16_t) {
  uint16_t some[LANES];
  store(some, value);
  return load(some);
}

template <class T>
void normalize(const void* pointer, int64_t begin, int64_t end) {
  const Normalize& call = *static_cast<const Normalize*>(pointer);
  const int64_t width = call.width;
  const T* const weight = static_cast<const T*>(call.weight);
  for (int64_t row = begin; row < end; row++) {
    const T* const x = static_cast<const T*>(call.x) + row * width;
    const T* const more = call.more ? static_cast<const T*>(call.more) + row * width : nullptr;
    T* const sum = static_cast<T*>(call.sum) + row * width;
    Vector squares[4] = {};  // several, that none waits for the one before it
    for (int64_t i = 0; i < width; i += LANES) {
      Vector some = load_first(x + i, width - i);
      if (more) {
        some = rounded(some + load_first(more + i, width - i), T());
        store_first(sum + i, some, width - i);
      }
      squares[i / LANES % 4] += some * some;
    }
    if (!weight) continue;
    const float mean = whole_of((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(width);
    const Vector scale = all(1 / __builtin_sqrtf(mean + call.epsilon));
    const T* const from = more ? sum : x;
    T* const y = static_cast<T*>(call.y) + row * width;
    for (int64_t i = 0; i < width; i += LANES) {
      const Vector some = rounded(load_first(from + i, width - i) * scale, T());
      store_first(y + i, some * load_first(weight + i, width - i), width - i);
    }
  }
}

template <class T>
void rotate(const void* pointer, int64_t begin, int64_t end) {
  const Rotate& call = *static_cast<const Rotate*>(pointer);
  const int64_t half = call.width / 2;
  for (int64_t text = begin; text < end; text++) {
    const T* const cos = static_cast<const T*>(call.cos) + text * call.apart;
    const T* const sin = static_cast<const T*>(call.sin) + text * call.apart;
    T* x = static_cast<T*>(call.x) + text * call.heads * call.width;
    for (int64_t head = 0; head < call.heads; head++, x += call.width)
      for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        const Vector a = load_first(x + i, left), b = load_first(x + half + i, left);
        const Vector first = rounded(a * load_first(cos + i, left), T()) - rounded(b * load_first(sin + i, left), T());
        const Vector last = rounded(b * load_first(cos + half + i, left), T()) +
                            rounded(a * load_first(sin + half + i, left), T());
        store_first(x + i, first, left);
        store_first(x + half + i, last, left);
      }
  }
}

// e^x for x up to 0, to two units in the last place; 0 where it is below the smallest normal number. A NaN stays one.
inline Vector exponential(Vector x) {
  typedef int32_t Whole __attribute__((vector_size(LANES * 4)));
  const Vector round = all(12582912.0f);  // 3 * 2^22: the last bit of a sum with it is one
  const Vector shifted = x * 1.44269504f + round, power = shifted - round;
  const Vector rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts, the first of few digits
  const float factors[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f};
  Vector sum = all(1 / 5040.0f);
  for (const float factor : factors) sum = sum * rest + factor;
  const Vector scale = Vector((Whole(shifted) - Whole(round) + 127) << 23);
  const Whole none = x < -87.0f;
  return Vector(Whole(sum * scale) & ~none);
}

// Queries of a head, as many as share what is loaded, to what they find.
template <int G, class T>
struct Head {
  const Attend& call;
  const int64_t item, width, wide, tokens, apart;  // wide: width in whole vectors; apart: floats from weights to the next
  const T *keys, *values;
  float* const query;   // [G, wide], multiplied by the scaling
  float* const sums;    // [G, wide]
  float* const weight;  // [G, apart]

  Head(const Attend& all_of_it, int64_t which, float* room)
      : call(all_of_it), item(which), width(call.width), wide((width + LANES - 1) / LANES * LANES), tokens(call.tokens),
        apart((tokens + 2 * LANES - 1) / LANES * LANES), query(room), sums(room + G * wide), weight(room + 2 * G * wide) {
    const int64_t text = item / call.heads, head = item % call.heads;
    keys = static_cast<const T*>(call.keys) + text * call.keys_text + head * call.keys_head;
    values = static_cast<const T*>(call.values) + text * call.values_text + head * call.values_head;
  }

  // Scores of so many tokens, up to as many as there are lanes.
  inline __attribute__((always_inline)) void scores(const T* key, int64_t count, int64_t token) {
    Vector sums[G][LANES];
    for (int64_t at = 0; at < LANES; at++) {
      const T* const from = key + (at < count ? at : 0) * width;  // behind the last the first again, which nobody reads
      Vector mine[G] = {};
      for (int64_t i = 0; i < width; i += LANES) {
        const Vector some = load_first(from + i, width - i);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) mine[g] += some * load(query + g * wide + i);
      }
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) sums[g][at] = mine[g];
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      store(weight + g * apart + token, added_up(sums[g]));
    }
  }

  // Scores to weights, of which the sum is given back.
  float soften(float* weight) {
    const int64_t count = tokens + 1;
    const float* const bias = call.bias ? call.bias + item / call.heads * count : nullptr;
    Vector most = all(-__builtin_inff());
    for (int64_t token = count; token < apart; token++) weight[token] = -__builtin_inff();
    for (int64_t token = 0; token < count; token += LANES) {
      Vector some = load(weight + token);
      if (bias) store(weight + token, some += load_first(bias + token, count - token));
      most = some > most ? some : most;
    }
    float top = most[0];
    for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
    if (top == -__builtin_inff()) top = 0;  // a token that may see nothing gets nothing
    Vector whole = {};
    for (int64_t token = 0; token < count; token += LANES) {
      const Vector some = exponential(load(weight + token) - top);
      store(weight + token, some);
      whole += some;
    }
    return whole_of(whole);
  }

  // Weighted values of some tokens, of P vectors of channels from one on, added to the sums.
  template <int P>
  inline __attribute__((always_inline)) void gather(const T* value, int64_t token, int64_t end, int64_t first) {
    Vector held[G][P];
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) held[g][p] = load(sums + g * wide + first + p * LANES);
    const int64_t left = width - first, next = width;
    const float* weights[G];
    for (int g = 0; g < G; g++) weights[g] = weight + g * apart;
    value += first;
    const auto go = [&](auto read) __attribute__((always_inline)) {
      for (; token < end; token++, value += next)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          const Vector some = read(value + p * LANES, left - p * LANES);
#pragma GCC unroll 4
          for (int g = 0; g < G; g++) held[g][p] += some * weights[g][token];
        }
    };
    if (left >= P * LANES)
      go([](const T* from, int64_t) __attribute__((always_inline)) { return load(from); });
    else
      go([](const T* from, int64_t count) __attribute__((always_inline)) { return load_first(from, count); });
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) store(sums + g * wide + first + p * LANES, held[g][p]);
  }

  void gather(const T* value, int64_t token, int64_t end) {
    int64_t first = 0;
    for (; wide - first >= PARTS * LANES; first += PARTS * LANES) gather<PARTS>(value, token, end, first);
    for (; first < wide; first += LANES) gather<1>(value, token, end, first);
  }

  void run(int64_t member) {
    const int64_t row = (item * call.group + member) * width;
    const T* const from = static_cast<const T*>(call.query) + row;
    for (int g = 0; g < G; g++)
      for (int64_t i = 0; i < width; i += LANES)
        store(query + g * wide + i, load_first(from + g * width + i, width - i) * call.scaling);
    for (int64_t token = 0; token < tokens; token += LANES) scores(keys + token * width, tokens - token, token);
    scores(static_cast<const T*>(call.new_keys) + item * width, 1, tokens);
    float wholes[G];
    for (int g = 0; g < G; g++) wholes[g] = soften(weight + g * apart);
    for (int64_t i = 0; i < G * wide; i++) sums[i] = 0;
    for (int64_t token = 0; token < tokens; token += TOGETHER)
      gather(values + token * width, token, least(token + TOGETHER, tokens));
    gather(static_cast<const T*>(call.new_values) + item * width, tokens, tokens + 1);
    T* const to = static_cast<T*>(call.out) + row;
    for (int g = 0; g < G; g++)
      for (int64_t i = 0; i < width; i += LANES) {
        const Vector found = wholes[g] == 0 ? Vector{} : load(sums + g * wide + i) / wholes[g];
        store_first(to + g * width + i, found, width - i);
      }
  }
};

template <int G, class T>
void run_some(int64_t count, const Attend& call, int64_t item, int64_t member, float* room) {
  if (count >= G)
    Head<G, T>(call, item, room).run(member);
  else if constexpr (G > 1)
    run_some<G - 1, T>(count, call, item, member, room);
}

template <class T>
void attend(const void* pointer, int64_t begin, int64_t end) {
  const Attend& call = *static_cast<const Attend*>(pointer);
  const int64_t floats = AT_ONCE * (2 * call.width + call.tokens + 4 * LANES);
  float* const room = static_cast<float*>(scratch(size_t(floats) * sizeof(float)));
  for (int64_t item = begin; item < end; item++) {
    for (int64_t member = 0; member < call.group; member += AT_ONCE)
      run_some<AT_ONCE, T>(call.group - member, call, item, member, room);
    append<T>(call, item);
  }
}

}  // namespace

#define VARIANT(name, level)                                                                                    \
  extern "C" void name##_f32_##level(const void* call, int64_t begin, int64_t end) { name<float>(call, begin, end); } \
  extern "C" void name##_bf16_##level(const void* call, int64_t begin, int64_t end) { name<uint16_t>(call, begin, end); }
