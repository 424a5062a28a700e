// Vectors of LANES floats, which the compiler turns into the instructions of its target, and how floats are copied by
// them. Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include <stdint.h>

#ifndef LANES
#error "LANES is not defined"
#endif
#if LANES == 16
#include <immintrin.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Loose*>(to) = value; }
inline Vector all(float value) { return value - Vector{}; }

// The same for bfloat16, which are upper halves of floats; rounded to the nearest, ties to even, and a NaN stays one.
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Upper __attribute__((vector_size(LANES * 2)));
typedef uint16_t LooseUpper __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vector load(const uint16_t* from) {
  const Upper halves = *reinterpret_cast<const LooseUpper*>(from);
  return Vector(__builtin_convertvector(halves, Bits) << 16);
}

inline void store(uint16_t* to, Vector value) {
  const Bits bits = Bits(value), no_number = Bits(value != value);
  const Bits rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Bits kept = (rounded & ~no_number) | ((bits | 0x400000) & no_number);
  *reinterpret_cast<LooseUpper*>(to) = __builtin_convertvector(kept >> 16, Upper);
}

// The first floats of a vector.
inline Vector load_some(const float* from, int64_t count) {
#if LANES == 16
  return Vector(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#else
  Vector found = {};
  for (int64_t lane = 0; lane < count; lane++) found[lane] = from[lane];
  return found;
#endif
}

inline void store_some(float* to, Vector value, int64_t count) {
#if LANES == 16
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#else
  for (int64_t lane = 0; lane < count; lane++) to[lane] = value[lane];
#endif
}

#if LANES == 16
// A vector moved by a lane towards the end, or the beginning, with what comes in from the one before it, or behind it; zero
// in lanes that are not asked for.
inline Vector shifted_up(Vector some, Vector before, uint16_t lanes = 0xffff) {
  return Vector(_mm512_maskz_alignr_epi32(__mmask16(lanes), __m512i(some), __m512i(before), 15));
}

inline Vector shifted_down(Vector some, Vector behind, uint16_t lanes = 0xffff) {
  return Vector(_mm512_maskz_alignr_epi32(__mmask16(lanes), __m512i(behind), __m512i(some), 1));
}
#endif

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The floats of even number of two vectors.
inline Vector evens(Vector a, Vector b) {
#if LANES == 4
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#elif LANES == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#endif
}

inline Vector odds(Vector a, Vector b) {
#if LANES == 4
  return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#elif LANES == 8
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#endif
}

// Two vectors, a float of each in turn: the first halves, and the second ones.
inline Vector zipped(Vector a, Vector b) {
#if LANES == 4
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#elif LANES == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
}

inline Vector zipped_behind(Vector a, Vector b) {
#if LANES == 4
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#elif LANES == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
}

// As many vectors as one has floats become the columns they stand in.
inline void turn(Vector (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int done = 1; done < LANES; done *= 2) {
    Vector next[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = zipped(rows[i], rows[i + LANES / 2]);
      next[2 * i + 1] = zipped_behind(rows[i], rows[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = next[i];
  }
}

// Copies floats, and adds zero to `wild` for each, or NaN for one that is not finite. In whole vectors, which write over up
// to LANES - 1 floats behind: for what is laid out from front to back, with as much room at its end. Nothing is read from `limit` on, and the floats behind may count for `wild`.
inline void copy_over(float* to, const float* from, int64_t count, const float* limit, Vector& wild) {
  int64_t i = 0;
  for (; i + LANES < count && limit - from - i >= 2 * LANES; i += 2 * LANES) {  // two at once, that sums wait less
    const Vector some = load(from + i), more = load(from + i + LANES);
    store(to + i, some);
    store(to + i + LANES, more);
    wild += some * 0.0f + more * 0.0f;
  }
  for (; i < count && limit - from - i >= LANES; i += LANES) {
    const Vector some = load(from + i);
    store(to + i, some);
    wild += some * 0.0f;
  }
  if (i >= count) return;
  float sum = 0;
  for (; i < count; i++) {
    to[i] = from[i];
    sum += from[i] * 0.0f;
  }
  wild[0] += sum;
}

// Every `step`th float. Two are so common that they have a way of their own.
inline void gather_over(float* to, const float* from, int64_t step, int64_t count, const float* limit, Vector& wild) {
  int64_t i = 0;
  if (step == 2)
    for (; i < count && limit - from - 2 * i >= 2 * LANES; i += LANES) {
      const Vector some = evens(load(from + 2 * i), load(from + 2 * i + LANES));
      store(to + i, some);
      wild += some * 0.0f;
    }
  if (i >= count) return;
  float sum = 0;
  for (; i < count; i++) {
    to[i] = from[i * step];
    sum += to[i] * 0.0f;
  }
  wild[0] += sum;
}

inline void clear_over(float* to, int64_t count) {
  if (count == 1) {  // the padding of most rows
    *to = 0;
    return;
  }
  if (count > 0) store(to, Vector{});  // mostly all of it, and not worth a call of what a loop becomes
  for (int64_t i = LANES; i < count; i += LANES) store(to + i, Vector{});
}

inline bool finite(Vector wild) {
  for (int lane = 0; lane < LANES; lane++)
    if (wild[lane] != 0) return false;
  return true;
}

}  // namespace
