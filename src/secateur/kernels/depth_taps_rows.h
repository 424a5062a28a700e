// The variants, in vectors of LANES floats: a lane is a pixel, and what a channel keeps stays in registers while it slides
// over the planes of planes.h. Taps that are not kept are neither loaded nor multiplied. The last vector of a row lies over
// the one before it; of a row that is narrower than a vector what is behind it is written over by the next. All channels
// of an item are laid out first, since to read what has just been written in other pieces makes a processor wait. Where
// something is not finite the item goes through the oracle.
#pragma once
#include "depth_taps.h"
#include "planes.h"

namespace {

enum { TAPS = 64 };  // that a shape has bits for

// What a channel keeps: where its taps look from a pixel's place, and their weights.
struct Kept {
  int64_t count;
  int64_t places[TAPS];
  float weights[TAPS], bias, low, high;
  bool held;
};

// Where a channel is read and written: rows `wide` and `width` from one another.
struct Rows {
  const float* from;
  float* to;
  int64_t count, wide, width;
};

// The outcome of one channel of N taps, or with N < 0 of as many as there are.
template <int N>
void slide_rows(const Kept& kept, const Rows& rows) {
  Vector weights[N > 0 ? N : 1];
  for (int tap = 0; tap < N; tap++) weights[tap] = all(kept.weights[tap]);
  const Vector bias = all(kept.bias), low = all(kept.low), high = all(kept.high);
  const auto sum_of = [&](const float* from) {
    Vector sum = bias;
    if constexpr (N >= 0) {
#pragma GCC unroll 9
      for (int tap = 0; tap < N; tap++) sum += load(from + kept.places[tap]) * weights[tap];
    } else {
      for (int64_t tap = 0; tap < kept.count; tap++) sum += load(from + kept.places[tap]) * kept.weights[tap];
    }
    if (kept.held) {
      sum = sum < low ? low : sum;
      sum = sum > high ? high : sum;
    }
    return sum;
  };
  const int64_t width = rows.width;
  const float* from = rows.from;
  float* to = rows.to;
  for (int64_t row = 0; row < rows.count; row++, from += rows.wide, to += width) {
    if (width >= LANES) {
      for (int64_t pixel = 0; pixel <= width - LANES; pixel += LANES) store(to + pixel, sum_of(from + pixel));
      if (width % LANES) store(to + width - LANES, sum_of(from + width - LANES));
    } else {
      const Vector sum = sum_of(from);
      if ((rows.count - row) * width >= LANES)
        store(to, sum);
      else
        for (int64_t i = 0; i < width; i++) to[i] = sum[i];
    }
  }
}

void slide_any(const Kept& kept, const Rows& rows) {
  switch (kept.count) {
    case 0: return slide_rows<0>(kept, rows);
    case 1: return slide_rows<1>(kept, rows);
    case 2: return slide_rows<2>(kept, rows);
    case 3: return slide_rows<3>(kept, rows);
    case 4: return slide_rows<4>(kept, rows);
    case 5: return slide_rows<5>(kept, rows);
    case 6: return slide_rows<6>(kept, rows);
    case 7: return slide_rows<7>(kept, rows);
    case 8: return slide_rows<8>(kept, rows);
    case 9: return slide_rows<9>(kept, rows);
    default: return slide_rows<-1>(kept, rows);
  }
}

inline Kept kept_of(const Convolution& call, const int64_t* places, int64_t channel) {
  const DepthTaps& weight = *depth_taps_of(&call);
  const float* values = weight.values + weight.begins[channel];
  Kept found;
  found.count = 0;
  found.bias = *values++;
  found.low = call.low;
  found.high = call.high;
  found.held = !call.more && (call.low != -__builtin_inff() || call.high != __builtin_inff());
  for (uint64_t left = uint64_t(weight.shapes[weight.which[channel]]); left; left &= left - 1) {
    found.places[found.count] = places[__builtin_ctzll(left)];
    found.weights[found.count++] = *values++;
  }
  return found;
}

// One item. Returns whether all it saw is finite.
inline bool slide_item(const Convolution& call, const ConvolutionItem& item, const Layout& layout,
                       const int64_t* places) {
  const int64_t count = item.end - item.begin, beyond = layout.reach + 2 * LANES;
  float* const planes = static_cast<float*>(scratch((count * layout.channel + beyond + LANES) * sizeof(float)));
  float* to = planes;
  Vector wild = {};
  for (int64_t channel = item.begin; channel < item.end; channel++)
    to = lay_out(call, layout, x_of(&call, item.picture, channel), to, wild);
  clear_over(to, beyond);
  if (!finite(wild)) return false;
  for (int64_t i = 0; i < count; i++) {
    const int64_t channel = item.begin + i;
    float* y = y_of(&call, call.channels, item.picture, channel) + layout.first * call.y_row;
    const Rows rows = {planes + i * layout.channel, y, layout.rows, layout.wide, call.out_width};
    slide_any(kept_of(call, places, channel), rows);
    if (call.more)
      add_more(&call, call.channels, item.picture, channel, layout.first * call.out_width, layout.rows * call.out_width);
  }
  return true;
}

[[maybe_unused]] void slide(const void* pointer, int64_t begin, int64_t end) {
  const Convolution& call = *static_cast<const Convolution*>(pointer);
  const int64_t channels = depth_taps_of(&call)->channels, taps = call.taps_high * call.taps_wide;
  int64_t places[TAPS], of_chunk = -1;
  Layout layout = {};
  for (int64_t number = begin; number < end; number++) {
    const ConvolutionItem item = convolution_item(&call, number, channels);
    if (item.chunk != of_chunk) {
      of_chunk = item.chunk;
      layout = layout_of(call, item);
      for (int64_t tap = 0; tap < taps; tap++) places[tap] = place_of(call, layout, tap);
    }
    if (!slide_item(call, item, layout, places)) depth_taps_item_f32(&call, number);
  }
}

}  // namespace
