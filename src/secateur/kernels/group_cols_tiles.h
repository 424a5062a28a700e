// The variants, in vectors of LANES floats that the compiler turns into the instructions of its target: one source for
// every processor. A lane is a pixel, or a row of x.
//
// A tile is as many pixels as V vectors hold. Of one slice of the columns the tile is laid out as a panel, column after
// column, and every group adds to its sums what it keeps of the slice: an input is loaded once for R outputs, and an
// output's weight once for V vectors. Sums wait in memory between slices. Where something is not finite the item goes
// through the oracle, which knows what a zero makes of it.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "group_cols.h"
#include "group_cols_fours.h"
#include "planes.h"

namespace {

#ifdef __aarch64__
enum { WIDEST = 8, REGISTERS = 32 };
#else
enum { WIDEST = 8, REGISTERS = LANES == 16 ? 32 : 16 };
#endif

// Outputs that are computed together, and vectors of pixels, for groups of N rows: what registers hold.
constexpr int vectors(int n) {
  const int most = REGISTERS * 3 / 4 / together(n);
  return most > WIDEST ? WIDEST : most < 1 ? 1 : most;
}

struct Sums {
  const float* bias;  // of the rows, where the sums begin, or null
  const float* from;  // where they go on, rows `pitch` from one another
  float* to;
  int64_t pitch, to_pitch;
  const float* more;  // what is added in the end, laid out as `to`, or null
  bool held;          // between low and high, when all has been added
  float low, high;
};

// Where the inputs of a tile are. In a panel its columns follow one another, WIDE floats apart; with many rows to a
// group an input is used so often that it is read where it lies, at the places of a table.
template <int WIDE>
struct InPanel {
  const float* panel;
  int64_t begin;  // the first column of it
  const float* operator[](int32_t at) const { return panel + (at - begin) * WIDE; }
  static Vector vector(const float* from, int v) { return load(from + v * LANES); }
};

struct InPlace {
  const float* from;
  const int32_t* places;
  const float* operator[](int32_t at) const { return from + places[at]; }
  static Vector vector(const float* from, int v) { return load(from + v * LANES); }
};

// Rows of as many pixels as PER vectors hold, `wide` floats apart: no lane is for a place that is no pixel.
template <int PER>
struct InRows {
  const float* from;
  const int32_t* places;
  int64_t wide;
  const float* operator[](int32_t at) const { return from + places[at]; }
  Vector vector(const float* at, int v) const { return load(at + v / PER * wide + v % PER * LANES); }
};

// R rows of a group of N, over V vectors of pixels.
template <int N, int R, int V, class Inputs>
inline void tile(const Inputs inputs, const int32_t* at, const int32_t* end, const float* values, const Sums& sums) {
  Vector sum[R][V];
#pragma GCC unroll 8
  for (int row = 0; row < R; row++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
      sum[row][v] = sums.bias ? all(sums.bias[row]) : load(sums.from + row * sums.pitch + v * LANES);
  for (; at < end; at++, values += N) {
    const float* from = inputs[*at];
    Vector x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) x[v] = inputs.vector(from, v);
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[row][v] += x[v] * values[row];
  }
  if (sums.more) {
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[row][v] += load(sums.more + row * sums.to_pitch + v * LANES);
  }
  if (sums.held) {
    const Vector low = all(sums.low), high = all(sums.high);
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        sum[row][v] = sum[row][v] < low ? low : sum[row][v];
        sum[row][v] = sum[row][v] > high ? high : sum[row][v];
      }
  }
#pragma GCC unroll 8
  for (int row = 0; row < R; row++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(sums.to + row * sums.to_pitch + v * LANES, sum[row][v]);
}

// What the groups [begin, end) add to the sums of one tile for the columns they keep of a slice.
struct Slice {
  const GroupCols* weight;
  int64_t number, count, begin, end;  // so many slices from one on, and the groups
  float* sums;  // [outputs of these groups, pitch], at the tile's first pixel
  int64_t pitch;
  float* y;  // where the outcome of the first of them goes when this is the last slice, or null to leave it in the sums
  int64_t y_pitch;
  float low, high;
  const float* more;  // what is added to that, laid out as y, or null
  bool back;          // whether a last tile that is not full begins sooner, rather than to end beyond the last pixel
};

// With several slices what a group needs of its stream is far from what the group before it read, so it is asked for
// while some groups before it are computed.
enum { NEXT = 4, LINE = 64 };

template <class T>
inline void fetch(const T* from, int64_t count) {
  const char* at = reinterpret_cast<const char*>(from);
  for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += LINE) __builtin_prefetch(at + i);
}

