// What an item of a convolution sees, laid out so that whole vectors of what a tap sees begin where vectors of memory do:
// a copy of a channel for every tap of a row, shifted by it, with zeros beyond the picture. A load that lies across two
// lines of the cache costs two.
#pragma once
#include "planes.h"

namespace {

struct Shifted {
  int64_t first, rows;    // of the outcome
  int64_t phases;         // of rows, by the stride
  int64_t pitch, high;    // floats from a row of a copy to the next, and its rows
  int64_t copy, channel;  // floats of one copy, and of all of a channel
  int64_t half;           // from all copies of a channel to the same once more, moved by half a vector; 0 without
};

inline int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

inline int64_t rows_below(const Convolution& call, int64_t tap_high) { return tap_high * call.apart_high / call.stride_high; }

inline Shifted shifted_at(const Convolution& call, int64_t first, int64_t rows, int64_t pitch, bool twice) {
  const int64_t reach = (call.taps_high - 1) * call.apart_high, high = rows + reach / call.stride_high;
  // Copies as far apart as those of a whole chunk, so that places are the same in all of them.
  const int64_t whole = least(call.chunk, call.out_height) + reach / call.stride_high;
  const int64_t phases = least(call.stride_high, reach + 1), copy = up(whole * pitch + LANES, LANES);
  const int64_t copies = phases * call.taps_wide * copy, all = twice ? 2 * copies : copies;
  // Channels an odd number of lines apart, so that they do not push one another out of the cache.
  return {first, rows, phases, pitch, high, copy, up(all, 2 * LANES) + LANES, twice ? copies : 0};
}

// Whether x is read where it lies: with zeros where a kernel that slides by one pixel sees beyond it.
inline bool lies_so(const Convolution& call) {
  const bool zeros = call.x_around && call.x_around >= call.pad_high && call.x_around >= call.pad_wide;
  return zeros && call.stride_high == 1 && call.stride_wide == 1;
}

// One copy, whose first column is that of the padding.
inline Shifted as_it_lies(const Convolution& call, const ConvolutionItem& item) {
  const int64_t first = item.chunk * call.chunk, rows = least(call.chunk, call.out_height - first);
  return {first, rows, 1, call.x_row, rows, 0, call.x_plane, 0};
}

// Rows lie one after the other, once or with all copies moved by half a vector beside them, or a whole number of vectors
// apart, whichever takes least time: `uses` is how often a pixel of the layout is multiplied. To copy a vector takes about
// three times as long as to multiply one, or twice as long as one that begins anywhere; to copy what is copied once more
// three times that, and of wide pictures it never pays.
inline Shifted shifted_of(const Convolution& call, const ConvolutionItem& item, int64_t uses) {
  const int64_t first = item.chunk * call.chunk, rows = least(call.chunk, call.out_height - first);
  const int64_t width = call.out_width, wider = up(width, LANES), copies = call.taps_wide * call.channels;
  int64_t split = 0, quarter = 0;  // rows of the kernel that begin anywhere, and not in the middle of a vector either
  for (int64_t tap = 0; tap < call.taps_high; tap++) {
    split += rows_below(call, tap) * width % LANES != 0;
    quarter += rows_below(call, tap) * width % (LANES / 2) != 0;
  }
  const int64_t each = 2 * uses * call.taps_high, copied = 6 * copies * call.taps_high;
  const int64_t close = width * (each + uses * split + copied), apart = wider * (each + copied);
  const int64_t once = least(close, apart), twice = width * (each + uses * quarter + 4 * copied);
  if (width <= 2 * LANES && twice < once) return shifted_at(call, first, rows, width, true);
  return shifted_at(call, first, rows, close <= apart ? width : wider, false);
}

// Where in the copies of its channel a tap finds what the first pixel sees.
inline int64_t shifted_place(const Convolution& call, const Shifted& layout, int64_t tap) {
  if (!layout.copy) {  // as it lies
    const int64_t below = tap / call.taps_wide * call.apart_high - call.pad_high;
    return below * layout.pitch + tap % call.taps_wide * call.apart_wide - call.pad_wide;
  }
  const int64_t tap_high = tap / call.taps_wide, phase = tap_high * call.apart_high % call.stride_high;
  const int64_t below = rows_below(call, tap_high) * layout.pitch;
  const int64_t moved = layout.half && below % LANES == LANES / 2 ? layout.half - LANES / 2 : 0;
  return (phase * call.taps_wide + tap % call.taps_wide) * layout.copy + below + moved;
}

// Where a picture ends: nothing is read beyond.
struct Within {
  const float *begin, *end;
};

inline Within within(const Convolution& call) {
  return {call.x, x_of(&call, call.pictures, 0) - call.x_plane + (call.height - 1) * call.x_row + call.width};
}

// Rows that lie in the outcome's pitch are copied as one run, shifted by `right` columns, and then cleared where that leads
// into the row before or behind.
inline void shift_run(const Convolution& call, const float* from, float* to, int64_t rows, int64_t right) {
  const int64_t pitch = call.x_row, count = rows * pitch;
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) store(to + i + v * LANES, load(from + i + v * LANES));
  }
  for (; i < count; i += LANES) store(to + i, load(from + i));
  for (int64_t row = 0; row < rows; row++) {
    float* const begin = to + row * pitch;
    for (int64_t column = 0; column < -right; column++) {
      begin[column] = 0;
      __asm__ volatile("");  // or the compiler would call memset for a float or two
    }
    for (int64_t column = pitch - right; column < pitch; column++) {
      begin[column] = 0;
      __asm__ volatile("");
    }
  }
}

