// Sixteen steps of a bitmap expand into a tile of the matrix unit as they stand: row r holds, for sixteen outputs, the
// two inputs 2r and 2r + 1, which is what the unit takes as its second operand. x is the first operand where it lies.
//
// From two to 32 rows of x, tiles are expanded into two buffers in turn, so that the unit works on one while the other is
// filled, and the weight streams past once, some panels at once. For more rows a few panels are expanded whole and used for
// all rows.
#include "bitmap.h"
#include "streams.h"
#include "tile_words.h"
#include "tiles.h"
#include "wide.h"

extern "C" Kernel bitmap_matmul_bf16_avx512;

namespace {

enum { TILE_INPUTS = 32, MOST_BUFFER = 1 << 20 };

// Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights; even ones are for the first 16 rows of x, odd ones for the
// rest, or where there is none for the same rows and more weights.
void configure(int rows) {
  Shape shape = {};
  shape.palette = 1;
  const int low = rows < 16 ? rows : 16, high = rows > 16 ? rows - 16 : low;
  for (int tile = 0; tile < 8; tile++) {
    shape.bytes[tile] = 64;
    shape.rows[tile] = tile > 5 ? 16 : tile % 2 ? high : low;
  }
  _tile_loadconfig(&shape);
}

// The steps of consecutive panels, expanded a tile at a time.
struct Stream : TileWords {
  int64_t steps, left;  // of a panel, and of this one

  void begin(const Bitmap& weight, int64_t panel) {
    steps = left = (weight.inputs + 1) / 2;
    const int64_t panels = (weight.outputs + LANES - 1) / LANES;
    TileWords::begin(reinterpret_cast<const uint32_t*>(weight.masks) + panel * steps,
                     static_cast<const bf16*>(weight.values) + weight.offsets[panel], weight.offsets[panels],
                     panels * steps * 32);
  }

  void expand(bf16* to) {
    const int count = left < TILE_STEPS ? int(left) : int(TILE_STEPS);
    TileWords::expand(to, count);
    left -= count;
    if (!left) left = steps;
  }
};

// x tile by tile: up to 32 rows are copied into that order, since rows that lie a large power of two apart would push
// one another out of the first cache.
struct Ordered {
  const bf16* x;  // [tiles, rows, 32], zero beyond the last input
  int64_t tiles;

  Ordered(const Matmul& call, const Bitmap& weight, bf16* room)
      : x(room), tiles((weight.inputs + TILE_INPUTS - 1) / TILE_INPUTS) {
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t left = weight.inputs - tile * TILE_INPUTS;
      const __mmask32 there = left < TILE_INPUTS ? (1u << left) - 1 : 0xffffffff;
      const bf16* from = static_cast<const bf16*>(call.x) + tile * TILE_INPUTS;
      for (int64_t row = 0; row < call.rows; row++, room += TILE_INPUTS)
        _mm512_storeu_si512(room, _mm512_maskz_loadu_epi16(there, from + row * weight.inputs));
    }
  }
};

// x where it lies, but for the last columns where they do not fill a tile, which are copied into one of their own: what
// lies beyond a row must not be read, and zero times what lies there could be NaN.
struct Inputs {
  const bf16* x;
  const bf16* last;  // [rows, 32], or null when every tile is full
  int64_t inputs, tiles;

  Inputs(const Matmul& call, const Bitmap& weight, bf16* room)
      : x(static_cast<const bf16*>(call.x)),
        last(nullptr),
        inputs(weight.inputs),
        tiles((weight.inputs + TILE_INPUTS - 1) / TILE_INPUTS) {
    const int64_t over = inputs % TILE_INPUTS, whole = inputs - over;
    if (!over) return;
    for (int64_t row = 0; row < call.rows; row++)
      _mm512_storeu_si512(room + row * TILE_INPUTS,
                          _mm512_maskz_loadu_epi16((1u << over) - 1, x + row * inputs + whole));
    last = room;
  }

  const bf16* at(int64_t row, int64_t tile) const {
    return last && tile == tiles - 1 ? last + row * TILE_INPUTS : x + row * inputs + tile * TILE_INPUTS;
  }

  int64_t stride(int64_t tile) const { return 2 * (last && tile == tiles - 1 ? int64_t(TILE_INPUTS) : inputs); }
};

