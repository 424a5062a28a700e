// Depthwise convolutions that read pictures where they lie: with masks, which cost next to nothing, a tap loads what it sees
// of sixteen pixels of the outcome, and zeros beyond the edge. Pixels follow one another over the ends of rows, so that narrow
// pictures fill vectors too. Of every other pixel each half of a vector comes out of a load of its own, for which rows that are
// no halves of vectors begin vectors of their own, and anything else is gathered.
#pragma once
#include "depth_taps_rows.h"

namespace {

enum Way { LOADED, HALVED, GATHERED };  // what sixteen pixels see
enum { FEW = 4 };                       // pixels of a row that are gathered as fast

inline bool in_halves(const Convolution& call) { return call.out_width % (LANES / 2) == 0; }

// What the taps see of the pixels of an item, alike for all channels.
struct Sight {
  int64_t first, rows, begin, end;  // rows of the outcome, and those of the picture that they see, up to one
  int64_t taps, vectors;
  Way way;
  int32_t* counts;       // pixels of a vector
  int32_t* inputs;       // of each [LANES]: where in the picture they lie, before a tap
  uint16_t* masks;       // of each [taps]: the lanes that see something of the picture
  int64_t places[TAPS];  // how far from a pixel a tap looks

  Sight(const Convolution& call, int64_t chunk)
      : first(chunk * call.chunk),
        rows(least(call.chunk, call.out_height - first)),
        taps(call.taps_high * call.taps_wide),
        way(call.stride_high * call.stride_wide == 1 && call.x_row == call.out_width ? LOADED
            : call.stride_wide == 2 && (in_halves(call) || call.out_width > FEW)      ? HALVED
                                                                                     : GATHERED) {
    const int64_t top = first * call.stride_high - call.pad_high;
    begin = top < 0 ? 0 : top;
    end = least(top + (rows - 1) * call.stride_high + (call.taps_high - 1) * call.apart_high + 1, call.height);
    for (int64_t tap = 0; tap < taps; tap++)
      places[tap] = (tap / call.taps_wide * call.apart_high - call.pad_high) * call.x_row +
                    tap % call.taps_wide * call.apart_wide - call.pad_wide;
    const bool by_row = way == HALVED && !in_halves(call);
    const int64_t run = by_row ? call.out_width : rows * call.out_width;  // pixels that fill vectors together
    const int64_t of_run = (run + LANES - 1) / LANES;
    vectors = by_row ? rows * of_run : of_run;
    const int64_t each = (LANES + 1) * sizeof(int32_t) + taps * sizeof(uint16_t);
    inputs = static_cast<int32_t*>(scratch(vectors * each));
    counts = inputs + vectors * LANES;
    masks = reinterpret_cast<uint16_t*>(counts + vectors);
    alignas(64) int32_t high_of[LANES], wide_of[LANES];
    for (int lane = 0; lane < LANES; lane++) {
      high_of[lane] = int32_t(by_row ? 0 : lane / call.out_width);
      wide_of[lane] = int32_t(by_row ? lane : lane % call.out_width);
    }
    const __m512i width = _mm512_set1_epi32(int(call.out_width)), one = _mm512_set1_epi32(1);
    __m512i high = _mm512_load_si512(high_of), wide = _mm512_load_si512(wide_of);
    const auto at = [](__m512i place, int64_t stride, int64_t from) {
      return _mm512_add_epi32(_mm512_mullo_epi32(place, _mm512_set1_epi32(int(stride))), _mm512_set1_epi32(int(from)));
    };
    uint16_t* of = masks;
    for (int64_t vector = 0; vector < vectors; vector++) {
      const int64_t left = run - vector % of_run * LANES;
      counts[vector] = int32_t(least(left, LANES));
      const __m512i row = at(high, call.stride_high, 0), column = at(wide, call.stride_wide, 0);
      const __m512i place = _mm512_add_epi32(at(row, call.x_row, 0), column);
      _mm512_storeu_si512(inputs + vector * LANES, place);
      const __mmask16 real = left < LANES ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
      for (int64_t down = 0; down < call.taps_high; down++) {
        const __m512i seen = at(row, 1, top + down * call.apart_high);  // below 0 it is a very large number
        const __mmask16 rows_there = _mm512_mask_cmplt_epu32_mask(real, seen, _mm512_set1_epi32(int(call.height)));
        for (int64_t right = 0; right < call.taps_wide; right++)
          *of++ = _mm512_mask_cmplt_epu32_mask(rows_there, at(column, 1, right * call.apart_wide - call.pad_wide),
                                               _mm512_set1_epi32(int(call.width)));
      }
      if (by_row && left <= LANES) {
        wide = _mm512_load_si512(wide_of);
        high = _mm512_add_epi32(high, one);
        continue;
      }
      if (by_row) {
        wide = _mm512_add_epi32(wide, _mm512_set1_epi32(LANES));
        continue;
      }
      wide = _mm512_add_epi32(wide, _mm512_set1_epi32(int(LANES % call.out_width)));
      high = _mm512_add_epi32(high, _mm512_set1_epi32(int(LANES / call.out_width)));
      const __mmask16 over = _mm512_cmpge_epi32_mask(wide, width);
      wide = _mm512_mask_sub_epi32(wide, over, wide, width);
      high = _mm512_mask_add_epi32(high, over, high, one);
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
      const uint16_t there = masks[look.taps[tap]];
      const float* const at = from + look.places[tap];
      if constexpr (WAY == LOADED) {
        sum += Vector(_mm512_maskz_loadu_ps(there, at)) * weight;
      } else if constexpr (WAY == HALVED) {
        const uint32_t apart = _pdep_u32(there, 0x55555555);
        const Vector first = Vector(_mm512_maskz_loadu_ps(__mmask16(apart), at + inputs[0]));
        const Vector last = Vector(_mm512_maskz_loadu_ps(__mmask16(apart >> 16), at + inputs[LANES / 2]));
        sum += evens(first, last) * weight;
      } else {
        const __m512i lanes = _mm512_loadu_si512(inputs);
        sum += Vector(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, lanes, at, 4)) * weight;
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
    store_some(to, sum, sight.counts[vector]);
    to += sight.counts[vector];
    if (WAY == LOADED) from += LANES;
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

}  // namespace
