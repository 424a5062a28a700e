// Rows of x times panels of a bitmap, by vectors. A step is one expand instruction; its sixteen lanes are multiplied
// with what they meet in x, held in all of them, and added to the sums of the lanes, so nothing is ever added across a
// register. The values are read once for eight rows, in order, ahead of their use.
//
// How a step is multiplied is the caller's: `By` has the types Value, of the weights and of y, Input, of x as `Rows` is
// given it, and Word, of a mask; Weights and Inputs, what a step and the inputs it meets become; and `add`. From ONCE rows
// on, where that is not zero, panels are expanded once for many rows.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "bitmap.h"
#include "streams.h"
#include "wide.h"

namespace {

// The masks of two steps of 16-bit values that follow one another, read as one word: on Zen 5 a move to a mask register and
// a shift there take less than two moves, from memory or from registers. (Of floats, whose masks are half as long, it is no
// faster.) The compiler is kept from reading memory again for any of it.
struct Two {
  uint64_t both;
  __mmask64 mask;

  explicit Two(const uint32_t* masks) {
    __builtin_memcpy(&both, masks, sizeof(both));
    __asm__("" : "+r"(both));
    mask = both;
    __asm__("" : "+Yk"(mask));
  }

  uint32_t first() const { return uint32_t(mask); }
  uint32_t second() const { return uint32_t(_kshiftri_mask64(mask, 32)); }
  int64_t before() const { return __builtin_popcountll(both & 0xffffffff); }  // the second
  int64_t count() const { return __builtin_popcountll(both); }
};

template <class By>
struct Rows {
  typedef typename By::Value Value;
  typedef typename By::Kept Kept;
  typedef typename By::Input Input;
  typedef typename By::Word Word;
  enum { DEPTH = sizeof(Word) / 2 };
  enum { AHEAD = 2048, MASKS_AHEAD = 1024 };  // bytes: far enough for memory, near enough to stay in the first cache
  enum { NEAR = 1 << 22 };  // bytes of x for which panels are expanded once

  const Matmul& call;
  const Bitmap& weight;
  const Input* x;  // zero from the last input to the end of its step
  int64_t stride;
  const void* scales;           // [outputs], or null
  typename By::Weights* strip;  // room for what some panels become, or null

  // x with the inputs of a step of rows that go together side by side, so that they are few lines of the first cache:
  // rows that lie a large power of two apart would push one another out of it.
  static Rows turned(const Matmul& call, const Bitmap& weight, const void* scales) {
    const int64_t inputs = weight.inputs, steps = (inputs + DEPTH - 1) / DEPTH, whole = inputs / DEPTH;
    const int64_t stride = DEPTH * steps, room = (call.rows * stride * sizeof(Input) + 63) / 64 * 64;
    const bool once = By::ONCE && call.rows >= By::ONCE;
    char* const memory = static_cast<char*>(scratch(room + (once ? By::ABREAST * steps * sizeof(typename By::Weights) : 0)));
    Input* const x = reinterpret_cast<Input*>(memory);
    const Input* from = static_cast<const Input*>(call.x);
    for (int64_t row = 0, count; row < call.rows; row += count, from += count * inputs) {
      count = together(call.rows - row);
      Input* to = x + row * stride;
      for (int64_t step = 0; step < whole; step++)
        for (int64_t r = 0; r < count; r++, to += DEPTH)
          __builtin_memcpy(to, from + r * inputs + DEPTH * step, DEPTH * sizeof(Input));
      if (whole < steps)
        for (int64_t r = 0; r < count; r++, to += DEPTH)
          for (int64_t i = 0, at = DEPTH * whole; i < DEPTH; i++, at++) to[i] = at < inputs ? from[r * inputs + at] : 0;
    }
    return {call, weight, x, stride, scales, once ? reinterpret_cast<typename By::Weights*>(memory + room) : nullptr};
  }

  static void prefetch(const Kept* values, const Word* masks) {
    _mm_prefetch(reinterpret_cast<const char*>(masks) + MASKS_AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD + 64, _MM_HINT_T0);
  }

