// The variants, in vectors of LANES floats that the compiler turns into the instructions of its target: one source for
// every processor. A lane is a pixel, or a row of x. Block after block of channels is laid out, by shifted.h, and groups
// add to their sums what they keep of it, by blocked.h. Where something is not finite the item goes through the oracle,
// which knows what a zero makes of it.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include "blocked_rows.h"
#include "group_cols.h"
#include "shifted.h"

namespace {

#ifdef __wasm__
enum { TABLE = 1 };  // with one tap too: what compiles it makes more of a load than of a multiplication
#else
enum { TABLE = 0 };
#endif
enum {
  OFTEN = 8,      // outputs of a group, for which what is loaded of x need not be in the first cache
  MANY = 1 << 14  // sums: more than stay in the first cache
};

// Where the columns of a block lie, from the first pixel of a tile: with a table of them, without one where they are as far
// apart (a Panel), or where what stands in the place of columns says so, which loads least.
struct AtPlaces {
  enum { AS_ONE = 1, PLACED = 1 };
  const float* from;
  const int32_t* places;
  const float* operator[](uint16_t column) const { return from + places[column]; }
};

struct Placed {
  enum { AS_ONE = 1, PLACED = 1 };
  const float* from;
  const float* operator[](uint16_t place) const { return from + place; }
};

// With one tap, no stride and no padding an item is a run of pixels, and one row of them: here as wide as a whole item.
inline Convolution as_rows(const Convolution& call) {
  Convolution found = call;
  if (of_pixels(&call)) {
    const int64_t pixels = call.height * call.width;
    found.height = found.out_height = found.chunk = 1;
    found.x_row = found.y_row = found.more_row = pixels;
    found.width = found.out_width = least(call.chunk, pixels);
  }
  return found;
}

// What one block adds, over all tiles of so many pixels. Where an input that is loaded serves many outputs, groups go over
// all tiles in turn, so that what they keep is read once; where it serves one, all groups go over what is near.
template <int N, class Inputs>
void add_tiles(const KBlocked& weight, int64_t block, const ConvolutionItem& item, int64_t pixels, Inputs inputs,
               Tile tile) {
  enum { V = most(N), A = abreast(N) };
  const int64_t first = item.begin / A, last = (item.end + A - 1) / A;
  float* const sums = tile.sums;
  const float *const more = tile.more, *const planes = inputs.from;
  const int64_t wide = V * LANES, stretch = N < OFTEN ? last - first : 1;
  for (int64_t begin = first; begin < last; begin += stretch)
    for (int64_t pixel = 0; pixel < pixels; pixel += wide) {
      tile.count = least(wide, pixels - pixel);
      tile.sums = sums + pixel;
      tile.more = more ? more + pixel : nullptr;
      inputs.from = planes + pixel;
      add_some<float, uint16_t, N, V>(weight, block, begin, begin + stretch, inputs, tile);
    }
}

template <class Inputs>
void add_tiles_of(int64_t rows, const KBlocked& weight, int64_t block, const ConvolutionItem& item, int64_t pixels,
                  const Inputs& inputs, const Tile& tile) {
  switch (rows) {
    case 1: return add_tiles<1>(weight, block, item, pixels, inputs, tile);
    case 2: return add_tiles<2>(weight, block, item, pixels, inputs, tile);
    case 4: return add_tiles<4>(weight, block, item, pixels, inputs, tile);
    case 8: return add_tiles<8>(weight, block, item, pixels, inputs, tile);
    default: return add_tiles<16>(weight, block, item, pixels, inputs, tile);
  }
}

// Rows of sums, which are wider than those of y or further apart, go to y.
inline void take_rows(const Convolution& call, const Shifted& layout, const float* from, float* to, const float* more) {
  const Vector low = all(call.low), high = all(call.high);
  for (int64_t row = 0; row < layout.rows; row++, from += layout.pitch, to += call.y_row) {
    for (int64_t i = 0; i < call.out_width; i += LANES) {
      const int64_t some = least(LANES, call.out_width - i);
      Vector sum = load(from + i);
      if (more) {
        __builtin_prefetch(more + i + call.y_plane);  // the next output's: planes lie apart as pages do
        sum += load_some(more + i, some);
      }
      sum = sum < low ? low : sum;
      sum = sum > high ? high : sum;
      store_some(to + i, sum, some);
    }
    if (more) more += call.y_row;
  }
}

// Adds to rows of one output what is to be added in the end, and holds them: every other pixel by vectors, as small networks
// have it, and the rest one by one.
inline void add_to_rows(const Convolution& call, const ConvolutionItem& item, int64_t output, const Shifted& layout,
                        int64_t skipped, int64_t pixels) {
  const GroupCols& weight = *group_cols_of(&call);
  const int64_t width = call.out_width;
  if (of_pixels(&call)) return add_more(&call, weight.outputs, item.picture, output, skipped, pixels);
  const int64_t first = layout.first * width, count = layout.rows * width;
  if (call.more_step != 2) return add_more(&call, weight.outputs, item.picture, output, first, count);
  const float* const more = more_of(&call, weight.outputs, item.picture, output);
  float* y = y_of(&call, weight.outputs, item.picture, output) + layout.first * call.y_row;
  const Vector low = all(call.low), high = all(call.high);
  for (int64_t row = 0; row < layout.rows; row++, y += call.y_row)
    for (int64_t i = 0; i < width; i += LANES) {
      const int64_t some = least(LANES, width - i);
      Vector sum = widened(y + i, some);
      if (more) {
        const float* const from = more + more_at(&call, layout.first + row, 0);
        sum += evens(of_row(from, 2 * i, call.more_width), of_row(from, 2 * i + LANES, call.more_width));
      }
      sum = sum < low ? low : sum;
      sum = sum > high ? high : sum;
      narrowed(sum, y + i, some);
    }
}

// What is computed of x with zeros between its rows goes to y likewise, which has zeros there again in the end.
inline void clear_between(const Convolution& call, int64_t rows, float* y) {
  const int64_t between = call.y_row - call.out_width;
  for (int64_t row = 0; row + 1 < rows; row++) {
    float* const zero = y + row * call.y_row + call.out_width;
    for (int64_t i = 0; i < between; i++) {
      zero[i] = 0;
      __asm__ volatile("");  // or the compiler would call memset for a float or two
    }
  }
}

// How an item lays out what it sees, alike for all items; copies of nothing say that it reads x where it lies.
inline Shifted seen_by(const Convolution& given, const Convolution& call, const ConvolutionItem& item) {
  const GroupCols& weight = *group_cols_of(&given);
  const KBlocked& blocked = *weight.blocked;
  const int64_t blocks = (blocked.inputs + blocked.depth - 1) / blocked.depth;
  const int64_t beside = abreast(int(weight.rows));
  const int64_t uses = blocked.offsets[blocks * blocked.padded / beside] * beside;
  // Whole vectors of pixels stay where they are, unless each is loaded often and channels are so far apart that they push
  // one another out of the cache.
  const bool vectors = of_pixels(&given) && call.out_width % LANES == 0;
  const bool few_loads = vectors && (weight.rows >= 4 || call.x_plane / LANES % 4 || uses < 8 * call.channels);
  return few_loads || lies_so(call) ? as_it_lies(call, item) : shifted_of(call, item, uses);
}

// Whether places of columns, of so many channels, from that of the first tap on, are numbers of 16 bits.
inline bool fits(const Convolution& call, const Shifted& layout, int64_t channels) {
  const int64_t last = call.taps_high * call.taps_wide - 1;
  const int64_t reach = layout.copy ? layout.channel : shifted_place(call, layout, last) - shifted_place(call, layout, 0) + 1;
  return (channels - 1) * layout.channel + reach <= UINT16_MAX + 1;
}

// An item. Returns whether all it saw is finite; if not y is to be computed again.
bool convolve_item(const Convolution& given, const ConvolutionItem& item) {
  const GroupCols& weight = *group_cols_of(&given);
  const KBlocked& blocked = *weight.blocked;
  Convolution call = as_rows(given);
  ConvolutionItem here = item;
  if (item.end == weight.groups) here.end = blocked.padded;
  if (of_pixels(&given)) here.chunk = 0;
  const Shifted layout = seen_by(given, call, here);
  int64_t skipped = 0;  // pixels of the one row
  if (of_pixels(&given)) {
    skipped = item.chunk * given.chunk;
    call.out_width = call.width = least(given.chunk, call.x_row - skipped);
  }
  const int64_t taps = call.taps_high * call.taps_wide, each = blocked.depth / taps;  // channels in a block
  const int64_t blocks = (blocked.inputs + blocked.depth - 1) / blocked.depth;
  const bool in_place = !layout.copy, placed = call.places && fits(call, layout, each);
  const int64_t first = item.begin * weight.rows, last = least(here.end * weight.rows, weight.outputs);
  const int64_t pixels = (layout.rows - 1) * layout.pitch + call.out_width;
  const bool alike = !call.more || more_alike(&given);
  const bool between = in_place && call.y_row == layout.pitch;  // y has zeros where x has
  // Many planes whole kilobytes apart would push one another out of the caches while they hold sums. Groups that go over all
  // tiles in turn read and write few planes at a time.
  const bool apart = weight.rows < OFTEN && call.y_plane % 256 == 0 && (last - first) * pixels > MANY;
  const bool dense = layout.rows == 1 || (layout.pitch == call.out_width && call.y_row == layout.pitch);
  const bool one_run = between || (dense && !apart);
  const int64_t pitch = up(pixels, 2 * LANES) + LANES;
  const int64_t laid = in_place ? 0 : up(each * layout.channel + 4 * LANES, 2 * LANES);
  const int64_t floats = laid + SPARE + (one_run ? 0 : (last - first) * pitch);
  if (laid > INT32_MAX || each * call.x_plane > INT32_MAX) return false;
  float* const planes = static_cast<float*>(scratch(floats * sizeof(float) + blocked.depth * sizeof(int32_t)));
  float* const spare = planes + laid;
  int32_t* const places = reinterpret_cast<int32_t*>(planes + floats);
  for (int64_t tap = 0; tap < taps && !placed; tap++) {
    const int64_t place = shifted_place(call, layout, tap);
    for (int64_t c = 0; c < each; c++) places[c * taps + tap] = int32_t(c * layout.channel + place);
  }
  const int64_t offset = layout.first * call.y_row + skipped;
  float* const y = y_of(&given, weight.outputs, item.picture, first) + offset;
  const float* const more = call.more && alike ? more_of(&given, weight.outputs, item.picture, first) + offset : nullptr;
  if (!alike) {  // what is added comes in the end, and bounds after it
    call.low = -__builtin_inff();
    call.high = __builtin_inff();
  }
  const Within bounds = within(given);
  KBlocked at_places = blocked;
  at_places.columns = call.places;
  Vector wild = {};
  Tile tile = {first, weight.outputs, one_run ? y : spare + SPARE, one_run ? call.y_plane : pitch, 0, weight.biases,
               false, one_run ? more : nullptr, call.low, call.high, spare};
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t channel = block * each, behind = least(call.channels, channel + each);
    const float* const x = x_of(&given, item.picture, channel) + skipped;
    for (int64_t c = channel; c < behind; c++) {
      const float* const from = x + (c - channel) * call.x_plane;
      if (in_place)
        see(call, layout, from, wild);
      else
        lay_out_shifted(call, layout, bounds, from, planes + (c - channel) * layout.channel, wild);
    }
    tile.last = one_run && block == blocks - 1;
    const float* const from = in_place ? x + layout.first * call.x_row : planes;
    if (placed)
      add_tiles_of(weight.rows, at_places, block, here, pixels, Placed{from + shifted_place(call, layout, 0)}, tile);
    else if (taps == 1 && !TABLE)
      add_tiles_of(weight.rows, blocked, block, here, pixels, Panel{from + places[0], layout.channel}, tile);
    else
      add_tiles_of(weight.rows, blocked, block, here, pixels, AtPlaces{from, places}, tile);
    tile.bias = nullptr;
  }
  for (int64_t i = 0; i < last - first; i++) {
    if (between)
      clear_between(call, layout.rows, y + i * call.y_plane);
    else if (!one_run)
      take_rows(call, layout, tile.sums + i * pitch, y + i * call.y_plane, more ? more + i * call.y_plane : nullptr);
    if (!alike) add_to_rows(given, item, first + i, layout, skipped, pixels);
  }
  return finite(wild);
}

