// Eight-bit values in digits of whole numbers: sixteen steps of a bitmap are a tile of the matrix unit as they stand.
#include "bitmap_int8_digits.h"
#include "tiles.h"

namespace {

// Tiles 0 to 3 hold the sums of four digits, 4 and 5 digits of x, 6 weights.
void configure(int rows) {
  Shape shape = {};
  shape.palette = 1;
  for (int tile = 0; tile < 7; tile++) {
    shape.bytes[tile] = 64;
    shape.rows[tile] = uint8_t(tile == 6 ? 16 : rows);
  }
  _tile_loadconfig(&shape);
}

void expand(Stream& weights, int64_t count, int8_t* to) {
  for (int64_t step = 0; step < TILE_STEPS; step++) {
    weights.prefetch();
    _mm512_store_si512(to + 64 * step, step < count ? weights.next() : _mm512_setzero_si512());
  }
}

void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// A tile of weights times four digits of rows of x.
inline void add(const int8_t* weights, const int8_t* x, int64_t stride) {
  _tile_loadd(6, weights, 64);
  _tile_loadd(4, x, TILE);
  _tile_dpbssd(0, 4, 6);
  _tile_loadd(5, x + stride, TILE);
  _tile_dpbssd(1, 5, 6);
  _tile_loadd(4, x + 2 * stride, TILE);
  _tile_dpbssd(2, 4, 6);
  _tile_loadd(5, x + 3 * stride, TILE);
  _tile_dpbssd(3, 5, 6);
}

struct alignas(64) Sums {  // of each digit and row of x
  int32_t at[8][HEIGHT * LANES];

  void take(int digit) {
    _tile_stored(0, at[digit], 64);
    _tile_stored(1, at[digit + 1], 64);
    _tile_stored(2, at[digit + 2], 64);
    _tile_stored(3, at[digit + 3], 64);
  }

  template <class T>
  void write(const Matmul& call, const BitmapInt8& scaled, const Digits& x, int64_t panel) const {
    for (int64_t row = 0; row < x.rows; row++) {
      __m512i sum[8];
      for (int d = 0; d < x.digits; d++) sum[d] = _mm512_load_si512(at[d] + row * LANES);
      ::write<T>(call, scaled, panel, x.row + row, sum, x.digits, x.shifts[row]);
    }
  }
};

// A panel times rows of x, as it is read. Tiles are expanded into two buffers in turn, so that the matrix unit works on
// one while the other is filled; eight digits take the panel twice.
template <class T>
void streamed(const Matmul& call, const BitmapInt8& scaled, const Digits& x, int64_t panel) {
  alignas(64) int8_t buffer[2][TILE_STEPS * 64];
  Sums sums;
  const int64_t steps = (scaled.bitmap.inputs + DEPTH - 1) / DEPTH, stride = x.rows * TILE;
  for (int d = 0; d < x.digits; d += 4) {
    Stream weights;
    weights.begin(scaled.bitmap, panel);
    zero_sums();
    expand(weights, steps, buffer[0]);
    for (int64_t tile = 0; tile < x.tiles; tile++) {
      add(buffer[tile % 2], x.at + tile * x.tile() + d * stride, stride);
      if (tile + 1 < x.tiles) expand(weights, steps - (tile + 1) * TILE_STEPS, buffer[(tile + 1) % 2]);
    }
    sums.take(d);
  }
  sums.write<T>(call, scaled, x, panel);
}

// Sixteen rows at a time expand the weight anew: to keep the digits of many, or a panel for them, was no faster.
template <class T>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  in_digits<T>(pointer, begin, end, [&](const Matmul& call, const BitmapInt8& scaled, const Digits& x) {
    configure(int(x.rows));
    for (int64_t panel = begin; panel < end; panel++) streamed<T>(call, scaled, x, panel);
    _tile_release();
  });
}

}  // namespace

extern "C" void bitmap_int8_matmul_f32_amx(const void* call, int64_t begin, int64_t end) {
  matmul<float>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_bf16_amx(const void* call, int64_t begin, int64_t end) {
  matmul<bf16>(call, begin, end);
}

extern "C" void bitmap_int8_matmul_f16_amx(const void* call, int64_t begin, int64_t end) {
  matmul<f16>(call, begin, end);
}