template <int N, int R, int V, class Inputs>
inline void group(const Slice& slice, const Inputs inputs, int64_t number, const float* bias, const float* values,
                  int64_t output) {
  const GroupCols& weight = *slice.weight;
  const int32_t* begins = weight.begins + slice.number * weight.groups + number;
  const int64_t behind = slice.count * weight.groups;
  const bool last = slice.number + slice.count == weight.slices;
  if (slice.count < weight.slices && number + NEXT < slice.end) {
    const int64_t skipped = begins[NEXT] - begins[0], count = begins[NEXT + behind] - begins[NEXT];
    fetch(weight.at + begins[NEXT], count);
    fetch(values + (skipped + NEXT) * N, count * N);
  }
  for (int row = 0; row < N; row += R) {
    float* kept = slice.sums + (output + row) * slice.pitch;
    const bool away = last && slice.y;
    const Sums sums = {slice.number ? nullptr : bias + row,
                       kept,
                       away ? slice.y + (output + row) * slice.y_pitch : kept,
                       slice.pitch,
                       away ? slice.y_pitch : slice.pitch,
                       away && slice.more ? slice.more + (output + row) * slice.y_pitch : nullptr,
                       last,
                       slice.low,
                       slice.high};
    tile<N, R, V>(inputs, weight.at + *begins, weight.at + begins[behind], values + row, sums);
  }
}

template <int N, int V, class Inputs>
void add(const Slice& slice, const Inputs inputs) {
  const GroupCols& weight = *slice.weight;
  const int32_t *begins = weight.begins, *now = begins + slice.number * weight.groups;
  const int64_t whole = least(slice.end, weight.whole), first = least(slice.begin, weight.whole) * N;
  for (int64_t g = slice.begin; g < whole; g++)
    group<N, together(N), V>(slice, inputs, g, weight.values + (g + begins[g]) * N,
                                   weight.values + (g + 1 + now[g]) * N, g * N - first);
  if (slice.end <= weight.whole) return;
  const int64_t kept = begins[weight.whole];  // by the groups before the single rows
  const float* single = weight.values + (weight.whole + kept) * N - weight.whole - kept;
  const int64_t skipped = slice.begin > weight.whole ? slice.begin - weight.whole : 0;
  for (int64_t g = weight.whole + skipped; g < slice.end; g++)
    group<1, 1, V>(slice, inputs, g, single + g + begins[g], single + g + 1 + now[g],
                         weight.whole * N - first + g - weight.whole - skipped);
}

// As many vectors as the pixels that are left need.
template <int N, int V, class Inputs>
void add_slices(const Slice& slice, const Inputs inputs, int64_t pixels) {
  constexpr int fewer = V - 1;
  if constexpr (fewer > 0)
    if (pixels <= fewer * LANES) return add_slices<N, fewer>(slice, inputs, pixels);
  add<N, V>(slice, inputs);
}

inline int64_t first_output(const GroupCols& weight, int64_t group) {
  return group <= weight.whole ? group * weight.rows : weight.whole * weight.rows + group - weight.whole;
}