// Sums of sixteen rows of x, as a tile stores them, to y with the bias added.
void write(const Matmul& call, const Bitmap& weight, const float* sums, int64_t panel, int64_t row, int64_t rows) {
  const int64_t at = panel * LANES;
  const __mmask16 lanes = first(weight.outputs - at);
  const __m512 bias = call.bias ? load(static_cast<const bf16*>(call.bias) + at, lanes) : _mm512_setzero_ps();
  bf16* y = static_cast<bf16*>(call.y) + row * weight.outputs + at;
  for (int64_t r = 0; r < rows; r++, y += weight.outputs)
    store(y, lanes, _mm512_add_ps(_mm512_load_ps(sums + 16 * r), bias));
}

// A tile's number is a part of the instruction: the sums of panel p, of its first 16 rows of x and of the rest.
#define EACH_PANEL(DO) DO(0, 0, 1) DO(1, 2, 3) DO(2, 1, 1) DO(3, 3, 3)

// Some panels at once, `apart` from one to the next; a tile of x is loaded for all. There are four sums, of one half of 32
// rows of x, or of two.
template <int HALVES, int PANELS>
void few_rows(const Matmul& call, const Bitmap& weight, const Ordered& x, int64_t panel, int64_t apart) {
  static_assert(HALVES * PANELS <= 4, "there are four tiles for sums");
  enum { BUFFERS = PANELS > 1 ? 2 : 4 };  // a tile is loaded when what was stored last is long in the cache
  alignas(64) bf16 buffer[BUFFERS][PANELS][TILE_VALUES];
  alignas(64) float sums[256];
  Stream streams[PANELS];
  for (int p = 0; p < PANELS; p++) streams[p].begin(weight, panel + p * apart);
  for (int64_t tile = 0; tile < BUFFERS - 1 && tile < x.tiles; tile++)
    for (int p = 0; p < PANELS; p++) streams[p].expand(buffer[tile][p]);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t tile = 0; tile < x.tiles; tile++) {
    bf16(&now)[PANELS][TILE_VALUES] = buffer[tile % BUFFERS];
    bf16(&next)[PANELS][TILE_VALUES] = buffer[(tile + BUFFERS - 1) % BUFFERS];
    const bool more = tile + BUFFERS - 1 < x.tiles;
    const bf16* const in = x.x + tile * call.rows * TILE_INPUTS;
    _tile_loadd(4, in, 64);
    if (HALVES == 2) _tile_loadd(5, in + 16 * TILE_INPUTS, 64);
#define ADD(p, low, high)                           \
  if constexpr (PANELS > p) {                       \
    _tile_loadd(6, now[p], 64);                     \
    _tile_dpbf16ps(low, 4, 6);                      \
    if (HALVES == 2) _tile_dpbf16ps(high, 5, 6);    \
    if (more) streams[p].expand(next[p]);           \
  }
    EACH_PANEL(ADD)
  }
#define TAKE(p, low, high)                                                                  \
  if constexpr (PANELS > p) {                                                               \
    _tile_stored(low, sums, 64);                                                            \
    write(call, weight, sums, panel + p * apart, 0, HALVES == 2 ? 16 : call.rows);          \
    if (HALVES == 2) _tile_stored(high, sums, 64);                                          \
    if (HALVES == 2) write(call, weight, sums, panel + p * apart, 16, call.rows - 16);      \
  }
  EACH_PANEL(TAKE)
#undef ADD
#undef TAKE
}

template <int HALVES>
void few_rows(const Matmul& call, const Bitmap& weight, int64_t begin, int64_t end) {
  const int64_t tiles = (weight.inputs + TILE_INPUTS - 1) / TILE_INPUTS;
  const Ordered x(call, weight, static_cast<bf16*>(scratch(2 * tiles * call.rows * TILE_INPUTS)));
  configure(int(call.rows));
  if constexpr (HALVES == 1)
    begin = abreast<STREAMS>(begin, end, [&](int64_t panel, int64_t apart) {
      few_rows<HALVES, STREAMS>(call, weight, x, panel, apart);
    });
  begin = abreast<2>(begin, end, [&](int64_t panel, int64_t apart) {
    few_rows<HALVES, 2>(call, weight, x, panel, apart);
  });
  abreast<1>(begin, end, [&](int64_t panel, int64_t apart) { few_rows<HALVES, 1>(call, weight, x, panel, apart); });
}

