// Depthwise convolutions that read pictures where they lie: with masks, which cost next to nothing, a tap loads what it sees
// of a vector of pixels of the outcome, and zeros beyond the edge. Pixels follow one another over the ends of rows where what
// they see does, so that narrow pictures fill vectors too; elsewhere a row begins a vector. Of every other pixel each half of a
// vector comes out of a load of its own, and anything else is gathered.
#pragma once
#include <immintrin.h>

#include "depth_taps_rows.h"

namespace {

enum Way { LOADED, HALVED, GATHERED };  // what the pixels of a vector see
enum { FEW = 4 };                       // pixels of a row that are gathered as fast
#if LANES == 16
enum { WIDE = INT32_MAX };
#else
enum { WIDE = 2 * LANES };  // rows that are laid out with padding as fast: a mask has to be made of its bits
#endif

typedef int32_t Places __attribute__((vector_size(LANES * 4)));
typedef uint32_t Unsigned __attribute__((vector_size(LANES * 4)));

inline Places all_places(int64_t value) { return int32_t(value) - Places{}; }

// Bit by bit, the lanes below a limit. Below 0 they are very large numbers.
inline uint32_t below(Places lanes, int64_t limit) {
#if LANES == 16
  return _mm512_cmplt_epu32_mask(__m512i(lanes), _mm512_set1_epi32(int(limit)));
#else
  return uint32_t(_mm256_movemask_ps(__m256(Unsigned(lanes) < Unsigned(all_places(limit)))));
#endif
}

// The lanes whose bits are set, zeros elsewhere: nothing else is read.
inline Vector load_where(const float* from, uint32_t bits) {
#if LANES == 16
  return Vector(_mm512_maskz_loadu_ps(__mmask16(bits), from));
#else
  const Places each = {1, 2, 4, 8, 16, 32, 64, 128};
  return Vector(_mm256_maskload_ps(from, __m256i((all_places(bits) & each) == each)));
#endif
}

inline Vector gather_where(const float* from, const int32_t* places, uint32_t bits) {
#if LANES == 16
  return Vector(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16(bits), _mm512_loadu_si512(places), from, 4));
#else
  const Places each = {1, 2, 4, 8, 16, 32, 64, 128};
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
  return Vector(_mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, at, __m256((all_places(bits) & each) == each), 4));
#endif
}

// What the taps see of the pixels of an item, alike for all channels.
struct Sight {
  int64_t first, rows, begin, end;  // rows of the outcome, and those of the picture that they see, up to one
  int64_t taps, vectors;
  Way way;
  bool by_row;           // a row begins a vector
  int32_t* counts;       // pixels of a vector
  int32_t* inputs;       // of each [LANES]: where in the picture they lie, before a tap
  uint16_t* masks;       // of each [taps]: the lanes that see something of the picture
  int64_t places[TAPS];  // how far from a pixel a tap looks