// Goes through `pixels` of one item, slice after slice and tile after tile. `away(pixel, full)` says where the outcome
// goes of a tile that is full or not, or null to leave it in the sums; `source` has the inputs, and
//   source.at<N>(begin, end, pixel, count)   says where columns [begin, end) of the `count` pixels from `pixel` on are.
template <int N, class Source, class Away>
void sweep(Slice slice, float* sums, int64_t pixels, Source& source, const Away& away) {
  enum { V = vectors(N), WIDE = V * LANES };
  const GroupCols& weight = *slice.weight;
  const float* const more = slice.more;
  const int64_t together = slice.count;
  for (slice.number = 0; slice.number < weight.slices; slice.number += together) {
    slice.count = least(together, weight.slices - slice.number);
    for (int64_t next = 0; next < pixels; next += WIDE) {
      const int64_t begin = slice.number * weight.slice, count = least(WIDE, pixels - next);
      const int64_t pixel = slice.back && next ? least(next, pixels - (count + LANES - 1) / LANES * LANES) : next;
      slice.sums = sums + pixel;
      slice.y = away(pixel, count == WIDE);
      slice.more = more ? more + pixel : nullptr;
      const int64_t end = least(begin + slice.count * weight.slice, weight.columns);
      add_slices<N, V>(slice, source.template at<N>(begin, end, pixel, count), count);
    }
  }
}

template <class Source, class Away>
void sweep_any(const Slice& slice, float* sums, int64_t pixels, Source& source, const Away& away) {
  switch (slice.weight->rows) {
    case 1: return sweep<1>(slice, sums, pixels, source, away);
    case 2: return sweep<2>(slice, sums, pixels, source, away);
    case 4: return sweep<4>(slice, sums, pixels, source, away);
    case 8: return sweep<8>(slice, sums, pixels, source, away);
    default: return sweep<16>(slice, sums, pixels, source, away);
  }
}

// As many whole rows as V vectors hold, or those that are left.
template <int N, int V, int PER>
void add_rows(const Slice& slice, const InRows<PER>& inputs, int64_t pixels) {
  if constexpr (V > PER)
    if (pixels <= (V - PER) * LANES) return add_rows<N, V - PER, PER>(slice, inputs, pixels);
  add<N, V>(slice, inputs);
}

// Goes through an item whose rows are whole vectors: the outcome goes where it belongs at once.
template <int N, int PER>
bool sweep_rows(Slice slice, float* sums, int64_t pixels, const float* planes, const int32_t* places, int64_t wide) {
  enum { V = vectors(N) / PER * PER };
  if constexpr (V == 0) {
    return false;
  } else {
    const GroupCols& weight = *slice.weight;
    float* const y = slice.y;
    const float* const more = slice.more;
    const int64_t together = slice.count;
    for (slice.number = 0; slice.number < weight.slices; slice.number += together) {
      slice.count = least(together, weight.slices - slice.number);
      for (int64_t pixel = 0; pixel < pixels; pixel += V * LANES) {
        slice.sums = sums + pixel;
        slice.y = y + pixel;
        slice.more = more ? more + pixel : nullptr;
        const InRows<PER> inputs = {planes + pixel / (PER * LANES) * wide, places, wide};
        add_rows<N, V>(slice, inputs, pixels - pixel);
      }
    }
    return true;
  }
}

template <int N>
bool sweep_rows_of(const Slice& slice, float* sums, int64_t pixels, const float* planes, const int32_t* places,
                   int64_t wide, int64_t width) {
  switch (width) {
    case LANES: return sweep_rows<N, 1>(slice, sums, pixels, planes, places, wide);
    case 2 * LANES: return sweep_rows<N, 2>(slice, sums, pixels, planes, places, wide);
    case 4 * LANES: return sweep_rows<N, 4>(slice, sums, pixels, planes, places, wide);
    default: return false;
  }
}

// Whether an item's rows were whole vectors, and it is done.
inline bool sweep_rows_any(const Slice& slice, float* sums, int64_t pixels, const float* planes, const int32_t* places,
                           int64_t wide, int64_t width) {
  switch (slice.weight->rows) {
    case 1: return sweep_rows_of<1>(slice, sums, pixels, planes, places, wide, width);
    case 2: return sweep_rows_of<2>(slice, sums, pixels, planes, places, wide, width);
    case 4: return sweep_rows_of<4>(slice, sums, pixels, planes, places, wide, width);
    case 8: return sweep_rows_of<8>(slice, sums, pixels, planes, places, wide, width);
    default: return sweep_rows_of<16>(slice, sums, pixels, planes, places, wide, width);
  }
}

enum { TILE = WIDEST * LANES, AROUND = 64 };  // of floats: the widest tile, and a cache line's worth