// 32 rows of x or what is left of them, times two panels (or one), expanded one after the other.
template <int HALVES, int PANELS>
void block(const Matmul& call, const Bitmap& weight, const Inputs& x, const bf16* first, const bf16* second,
           int64_t panel, int64_t row, int64_t rows) {
  alignas(64) float sums[256];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t tile = 0; tile < x.tiles; tile++) {
    _tile_loadd(4, x.at(row, tile), x.stride(tile));
    _tile_loadd(6, first + tile * TILE_VALUES, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (HALVES == 2) {
      _tile_loadd(5, x.at(row + 16, tile), x.stride(tile));
      _tile_dpbf16ps(1, 5, 6);
    }
    if (PANELS == 2) {
      _tile_loadd(7, second + tile * TILE_VALUES, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (HALVES == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t low = rows < 16 ? rows : 16;
  _tile_stored(0, sums, 64);
  write(call, weight, sums, panel, row, low);
  if (HALVES == 2) {
    _tile_stored(1, sums, 64);
    write(call, weight, sums, panel, row + 16, rows - 16);
  }
  if (PANELS == 2) {
    _tile_stored(2, sums, 64);
    write(call, weight, sums, panel + 1, row, low);
    if (HALVES == 2) {
      _tile_stored(3, sums, 64);
      write(call, weight, sums, panel + 1, row + 16, rows - 16);
    }
  }
}

template <int HALVES>
void rows(const Matmul& call, const Bitmap& weight, const Inputs& x, const bf16* buffer, int64_t panel, int64_t panels,
          int64_t row, int64_t count) {
  const int64_t size = x.tiles * TILE_VALUES;
  int64_t p = 0;
  for (; p + 2 <= panels; p += 2)
    block<HALVES, 2>(call, weight, x, buffer + p * size, buffer + (p + 1) * size, panel + p, row, count);
  if (p < panels) block<HALVES, 1>(call, weight, x, buffer + p * size, nullptr, panel + p, row, count);
}

void whole_panels(const Matmul& call, const Bitmap& weight, const Inputs& x, bf16* buffer, int64_t together,
                  int64_t begin, int64_t end) {
  const int64_t full = call.rows / 32 * 32, over = call.rows - full;
  Stream weights;
  weights.begin(weight, begin);
  for (int64_t panel = begin; panel < end; panel += together) {
    const int64_t panels = end - panel < together ? end - panel : together;
    for (int64_t tile = 0; tile < panels * x.tiles; tile++) weights.expand(buffer + tile * TILE_VALUES);
    configure(32);
    for (int64_t row = 0; row < full; row += 32) rows<2>(call, weight, x, buffer, panel, panels, row, 32);
    if (!over) continue;
    configure(int(over));
    if (over > 16)
      rows<2>(call, weight, x, buffer, panel, panels, full, over);
    else
      rows<1>(call, weight, x, buffer, panel, panels, full, over);
  }
}

}  // namespace

extern "C" void bitmap_matmul_bf16_amx(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const Bitmap& weight = *static_cast<const Bitmap*>(call.weight);
  if (!call.rows) return;
  if (call.rows == 1) return bitmap_matmul_bf16_avx512(pointer, begin, end);  // fifteen rows of a tile would be idle
  if (call.rows <= 16) {
    few_rows<1>(call, weight, begin, end);
  } else if (call.rows <= 32) {
    few_rows<2>(call, weight, begin, end);
  } else {
    // As many panels as leave room for x in the second cache: four where there are up to 8192 inputs.
    const int64_t tiles = (weight.inputs + TILE_INPUTS - 1) / TILE_INPUTS, size = tiles * TILE_VALUES;
    const int64_t fit = MOST_BUFFER / (2 * size), together = fit > 4 ? 4 : fit < 1 ? 1 : fit;
    bf16* const room = static_cast<bf16*>(scratch(2 * (together * size + call.rows * TILE_INPUTS)));
    whole_panels(call, weight, Inputs(call, weight, room + together * size), room, together, begin, end);
  }
  _tile_release();
}