  Sight(const Convolution& call, int64_t chunk)
      : first(chunk * call.chunk),
        rows(least(call.chunk, call.out_height - first)),
        taps(call.taps_high * call.taps_wide) {
    const bool follow = call.stride_high * call.stride_wide == 1 && call.x_row == call.out_width;
    const bool halves = call.out_width % (LANES / 2) == 0, wide_enough = call.out_width > FEW;
    way = call.stride_wide == 1 && (follow || wide_enough)   ? LOADED
          : call.stride_wide == 2 && (halves || wide_enough) ? HALVED
                                                             : GATHERED;
    by_row = way != GATHERED && !(way == LOADED ? follow : halves);
    const int64_t top = first * call.stride_high - call.pad_high;
    begin = top < 0 ? 0 : top;
    end = least(top + (rows - 1) * call.stride_high + (call.taps_high - 1) * call.apart_high + 1, call.height);
    for (int64_t tap = 0; tap < taps; tap++)
      places[tap] = (tap / call.taps_wide * call.apart_high - call.pad_high) * call.x_row +
                    tap % call.taps_wide * call.apart_wide - call.pad_wide;
    const int64_t run = by_row ? call.out_width : rows * call.out_width;  // pixels that fill vectors together
    const int64_t of_run = (run + LANES - 1) / LANES;
    vectors = by_row ? rows * of_run : of_run;
    const int64_t each = (LANES + 1) * sizeof(int32_t) + taps * sizeof(uint16_t);
    inputs = static_cast<int32_t*>(scratch(vectors * each));
    counts = inputs + vectors * LANES;
    masks = reinterpret_cast<uint16_t*>(counts + vectors);
    Places high = {}, wide = {};
    for (int lane = 0; lane < LANES; lane++) {
      high[lane] = int32_t(by_row ? 0 : lane / call.out_width);
      wide[lane] = int32_t(by_row ? lane : lane % call.out_width);
    }
    const Places beginning = wide;
    uint16_t* of = masks;
    for (int64_t vector = 0; vector < vectors; vector++) {
      const int64_t left = run - vector % of_run * LANES;
      counts[vector] = int32_t(least(left, LANES));
      const Places row = high * int32_t(call.stride_high), column = wide * int32_t(call.stride_wide);
      const Places place = row * int32_t(call.x_row) + column;
      __builtin_memcpy(inputs + vector * LANES, &place, sizeof place);
      const uint32_t real = left < LANES ? (1u << left) - 1 : (1u << LANES) - 1;
      for (int64_t down = 0; down < call.taps_high; down++) {
        const uint32_t there = real & below(row + int32_t(top + down * call.apart_high), call.height);
        for (int64_t right = 0; right < call.taps_wide; right++)
          *of++ = uint16_t(there & below(column + int32_t(right * call.apart_wide - call.pad_wide), call.width));
      }
      if (by_row) {
        wide = left > LANES ? wide + LANES : beginning;
        high += left > LANES ? 0 : 1;
      } else {
        wide += int32_t(LANES % call.out_width);
        high += int32_t(LANES / call.out_width);
        const Places over = wide >= all_places(call.out_width);  // -1 where it is
        wide -= over & int32_t(call.out_width);
        high -= over;
      }
    }
  }
};

// What a channel keeps, of which most others keep the same taps.
struct Look {
  int64_t shape = -1, count = 0;
  int64_t taps[TAPS], places[TAPS];
  const float* weights;
  float bias;

  void take(const DepthTaps& weight, const Sight& sight, int64_t channel) {
    weights = weight.values + weight.begins[channel];
    bias = *weights++;
    if (shape == weight.which[channel]) return;
    shape = weight.which[channel];
    count = 0;
    for (uint64_t left = uint64_t(weight.shapes[shape]); left; left &= left - 1) {
      taps[count] = __builtin_ctzll(left);
      places[count] = sight.places[taps[count]];
      count++;
    }
  }
};

// The outcome of a channel of N taps, or with N < 0 of as many as there are.
template <int N, Way WAY>
void look_over(const Look& look, const Sight& sight, float lowest, float highest, const float* from, float* to) {
  Vector weights[N > 0 ? N : 1];
#pragma GCC unroll 9
  for (int tap = 0; tap < N; tap++) weights[tap] = all(look.weights[tap]);
  const Vector bias = all(look.bias), low = all(lowest), high = all(highest);
  const uint16_t* masks = sight.masks;
  const int32_t* inputs = sight.inputs;
  for (int64_t vector = 0; vector < sight.vectors; vector++, masks += sight.taps, inputs += LANES) {
    Vector sum = bias;
    const auto add = [&](int64_t tap, Vector weight) {
      const uint32_t there = masks[look.taps[tap]];
      const float* const at = from + look.places[tap];
      if constexpr (WAY == LOADED) {
        sum += load_where(at + inputs[0], there) * weight;
      } else if constexpr (WAY == HALVED) {
        const uint32_t apart = _pdep_u32(there, 0x55555555);
        const Vector half = load_where(at + inputs[0], apart & ((1u << LANES) - 1));
        sum += evens(half, load_where(at + inputs[LANES / 2], apart >> LANES)) * weight;
      } else {
        sum += gather_where(at, inputs, there) * weight;
      }
    };
    if constexpr (N >= 0) {
#pragma GCC unroll 9
      for (int tap = 0; tap < N; tap++) add(tap, weights[tap]);
    } else {
      for (int64_t tap = 0; tap < look.count; tap++) add(tap, all(look.weights[tap]));
    }
    sum = sum < low ? low : sum;
    sum = sum > high ? high : sum;
    const int32_t count = sight.counts[vector];
    if (count == LANES)
      store(to, sum);
    else
      store_some(to, sum, count);
    to += count;
  }
}