// One copy, from front to back: rows from `top` of the picture on, and columns from `right` on.
inline void shift(const Convolution& call, const Shifted& layout, const Within& bounds, const float* channel, float* to,
                  int64_t top, int64_t right) {
  const int64_t pitch = layout.pitch, high = layout.high;
  const int64_t low = least(high, top < 0 ? -top : 0), behind = least(high, call.height - top), rows = behind - low;
  const float* const from = channel + (top + low) * call.x_row + right;
  const bool by_one = call.stride_high == 1 && call.stride_wide == 1;
  const bool as_one = by_one && call.x_row == pitch && call.width == pitch && right > -pitch && right < pitch;
  if (as_one && rows > 0 && from >= bounds.begin && bounds.end - from >= rows * pitch + LANES) {
    if (low) clear_over(to, low * pitch);
    shift_run(call, from, to + low * pitch, rows, right);
    clear_over(to + behind * pitch, (high - behind) * pitch);
  } else {
    Vector unused = {};
    lay_plane(call, channel, top, right, high, pitch, bounds.end, to, unused);
  }
  store(to + high * pitch, Vector{});  // a tile that is not full reads as far
}

// All copies of a channel, one by one.
inline void shift_channel(const Convolution& call, const Shifted& layout, const Within& bounds, const float* channel,
                          float* to) {
  for (int64_t phase = 0; phase < layout.phases; phase++)
    for (int64_t tap = 0; tap < call.taps_wide; tap++, to += layout.copy)
      shift(call, layout, bounds, channel, to, layout.first * call.stride_high + phase - call.pad_high,
            tap * call.apart_wide - call.pad_wide);
}