inline int64_t rounded(int64_t floats) { return (floats + TILE + AROUND - 1) / AROUND * AROUND; }

// How many slices to go through at once, so that turns are as even as can be: of those that lie in panels as many as give
// a group enough to do before its sums go to memory and back; where that is too many, or they are read in place, as many
// as stay in the second cache. Measured.
enum { ENOUGH = 10, TOO_FEW = 6, IN_SECOND = 1024 };

inline int64_t evenly(int64_t all, int64_t at_once) {
  const int64_t turns = (all + at_once - 1) / at_once;
  return (all + turns - 1) / turns;
}

inline int64_t slices_in_place(const GroupCols& weight) {
  return evenly(weight.slices, IN_SECOND > weight.slice ? IN_SECOND / weight.slice : 1);
}

inline int64_t slices_in_panels(const GroupCols& weight, int64_t begin, int64_t end) {
  const int32_t* const ends = weight.begins + weight.slices * weight.groups;
  const int64_t kept = ends[end - 1] - weight.begins[begin], all = (end - begin) * weight.slices;
  if (kept < TOO_FEW * all) return slices_in_place(weight);
  return evenly(weight.slices, least(weight.slices, (ENOUGH * all + kept - 1) / kept));
}

inline int64_t panel_of(const GroupCols& weight, int64_t slices) {
  return rounded(least(slices * weight.slice, weight.columns) * TILE);
}

// Floats from one row of sums to the next.
inline int64_t pitch_of(const GroupCols& weight, int64_t pixels) {
  const int64_t wide = vectors(int(weight.rows)) * LANES;
  return (pixels + wide - 1) / wide * wide;
}

// What tiles are held between: nothing yet where something is still to be added.
struct Bounds {
  float low, high;
};

inline Bounds bounds_of(const Convolution& call) {
  const Bounds none = {-__builtin_inff(), __builtin_inff()}, asked = {call.low, call.high};
  return call.more ? none : asked;
}

// One tap, no stride, no padding: a column is a channel, and its pixels lie side by side.
struct Pixels {
  const float* x;
  int64_t size;
  float* panel;
  Vector wild;

  template <int N>
  InPanel<vectors(N) * LANES> at(int64_t begin, int64_t end, int64_t pixel, int64_t count) {
    enum { WIDE = vectors(N) * LANES };
    float* to = panel;
    for (int64_t column = begin; column < end; column++, to += WIDE) {
      copy(to, x + column * size + pixel, count, wild);
      clear(to + count, WIDE - count);  // what lies there could be numbers that a processor is slow with
    }
    return {panel, begin};
  }
};

bool pixels_item(const Convolution& call, const ConvolutionItem& item, float* y, int64_t outputs) {
  const GroupCols& weight = *group_cols_of(&call);
  const int64_t size = call.height * call.width, first = item.chunk * call.chunk;
  const int64_t pixels = least(call.chunk, size - first), pitch = pitch_of(weight, pixels);
  const int64_t slices = slices_in_panels(weight, item.begin, item.end), room = panel_of(weight, slices);
  float* const panel = static_cast<float*>(scratch((room + outputs * pitch) * sizeof(float)));
  float* const sums = panel + room;
  Pixels source = {x_of(&call, item.picture, 0) + first, size, panel, {}};
  const auto away = [&](int64_t pixel, bool full) { return full ? y + first + pixel : nullptr; };
  const Bounds bounds = bounds_of(call);
  const Slice slice = {&weight,    0,           slices,  item.begin, item.end, sums, pitch, y, size,
                       bounds.low, bounds.high, nullptr, false};
  sweep_any(slice, sums, pixels, source, away);
  const int64_t wide = vectors(int(weight.rows)) * LANES, stored = pixels / wide * wide;
  for (int64_t output = 0; output < outputs; output++)
    for (int64_t pixel = stored; pixel < pixels; pixel++) y[output * size + first + pixel] = sums[output * pitch + pixel];
  const int64_t from = first_output(weight, item.begin);
  for (int64_t output = 0; call.more && output < outputs; output++)
    add_more(&call, weight.outputs, item.picture, from + output, first, pixels);
  return finite(source.wild);
}