[[maybe_unused]] void convolve(const void* pointer, int64_t begin, int64_t end) {
  const Convolution& call = *static_cast<const Convolution*>(pointer);
  for (int64_t item = begin; item < end; item++)
    if (!convolve_item(call, group_cols_item(&call, item))) group_cols_item_f32(&call, item);
}

// Fills `places` for blocks [begin, end), where they fit.
[[maybe_unused]] void place(const void* pointer, int64_t begin, int64_t end) {
  const Convolution& given = *static_cast<const Convolution*>(pointer);
  const Convolution call = as_rows(given);
  const GroupCols& weight = *group_cols_of(&given);
  const KBlocked& blocked = *weight.blocked;
  const int64_t taps = call.taps_high * call.taps_wide, beside = abreast(int(weight.rows));
  const Shifted layout = seen_by(given, call, group_cols_item(&given, 0));
  if (!fits(call, layout, blocked.depth / taps)) return;
  const int64_t first = shifted_place(call, layout, 0);
  const uint16_t* const columns = static_cast<const uint16_t*>(blocked.columns);
  const int64_t* const offsets = blocked.offsets;
  for (int64_t i = offsets[begin * blocked.padded / beside] * beside;
       i < offsets[end * blocked.padded / beside] * beside; i++) {
    const int64_t below = shifted_place(call, layout, columns[i] % taps) - first;
    call.places[i] = uint16_t(columns[i] / taps * layout.channel + below);
  }
}

// x W^T + bias, for units [begin, end).
[[maybe_unused]] void multiply(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const GroupCols& weight = *static_cast<const GroupCols*>(call.weight);
  const KBlocked& blocked = *weight.blocked;
  const int64_t first = group_of(&weight, begin), last = group_of(&weight, end);
  const int64_t behind = last == weight.groups ? blocked.padded : last;
  switch (weight.rows) {
    case 1: multiply_blocked<float, uint16_t, 1>(call, blocked, first, behind, weight.biases); break;
    case 2: multiply_blocked<float, uint16_t, 2>(call, blocked, first, behind, weight.biases); break;
    case 4: multiply_blocked<float, uint16_t, 4>(call, blocked, first, behind, weight.biases); break;
    case 8: multiply_blocked<float, uint16_t, 8>(call, blocked, first, behind, weight.biases); break;
    default: multiply_blocked<float, uint16_t, 16>(call, blocked, first, behind, weight.biases);
  }
  for (int64_t row = 0; row < call.rows; row++)
    if (!finite(static_cast<const float*>(call.x) + row * weight.columns, weight.columns))
      group_cols_row_f32(&call, first, last, row);
}

}  // namespace