  // One step of each panel. Weights and values are taken by reference, and stay in registers when inlined.
  template <int PANELS, int N, int CHAINS, bool WHOLE>
  static inline __attribute__((always_inline)) void one(const Word* masks, int64_t next, const Kept* (&values)[PANELS],
                                                        const Input* in, int64_t each, __m512 (&sum)[PANELS][2][N],
                                                        int chain) {
    typename By::Weights weights[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
      if constexpr (WHOLE) {
        weights[p] = By::weights(_mm512_loadu_si512(values[p]));
        values[p] += LANES * DEPTH;
        continue;
      }
      const Word mask = masks[p * next];
      weights[p] = By::weights(expanded(mask, values[p]));
      uint64_t bits = mask;  // counted in a whole register: half of one would be joined to what is in the other half
      __asm__("" : "+r"(bits));
      values[p] += __builtin_popcountll(bits);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) {
      const typename By::Inputs inputs = By::inputs(in + n * each);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; p++) By::add(sum[p][chain % CHAINS][n], sum[p][CHAINS - 1][n], weights[p], inputs);
    }
  }

  // Two steps of each panel, for one row.
  template <int PANELS, int CHAINS>
  static inline __attribute__((always_inline)) void two(const Word* masks, int64_t next, const Kept* (&values)[PANELS],
                                                        const Input* in, __m512 (&sum)[PANELS][2][1]) {
    typename By::Weights first[PANELS], second[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
      const Two both(masks + p * next);
      first[p] = By::weights(expanded(both.first(), values[p]));
      second[p] = By::weights(expanded(both.second(), values[p] + both.before()));
      values[p] += both.count();
    }
    const typename By::Inputs here = By::inputs(in), after = By::inputs(in + DEPTH);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) By::add(sum[p][0][0], sum[p][CHAINS - 1][0], first[p], here);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) By::add(sum[p][CHAINS - 1][0], sum[p][CHAINS - 1][0], second[p], after);
  }

  // N rows of x times some panels at once, `apart` from one to the next; of few rows a panel has two sums in turn.
  template <int PANELS, int N>
  void some(int64_t panel, int64_t apart, int64_t row) const {
    if (N > 1 || call.rows > 1 || asks_ahead())  // of several rows it always pays
      asking<PANELS, N, true>(panel, apart, row);
    else
      asking<PANELS, N, N != 1>(panel, apart, row);
  }

  template <int PANELS, int N, bool ASKS>
  void asking(int64_t panel, int64_t apart, int64_t row) const {
    if (whole(weight, DEPTH, PANELS, panel, apart))
      these<PANELS, N, ASKS, true>(panel, apart, row);
    else
      these<PANELS, N, ASKS, false>(panel, apart, row);
  }

  template <int PANELS, int N, bool ASKS, bool WHOLE>
  void these(int64_t panel, int64_t apart, int64_t row) const {
    enum { CHAINS = N <= 2 && PANELS <= By::TWICE ? 2 : 1 };
    const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH, next = apart * steps;
    const Word* masks = reinterpret_cast<const Word*>(weight.masks) + panel * steps;
    const Kept* values[PANELS];
    __m512 sum[PANELS][2][N];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
      values[p] = static_cast<const Kept*>(weight.values) + weight.offsets[panel + p * apart];
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum[p][0][n] = sum[p][1][n] = _mm512_setzero_ps();
    }
    const Input* in = x + row * stride;
    const int64_t each = By::TURNED ? int64_t(DEPTH) : stride, ahead = By::TURNED ? N * DEPTH : DEPTH;
    int64_t step = 0;
    for (; step + 2 <= steps; step += 2, in += 2 * ahead, masks += 2) {
#pragma GCC unroll 4
      for (int p = 0; p < PANELS && ASKS; p++) prefetch(values[p], masks + p * next);
      if constexpr (N == 1 && !WHOLE && sizeof(Word) == 4) {
        two<PANELS, CHAINS>(masks, next, values, in, sum);
      } else {
        one<PANELS, N, CHAINS, WHOLE>(masks, next, values, in, each, sum, 0);
        one<PANELS, N, CHAINS, WHOLE>(masks + 1, next, values, in + ahead, each, sum, 1);
      }
    }
    if (step < steps) one<PANELS, N, CHAINS, WHOLE>(masks, next, values, in, each, sum, 0);
    finish<PANELS, N, CHAINS>(sum, panel, apart, row);
  }

  // The sums of some rows and panels, with scales and biases, become y.
  template <int PANELS, int N, int CHAINS>
  inline __attribute__((always_inline)) void finish(const __m512 (&sum)[PANELS][2][N], int64_t panel, int64_t apart,
                                                    int64_t row) const {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
      const int64_t at = (panel + p * apart) * LANES;
      const __mmask16 lanes = first(weight.outputs - at);
      const __m512 scale = scales ? load(static_cast<const Value*>(scales) + at, lanes) : _mm512_set1_ps(1);
      const __m512 bias = call.bias ? load(static_cast<const Value*>(call.bias) + at, lanes) : _mm512_setzero_ps();
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        const __m512 all = CHAINS == 2 ? _mm512_add_ps(sum[p][0][n], sum[p][1][n]) : sum[p][0][n];
        store(static_cast<Value*>(call.y) + (row + n) * weight.outputs + at, lanes, _mm512_fmadd_ps(all, scale, bias));
      }
    }
  }

  // Panels as they are multiplied, a step of each after the other.
  template <int PANELS>
  void expand(int64_t panel, int64_t apart) const {
    const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH;
    for (int p = 0; p < PANELS; p++) {
      const Word* const masks = reinterpret_cast<const Word*>(weight.masks) + (panel + p * apart) * steps;
      const Kept* values = static_cast<const Kept*>(weight.values) + weight.offsets[panel + p * apart];
      for (int64_t step = 0; step < steps; step++) {
        prefetch(values, masks + step);
        strip[step * PANELS + p] = By::weights(expanded(masks[step], values));
        values += __builtin_popcountll(masks[step]);
      }
    }
  }

  // N rows of x times panels that were expanded.
  template <int PANELS, int N>
  void many(int64_t panel, int64_t apart, int64_t row) const {
    const int64_t steps = (weight.inputs + DEPTH - 1) / DEPTH;
    __m512 sum[PANELS][2][N];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) sum[p][0][n] = _mm512_setzero_ps();
    const Input* in = x + row * stride;
    const typename By::Weights* weights = strip;
    const int64_t each = By::TURNED ? int64_t(DEPTH) : stride, ahead = By::TURNED ? N * DEPTH : DEPTH;
    for (int64_t step = 0; step < steps; step++, in += ahead, weights += PANELS)
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) {
        const typename By::Inputs inputs = By::inputs(in + n * each);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) By::add(sum[p][0][n], sum[p][0][n], weights[p], inputs);
      }
    finish<PANELS, N, 1>(sum, panel, apart, row);
  }

  // How many of some rows share what is expanded: a power of two up to MOST.
  static int64_t together(int64_t rows) {
    int64_t count = By::MOST;
    while (count > rows) count /= 2;
    return count;
  }

  // Rows [row, end), those left over in smaller numbers, of panels that were expanded before or are as they lie.
  template <int PANELS, bool EXPANDED, int N = By::MOST>
  void all(int64_t panel, int64_t apart, int64_t row, int64_t end) const {
    for (; row + N <= end; row += N)
      if constexpr (EXPANDED)
        many<PANELS, N>(panel, apart, row);
      else
        some<PANELS, N>(panel, apart, row);
    if constexpr (N > 1) all<PANELS, EXPANDED, N / 2>(panel, apart, row, end);
  }

  template <int PANELS, bool EXPANDED = false>
  int64_t abreast(int64_t begin, int64_t end, int64_t row, int64_t behind) const {
    return ::abreast<PANELS>(begin, end, [&](int64_t panel, int64_t apart) {
      if constexpr (EXPANDED) expand<PANELS>(panel, apart);
      all<PANELS, EXPANDED>(panel, apart, row, behind);
    });
  }

  void panels(int64_t begin, int64_t end) const {
    if constexpr (By::ONCE)
      if (strip) {
        int64_t near = NEAR / (stride * int64_t(sizeof(Input))) / By::MOST * By::MOST;  // rows of x
        if (near < By::ONCE) near = By::ONCE;
        for (int64_t row = 0; row < call.rows; row += near) {
          const int64_t behind = row + near < call.rows ? row + near : call.rows;
          abreast<1, true>(abreast<By::ABREAST, true>(begin, end, row, behind), end, row, behind);
        }
        return;
      }
    if (call.rows == 1)
      begin = ::abreast<STREAMS>(begin, end, [&](int64_t panel, int64_t apart) { some<STREAMS, 1>(panel, apart, 0); });
    if (call.rows >= By::MOST) begin = abreast<By::ABREAST>(begin, end, 0, call.rows);
    begin = abreast<2>(begin, end, 0, call.rows);
    abreast<1>(begin, end, 0, call.rows);
  }
};

}  // namespace