// Adds NaN to `wild` where something of the rows that an item sees of a channel is not finite.
inline void see(const Convolution& call, const Shifted& layout, const float* channel, Vector& wild) {
  const int64_t top = layout.first * call.stride_high - call.pad_high;
  const int64_t bottom = top + (layout.rows - 1) * call.stride_high + (call.taps_high - 1) * call.apart_high + 1;
  const float* from = channel + (top > 0 ? top : 0) * call.x_row;
  const float* const end = channel + (least(bottom, call.height) - 1) * call.x_row + call.width;
  Vector sums[4] = {};
  for (; end - from >= 4 * LANES; from += 4 * LANES)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) sums[v] += load(from + v * LANES) * 0.0f;
  for (; end - from >= LANES; from += LANES) sums[0] += load(from) * 0.0f;
  if (end > from) sums[1] += load_some(from, end - from) * 0.0f;
  wild += (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Columns [at, at + LANES) of a row, zeros beyond its end.
inline Vector of_row(const float* row, int64_t at, int64_t width) {
  return width - at >= LANES ? load(row + at) : width > at ? load_some(row + at, width - at) : Vector{};
}

#if LANES == 16
// The three copies of kernels that see a pixel and its neighbours, from one load of each, where rows begin with vectors.
template <int STEP>
inline void shift_neighbours(const Convolution& call, const Shifted& layout, const float* channel, float* to, Vector& wild) {
  const int64_t width = call.width, copy = layout.copy;
  Vector seen = {}, more = {};
  for (int64_t phase = 0; phase < layout.phases; phase++, to += 3 * copy) {
    int64_t row = layout.first * call.stride_high + phase - call.pad_high;
    for (int64_t i = 0; i < layout.high; i++, row += call.stride_high) {
      float* at = to + i * layout.pitch;
      float* const end = at + layout.pitch;
      if (row < 0 || row >= call.height) {
        for (; at < end; at += LANES) {
          store(at, Vector{});
          store(at + copy, Vector{});
          store(at + 2 * copy, Vector{});
        }
        continue;
      }
      const float* const from = channel + row * call.x_row;
      if constexpr (STEP == 1) {
        Vector last = {}, now = of_row(from, 0, width);
        for (int64_t column = LANES; at < end; at += LANES, column += LANES) {
          const Vector next = of_row(from, column, width);
          __builtin_prefetch(from + column - LANES + call.x_plane);  // the next channel's, which may lie in another page
          seen += now * 0.0f;
          store(at, shifted_up(now, last));
          store(at + copy, now);
          store(at + 2 * copy, shifted_down(now, next));
          last = now;
          now = next;
        }
      } else {
        Vector last = {};
        for (int64_t column = 0; at < end; at += LANES, column += 2 * LANES) {
          const Vector a = of_row(from, column, width), b = of_row(from, column + LANES, width), odd = odds(a, b);
          __builtin_prefetch(from + column + call.x_plane);
          __builtin_prefetch(from + column + LANES + call.x_plane);
          seen += a * 0.0f;
          more += b * 0.0f;
          store(at, shifted_up(odd, last));
          store(at + copy, evens(a, b));
          store(at + 2 * copy, odd);
          last = odd;
        }
      }
    }
    for (int64_t i = 0; i < 3; i++) store(to + i * copy + layout.high * layout.pitch, Vector{});  // read by the last tile
  }
  wild += seen + more;
}

// The same of pictures as wide as half a vector, two rows at a time.
inline void shift_halves(const Convolution& call, const Shifted& layout, const float* channel, float* to, Vector& wild) {
  const int64_t top = layout.first - call.pad_high, copy = layout.copy, wide = LANES / 2;
  const int64_t low = least(layout.high, top < 0 ? -top : 0);
  const int64_t last_row = least(layout.high, call.height - top), behind = last_row > low ? last_row : low;
  for (int64_t i = 0; i < 3; i++)
    for (int64_t row = 0; row < low; row++) store(to + i * copy + row * wide, Vector{});
  const float* from = channel + (top + low) * wide;
  float* at = to + low * wide;
  Vector last = {}, seen = {};
  int64_t left = (behind - low) * wide;
  for (Vector now = of_row(from, 0, left); left > 0; left -= LANES, from += LANES, at += LANES) {
    const Vector next = of_row(from, LANES, left);
    seen += now * 0.0f;
    store(at, shifted_up(now, last, 0xfefe));
    store(at + copy, now);
    store(at + 2 * copy, shifted_down(now, next, 0x7f7f));
    last = now;
    now = next;
  }
  for (int64_t i = 0; i < 3; i++)
    for (int64_t row = behind; row <= layout.high; row += 2) store(to + i * copy + row * wide, Vector{});
  wild += seen;
}

// And of pictures a vector wide, every other pixel of two rows.
inline void shift_halves_by_two(const Convolution& call, const Shifted& layout, const float* channel, float* to,
                                Vector& wild) {
  const int64_t copy = layout.copy, step = call.stride_high;
  Vector seen = {}, more = {};
  for (int64_t phase = 0; phase < layout.phases; phase++, to += 3 * copy) {
    int64_t row = layout.first * step + phase - call.pad_high;
    float* at = to;
    for (int64_t i = 0; i < layout.high; i += 2, row += 2 * step, at += LANES) {
      const int64_t next = i + 1 < layout.high ? row + step : call.height;
      const Vector a = row >= 0 && row < call.height ? load(channel + row * call.x_row) : Vector{};
      const Vector b = next >= 0 && next < call.height ? load(channel + next * call.x_row) : Vector{};
      const Vector odd = odds(a, b);
      seen += a * 0.0f;
      more += b * 0.0f;
      store(at, shifted_up(odd, Vector{}, 0xfefe));
      store(at + copy, evens(a, b));
      store(at + 2 * copy, odd);
    }
    for (int64_t i = 0; i < 3; i++) store(to + i * copy + layout.high * layout.pitch, Vector{});
  }
  wild += seen + more;
}
#endif

// The one copy of kernels that see no neighbours beside.
inline void shift_none(const Convolution& call, const Shifted& layout, const float* channel, float* to, Vector& wild) {
  const int64_t width = call.width, pitch = layout.pitch;
  Vector seen[2] = {};
  for (int64_t phase = 0; phase < layout.phases; phase++, to += layout.copy) {
    int64_t row = layout.first * call.stride_high + phase - call.pad_high;
    for (int64_t i = 0; i < layout.high; i++, row += call.stride_high) {
      float* const at = to + i * pitch;
      if (row < 0 || row >= call.height) {
        clear_over(at, pitch);
        continue;
      }
      const float* const from = channel + row * call.x_row;
      int64_t column = 0;
      for (; width - column >= 2 * LANES; column += 2 * LANES) {
        const Vector now = load(from + column), next = load(from + column + LANES);
        seen[0] += now * 0.0f;
        seen[1] += next * 0.0f;
        store(at + column, now);
        store(at + column + LANES, next);
      }
      for (; column < pitch; column += LANES) {
        const Vector now = of_row(from, column, width);
        seen[0] += now * 0.0f;
        store(at + column, now);
      }
    }
    store(to + layout.high * pitch, Vector{});
  }
  wild += seen[0] + seen[1];
}

// The copies of a channel. Adds NaN to `wild` where something that is seen is not finite.
inline void lay_out_once(const Convolution& call, const Shifted& layout, const Within& bounds, const float* channel,
                         float* to, Vector& wild) {
  if (call.taps_wide == 1 && call.stride_wide == 1 && call.pad_wide == 0)
    return shift_none(call, layout, channel, to, wild);
#if LANES == 16
  const bool neighbours = call.taps_wide == 3 && call.apart_wide == 1 && call.pad_wide == 1;
  if (neighbours && layout.pitch % LANES == 0) {
    if (call.stride_wide == 1) return shift_neighbours<1>(call, layout, channel, to, wild);
    if (call.stride_wide == 2) return shift_neighbours<2>(call, layout, channel, to, wild);
  }
  if (neighbours && layout.pitch == LANES / 2) {
    if (call.stride_wide == 2 && call.width == LANES) return shift_halves_by_two(call, layout, channel, to, wild);
    const bool by_one = call.stride_wide == 1 && call.stride_high == 1;
    if (by_one && call.width == LANES / 2 && call.x_row == LANES / 2)
      return shift_halves(call, layout, channel, to, wild);
  }
#endif
  see(call, layout, channel, wild);
  shift_channel(call, layout, bounds, channel, to);
}

// And all of them once more, moved by half a vector, where rows of the kernel see pixels that begin in the middle of one.
inline void lay_out_shifted(const Convolution& call, const Shifted& layout, const Within& bounds, const float* channel,
                            float* to, Vector& wild) {
  lay_out_once(call, layout, bounds, channel, to, wild);
  for (int64_t i = 0; i < layout.half; i += LANES) store(to + layout.half + i, load(to + LANES / 2 + i));
}

}  // namespace
