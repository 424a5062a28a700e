// What an item of a convolution sees, laid out with its padding and, with a stride, apart by it, so that what a tap sees
// of all pixels lies side by side: a pixel's place is its row times the width of a plane, and its column; places that are
// none, at the end of each row, may be computed and are not kept.
#pragma once
#include "convolution.h"
#include "vectors.h"

namespace {

struct Layout {
  int64_t first, rows;  // of the outcome
  int64_t phases_high, phases_wide;
  int64_t high, wide, plane, channel;  // of a plane, and floats of it and of all planes of a channel
  int64_t reach;                       // floats that may be read beyond the last plane
};

inline Layout layout_of(const Convolution& call, const ConvolutionItem& item) {
  const int64_t sh = call.stride_high, sw = call.stride_wide;
  const int64_t reach_high = (call.taps_high - 1) * call.apart_high, reach_wide = (call.taps_wide - 1) * call.apart_wide;
  const int64_t phases_high = least(sh, reach_high + 1), phases_wide = least(sw, reach_wide + 1);
  const int64_t first = item.chunk * call.chunk, rows = least(call.chunk, call.out_height - first);
  // Without a stride the padding at the end of a row is that at the beginning of the next.
  const int64_t shared = sw == 1 ? least(call.pad_wide, reach_wide) : 0;
  const int64_t high = rows + reach_high / sh, wide = call.out_width + reach_wide / sw - shared;
  const int64_t plane = high * wide;
  const Layout found = {first, rows, phases_high, phases_wide, high, wide, plane, plane * phases_high * phases_wide,
                        reach_wide + wide};
  return found;
}

// Where in the planes of a channel a tap finds what the first pixel sees.
inline int64_t place_of(const Convolution& call, const Layout& layout, int64_t tap) {
  const int64_t down = tap / call.taps_wide * call.apart_high, right = tap % call.taps_wide * call.apart_wide;
  const int64_t sh = call.stride_high, sw = call.stride_wide;
  return (down % sh * layout.phases_wide + right % sw) * layout.plane + down / sh * layout.wide + right / sw;
}

// `high` rows of a channel, `wide` floats each, one after the other: from row `top` of the picture on and column `left`, by
// the strides, with zeros where there is no picture. Adds NaN to `wild` where something, or what lies beside it, is not
// finite. LANES floats behind the last row may be written, and nothing is read from `limit` on.
inline float* lay_plane(const Convolution& call, const float* channel, int64_t top, int64_t left, int64_t high, int64_t wide,
                        const float* limit, float* to, Vector& wild) {
  const int64_t sh = call.stride_high, sw = call.stride_wide;
  const int64_t begin = least(wide, left < 0 ? (sw - 1 - left) / sw : 0);
  const int64_t end = least(wide, call.width <= left ? 0 : (call.width - left + sw - 1) / sw);
  const int64_t behind = end < begin ? begin : end;
  const float* x = channel + top * call.x_row + left + begin * sw;
  for (int64_t row = 0, from = top; row < high; row++, to += wide, from += sh, x += sh * call.x_row) {
    if (from < 0 || from >= call.height) {
      clear_over(to, wide);
      continue;
    }
    clear_over(to, begin);
    if (sw == 1)
      copy_over(to + begin, x, end - begin, limit, wild);
    else
      gather_over(to + begin, x, sw, end - begin, limit, wild);
    clear_over(to + behind, wide - behind);
  }
  return to;
}

// Lays a channel out, from front to back. Returns where the next channel goes.
inline float* lay_out(const Convolution& call, const Layout& layout, const float* channel, float* to, Vector& wild) {
  const float* const limit = x_of(&call, call.pictures, 0) - call.x_plane + call.height * call.x_row;
  for (int64_t phase_high = 0; phase_high < layout.phases_high; phase_high++)
    for (int64_t phase_wide = 0; phase_wide < layout.phases_wide; phase_wide++)
      to = lay_plane(call, channel, layout.first * call.stride_high + phase_high - call.pad_high, phase_wide - call.pad_wide,
                     layout.high, layout.wide, limit, to, wild);
  return to;
}

}  // namespace
