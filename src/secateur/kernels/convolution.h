// A convolution of pictures, whatever its weight is packed as, and the items it is cut into: some rows of the outcome of
// one picture, of some units of the weight. A unit is what its format stores in one piece, and the last axis varies
// fastest.
#pragma once
#include "kernels.h"

struct Convolution {
  const void* weight;  // the struct of its format
  const float* x;      // [pictures, channels, height, width], as far apart as is said below
  float* y;            // [pictures, outputs, out_height, out_width], likewise
  int64_t pictures, channels, height, width, out_height, out_width;
  int64_t taps_high, taps_wide, stride_high, stride_wide, pad_high, pad_wide, apart_high, apart_wide;
  int64_t chunk;          // rows of the outcome in an item; with one tap, no stride and no padding, pixels
  int64_t chunks, parts;  // how many items a picture has, and into how many parts the units are divided
  float low, high;        // what the outcome is held between
  const float* more;      // added to the outcome before it is held, or null: as y, or
  int64_t more_step;      // unless 0, pictures of which every so many-th pixel of a row and of a column is added,
  int64_t more_first, more_channels, more_height, more_width;  // to the outputs from the first on
  int64_t x_row, x_plane;  // floats from one row to the next, and from one channel to the next
  int64_t y_row, y_plane, more_row, more_plane;
  // Between rows that are further apart than they are wide, and for as many rows before and behind a channel, there are
  // zeros: so many columns and rows of x, which a kernel that slides by one pixel and sees no further reads in place. What
  // a kernel writes between the rows of y it clears again.
  int64_t x_around;
  uint16_t* places;  // for each column of the weight where it lies in what is read of x, as its format has it, or null
};

struct ConvolutionItem {
  int64_t picture, chunk, begin, end;  // units [begin, end)
};

static inline struct ConvolutionItem convolution_item(const Convolution* call, int64_t item, int64_t units) {
  const int64_t part = item % call->parts, rest = item / call->parts;
  ConvolutionItem found = {rest / call->chunks, rest % call->chunks, units * part / call->parts,
                           units * (part + 1) / call->parts};
  return found;
}

static inline bool of_pixels(const Convolution* call) {
  return call->taps_high * call->taps_wide == 1 && call->stride_high * call->stride_wide == 1 &&
         call->pad_high + call->pad_wide == 0;
}

// What a tap sees of a channel at a place of the outcome: zero beyond the picture.
static inline float seen(const Convolution* call, const float* channel, int64_t tap, int64_t high, int64_t wide) {
  const int64_t row = high * call->stride_high - call->pad_high + tap / call->taps_wide * call->apart_high;
  const int64_t at = wide * call->stride_wide - call->pad_wide + tap % call->taps_wide * call->apart_wide;
  return row < 0 || row >= call->height || at < 0 || at >= call->width ? 0 : channel[row * call->x_row + at];
}

static inline float held(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

static inline const float* x_of(const Convolution* call, int64_t picture, int64_t channel) {
  return call->x + (picture * call->channels + channel) * call->x_plane;
}

static inline float* y_of(const Convolution* call, int64_t outputs, int64_t picture, int64_t output) {
  return call->y + (picture * outputs + output) * call->y_plane;
}

// The plane that is added to an output of a picture, from its first pixel, or null where none is.
static inline const float* more_of(const Convolution* call, int64_t outputs, int64_t picture, int64_t output) {
  if (!call->more_step) return call->more + (picture * outputs + output) * call->more_plane;
  const int64_t channel = output - call->more_first;
  if (channel < 0 || channel >= call->more_channels) return nullptr;
  return call->more + (picture * call->more_channels + channel) * call->more_plane;
}

// Where in it a pixel of the outcome is.
static inline int64_t more_at(const Convolution* call, int64_t high, int64_t wide) {
  return (high * call->more_row + wide) * (call->more_step ? call->more_step : 1);
}

// Whether what is added lies as the outcome does.
static inline bool more_alike(const Convolution* call) {
  return !call->more_step && call->more_row == call->y_row && call->more_plane == call->y_plane;
}

// Adds what is to be added to pixels [first, first + count) of an output, which are not held yet, and holds them.
static inline void add_more(const Convolution* call, int64_t outputs, int64_t picture, int64_t output, int64_t first,
                            int64_t count) {
  const int64_t step = call->more_step ? call->more_step : 1, width = call->out_width;
  const float* const plane = more_of(call, outputs, picture, output);
  const bool without_gaps = call->y_row == width && more_alike(call);
  float* const channel = y_of(call, outputs, picture, output);
  int64_t high = first / width, wide = first % width;
  for (int64_t left = count, length; left > 0; left -= length, high++, wide = 0) {
    length = without_gaps || left < width - wide ? left : width - wide;
    const float* const more = plane ? plane + more_at(call, high, wide) : nullptr;
    float* const y = channel + high * call->y_row + wide;
    if (!more)
      for (int64_t i = 0; i < length; i++) y[i] = held(y[i], call->low, call->high);
    else if (step == 1)
      for (int64_t i = 0; i < length; i++) y[i] = held(y[i] + more[i], call->low, call->high);
    else
      for (int64_t i = 0; i < length; i++) y[i] = held(y[i] + more[i * step], call->low, call->high);
  }
}