// What is laid out for any convolution, below: read where it lies, or through panels.
struct Planes {
  const float* planes;
  const int32_t* places;  // [columns], from the place of a pixel

  template <int N>
  InPlace at(int64_t, int64_t, int64_t pixel, int64_t) const {
    return {planes + pixel, places};
  }
};

struct Panels {
  const float* planes;
  const int32_t* places;
  float* panel;

  template <int N>
  InPanel<vectors(N) * LANES> at(int64_t begin, int64_t end, int64_t pixel, int64_t count) const {
    enum { WIDE = vectors(N) * LANES };
    float* to = panel;
    for (int64_t column = begin; column < end; column++, to += WIDE)
      for (int64_t i = 0; i < count; i += LANES) store(to + i, load(planes + places[column] + pixel + i));
    return {panel, begin};
  }
};

// A panel pays where each of its columns is used often, by few outputs at a time, and the planes are too large for the
// nearest cache. Measured: with groups of one from 8 uses on, of two from 16; with four and more never.
inline bool through_panels(const GroupCols& weight, const ConvolutionItem& item, int64_t floats) {
  if (weight.rows > 2 || floats < 1 << 14) return false;
  const int32_t* const ends = weight.begins + weight.slices * weight.groups;
  const int64_t uses = ends[item.end - 1] - weight.begins[item.begin];
  return uses > 8 * weight.rows * weight.columns;
}

// Whether the channels of x lie as this item would lay them out.
inline bool lies_so(const Convolution& call, const Layout& layout) {
  return call.stride_high == 1 && call.stride_wide == 1 && call.x_row == layout.wide && call.x_row > call.width &&
         call.x_around >= call.pad_high && call.x_around >= call.pad_wide;
}

// What an item sees of x: where it lies, or laid out in memory of the item.
struct Seen {
  const float* planes;
  int64_t channel;  // floats from one to the next
  Vector wild;
};

// Whole vectors, which may read what is behind a channel: if that is not finite, the oracle will see that it is not here.
Seen see_in_place(const Convolution& call, const ConvolutionItem& item, const Layout& layout) {
  const float* const first = x_of(&call, item.picture, 0) + (layout.first - call.pad_high) * call.x_row - call.pad_wide;
  const bool all_rows = layout.plane == call.x_plane;
  const int64_t pieces = all_rows ? 1 : call.channels, floats = all_rows ? call.channels * call.x_plane : layout.plane;
  Vector wild[4] = {};
  for (int64_t piece = 0; piece < pieces; piece++) {
    const float* from = first + piece * call.x_plane;
    const float* const end = from + floats;
    for (; end - from >= 4 * LANES; from += 4 * LANES)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) wild[i] += load(from + i * LANES) * 0.0f;
    for (; from < end; from += LANES) wild[0] += load(from) * 0.0f;
  }
  return {first, call.x_plane, (wild[0] + wild[1]) + (wild[2] + wild[3])};
}

Seen see_laid_out(const Convolution& call, const ConvolutionItem& item, const Layout& layout, float* planes,
                  int64_t beyond) {
  Seen seen = {planes, layout.channel, {}};
  float* to = planes;
  for (int64_t c = 0; c < call.channels; c++) to = lay_out(call, layout, x_of(&call, item.picture, c), to, seen.wild);
  clear(to, beyond);
  return seen;
}

// How the pixels of an item, and what is between rows, go straight to y as one run: not at all where y is laid out in
// another way. Vectors beyond the end of the run are avoided by beginning the last tile sooner, unless a tile takes
// several turns or is the only one; then they are written where y has zeros, below the end of a channel and above the
// next, and cleared again.
struct Run {
  bool may, over;
};

inline Run run_of(const Convolution& call, const Layout& layout, int64_t slices) {
  const GroupCols& weight = *group_cols_of(&call);
  const int64_t pixels = layout.rows * layout.wide;
  if (call.y_row != layout.wide) return {false, false};
  if (pixels % LANES == 0 || (weight.slices == slices && pixels > vectors(int(weight.rows)) * LANES)) return {true, false};
  const bool to_the_end = layout.first + layout.rows == call.out_height;
  return {call.y_row > call.out_width && to_the_end && 2 * call.y_row >= LANES, true};
}