template <Way WAY>
void look_over_any(const Look& look, const Sight& sight, float low, float high, const float* from, float* to) {
  switch (look.count) {
    case 4: return look_over<4, WAY>(look, sight, low, high, from, to);
    case 9: return look_over<9, WAY>(look, sight, low, high, from, to);
    default: return look_over<-1, WAY>(look, sight, low, high, from, to);
  }
}

// One item. Returns whether all it saw is finite.
inline bool look_over_item(const Convolution& call, const ConvolutionItem& item, const Sight& sight, Look& look) {
  const DepthTaps& weight = *depth_taps_of(&call);
  const int64_t pixels = sight.rows * call.out_width;
  const int64_t seen = sight.end > sight.begin ? (sight.end - sight.begin - 1) * call.x_row + call.width : 0;
  const float unbounded = __builtin_inff();  // what is added comes before the bounds
  const float low = call.more ? -unbounded : call.low, high = call.more ? unbounded : call.high;
  Vector wild = {};
  for (int64_t channel = item.begin; channel < item.end; channel++) {
    const float* const x = x_of(&call, item.picture, channel);
    const float *const from = x + sight.begin * call.x_row, *const corner = x + sight.first * call.stride_high * call.x_row;
    for (int64_t i = 0; i < seen; i += LANES)
      wild += (seen - i < LANES ? load_some(from + i, seen - i) : load(from + i)) * 0.0f;
    float* const y = y_of(&call, call.channels, item.picture, channel) + sight.first * call.out_width;
    look.take(weight, sight, channel);
    if (sight.way == LOADED)
      look_over_any<LOADED>(look, sight, low, high, corner, y);
    else if (sight.way == HALVED)
      look_over_any<HALVED>(look, sight, low, high, corner, y);
    else
      look_over_any<GATHERED>(look, sight, low, high, corner, y);
    if (call.more)
      add_more(&call, call.channels, item.picture, channel, sight.first * call.out_width, pixels);
  }
  return finite(wild);
}

inline void slide_in_place(const void* pointer, int64_t begin, int64_t end) {
  const Convolution& call = *static_cast<const Convolution*>(pointer);
  const int64_t channels = depth_taps_of(&call)->channels;
  for (int64_t number = begin; number < end;) {
    const int64_t chunk = convolution_item(&call, number, channels).chunk;
    const Sight sight(call, chunk);
    Look look;
    for (; number < end; number++) {
      const ConvolutionItem item = convolution_item(&call, number, channels);
      if (item.chunk != chunk) break;
      if (!look_over_item(call, item, sight, look)) depth_taps_item_f32(&call, number);
    }
  }
}

// Where pictures are wide, or the outcome lies with gaps, they are laid out first.
inline void slide_either_way(const void* pointer, int64_t begin, int64_t end) {
  const Convolution& call = *static_cast<const Convolution*>(pointer);
  const bool in_place = call.y_row == call.out_width && call.out_width <= WIDE;
  (in_place ? slide_in_place : slide)(pointer, begin, end);
}

}  // namespace