inline void clear_between(const Convolution& call, const Layout& layout, float* y, bool over) {
  const int64_t between = call.y_row - call.out_width;
  for (int64_t row = 0; row < layout.rows; row++) {
    float* const zero = y + row * call.y_row + call.out_width;
    for (int64_t i = 0; i < between; i++) {
      zero[i] = 0;
      __asm__ volatile("");  // or the compiler would call memset for a float or two
    }
  }
  if (over) store(y + layout.rows * layout.wide, Vector{});
}

// Any convolution, over the planes of planes.h.
bool planes_item(const Convolution& call, const ConvolutionItem& item, float* y, int64_t outputs) {
  const GroupCols& weight = *group_cols_of(&call);
  const Layout layout = layout_of(call, item);
  const int64_t rows = layout.rows, wide = layout.wide, taps = call.taps_high * call.taps_wide;
  const bool in_place = lies_so(call, layout);
  const int64_t channel = in_place ? call.x_plane : layout.channel;
  if (call.channels * channel > INT32_MAX) return false;
  const int64_t pixels = rows * wide, pitch = pitch_of(weight, pixels), beyond = TILE + layout.reach;
  const bool panels = through_panels(weight, item, call.channels * channel);
  const int64_t slices = panels ? slices_in_panels(weight, item.begin, item.end) : slices_in_place(weight);
  const int64_t room = panels ? panel_of(weight, slices) : 0;
  const int64_t laid = in_place ? 0 : rounded(call.channels * channel + beyond);
  const int64_t needed = room + outputs * pitch + laid;
  float* const panel = static_cast<float*>(scratch(needed * sizeof(float) + weight.columns * sizeof(int32_t)));
  float* const sums = panel + room;
  int32_t* const places = reinterpret_cast<int32_t*>(panel + needed);
  for (int64_t tap = 0; tap < taps; tap++) {
    const int64_t place = place_of(call, layout, tap);
    for (int64_t c = 0; c < call.channels; c++) places[c * taps + tap] = int32_t(c * channel + place);
  }
  const Seen seen = in_place ? see_in_place(call, item, layout)
                             : see_laid_out(call, item, layout, sums + outputs * pitch, beyond);
  if (!finite(seen.wild)) return false;

  const int64_t width = call.out_width, output_from = first_output(weight, item.begin), first = layout.first * width;
  const bool now = !call.more || more_alike(&call);
  float* const to = y + layout.first * call.y_row;
  // What is added comes with the tiles where it lies as they do, and otherwise in the end.
  Slice slice = {&weight,
                 0,
                 slices,
                 item.begin,
                 item.end,
                 sums,
                 pitch,
                 to,
                 call.y_plane,
                 now ? call.low : -__builtin_inff(),
                 now ? call.high : __builtin_inff(),
                 now && call.more ? more_of(&call, weight.outputs, item.picture, output_from) + (to - y) : nullptr,
                 false};
  const auto add_rest = [&] {
    for (int64_t output = 0; !now && output < outputs; output++)
      add_more(&call, weight.outputs, item.picture, output_from + output, first, rows * width);
  };
  const auto go = [&](const auto& away) {
    if (panels) {
      Panels source = {seen.planes, places, panel};
      sweep_any(slice, sums, pixels, source, away);
    } else {
      Planes source = {seen.planes, places};
      sweep_any(slice, sums, pixels, source, away);
    }
  };
  const Run run = run_of(call, layout, slices);
  if (run.may) {
    slice.back = !run.over;
    go([to](int64_t pixel, bool) { return to + pixel; });
    for (int64_t output = 0; output < outputs; output++) clear_between(call, layout, to + output * call.y_plane, run.over);
    add_rest();
    return true;
  }
  if (!panels && call.y_row == width && sweep_rows_any(slice, sums, rows * width, seen.planes, places, wide, width)) {
    add_rest();
    return true;
  }
  const Bounds bounds = bounds_of(call);
  slice.low = bounds.low;
  slice.high = bounds.high;
  slice.more = nullptr;
  slice.back = false;
  go([](int64_t, bool) { return static_cast<float*>(nullptr); });
  for (int64_t output = 0; output < outputs; output++) {
    float* row_to = to + output * call.y_plane;
    const float* from = sums + output * pitch;
    float* const end = row_to + rows * width;
    // Whole vectors where rows follow one another, which write over the beginning of the next, but not beyond the end.
    for (int64_t row = 0; row < rows; row++, row_to += call.y_row, from += wide)
      for (int64_t i = 0; i < width; i += LANES) {
        if (width - i >= LANES || (call.y_row == width && end - row_to - i >= LANES))
          store(row_to + i, load(from + i));
        else
          for (int64_t lane = i; lane < width && lane < i + LANES; lane++) row_to[lane] = from[lane];
      }
    if (call.more) add_more(&call, weight.outputs, item.picture, output_from + output, first, rows * width);
  }
  return true;
}

[[maybe_unused]] void convolve(const void* pointer, int64_t begin, int64_t end) {
  const Convolution& call = *static_cast<const Convolution*>(pointer);
  const GroupCols& weight = *group_cols_of(&call);
  for (int64_t number = begin; number < end; number++) {
    const ConvolutionItem item = group_cols_item(&call, number);
    if (LANES > 4 && weight.fours) {
      if (!fours_item(call, item)) group_cols_item_f32(&call, number);
      continue;
    }
    const int64_t output = first_output(weight, item.begin), outputs = first_output(weight, item.end) - output;
    float* y = y_of(&call, weight.outputs, item.picture, output);
    const bool done =
        of_pixels(&call) ? pixels_item(call, item, y, outputs) : planes_item(call, item, y, outputs);
    if (!done) group_cols_item_f32(&call, number);
  }
}

// The rows of a matrix are the pixels, and so are turned on their side.
struct Rows {
  const float* x;
  int64_t columns;
  float* panel;
  Vector wild;

  template <int N>
  InPanel<vectors(N) * LANES> at(int64_t begin, int64_t end, int64_t row, int64_t count) {
    if (count < vectors(N) * LANES) clear(panel, (end - begin) * vectors(N) * LANES);
    for (int64_t i = 0; i < count; i++) {
      const float* from = x + (row + i) * columns;
      float sum = 0;
      for (int64_t column = begin; column < end; column++) {
        panel[(column - begin) * (vectors(N) * LANES) + i] = from[column];
        sum += from[column] * 0.0f;
      }
      wild[0] += sum;
    }
    return {panel, begin};
  }
};

// x W^T + bias.
[[maybe_unused]] void multiply(const void* pointer, int64_t begin_unit, int64_t end_unit) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const GroupCols& weight = *static_cast<const GroupCols*>(call.weight);
  const int64_t begin = group_of(&weight, begin_unit), end = group_of(&weight, end_unit);
  const int64_t output = first_output(weight, begin), outputs = first_output(weight, end) - output, most = 256;
  const float* const bias = static_cast<const float*>(call.bias);
  const float beyond = __builtin_inff();
  for (int64_t first = 0; first < call.rows; first += most) {
    const int64_t rows = least(most, call.rows - first), pitch = pitch_of(weight, rows);
    const int64_t slices = slices_in_panels(weight, begin, end), room = panel_of(weight, slices);
    float* const panel = static_cast<float*>(scratch((room + outputs * pitch) * sizeof(float)));
    float* const sums = panel + room;
    Rows source = {static_cast<const float*>(call.x) + first * weight.columns, weight.columns, panel, {}};
    const auto away = [](int64_t, bool) { return static_cast<float*>(nullptr); };
    const Slice slice = {&weight, 0, slices, begin, end, sums, pitch, nullptr, 0, -beyond, beyond, nullptr, false};
    sweep_any(slice, sums, rows, source, away);
    for (int64_t row = 0; row < rows; row++) {
      float* y = static_cast<float*>(call.y) + (first + row) * weight.outputs + output;
      for (int64_t i = 0; i < outputs; i++) y[i] = sums[i * pitch + row] + (bias ? bias[output + i] : 0);
    }
    if (!finite(source.wild))
      for (int64_t row = 0; row < rows; row++) group_cols_row_f32(&call, begin, end, first + row);
  }
}

}  // namespace
