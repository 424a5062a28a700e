// Two tiles of each matrix, four of sums. Of what lies in tiles as much is laid out as the second cache holds, so that sums
// go to memory and back seldom.
#include "product_lay.h"
#include "tiles.h"

namespace {

enum { SIDE = 32, STEPS = 512, TALL = 256, TILE = LANES * LANES };  // sums of four tiles; dwords and rows laid out at once

void configure() {
  Shape shape = {};
  shape.palette = 1;
  for (int tile = 0; tile < 8; tile++) {
    shape.bytes[tile] = 64;
    shape.rows[tile] = 16;
  }
  _tile_loadconfig(&shape);
}

// SIDE x SIDE sums over `steps` dwords, a multiple of sixteen.
void sums(const float* left, const float* right, int64_t steps, float* found) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k += LANES, left += TILE, right += TILE) {
    _tile_loadd(4, left, 64);
    _tile_loadd(5, left + LANES * steps, 64);
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + LANES * steps, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, found, SIDE * sizeof(float));
  _tile_stored(1, found + LANES, SIDE * sizeof(float));
  _tile_stored(2, found + LANES * SIDE, SIDE * sizeof(float));
  _tile_stored(3, found + LANES * SIDE + LANES, SIDE * sizeof(float));
}

}  // namespace

extern "C" void product_bf16_amx(const void* pointer, int64_t begin, int64_t end) {
  const Product& call = *static_cast<const Product*>(pointer);
  int64_t start, last;
  rows_of(call, begin, end, &start, &last);
  float* const found = static_cast<float*>(scratch((SIDE * SIDE + (TALL + SIDE) * STEPS) * sizeof(float)));
  float* const right = found + SIDE * SIDE;
  float* const left = right + SIDE * STEPS;
  configure();
  for (int64_t k = 0; k < call.depth || k == 0; k += 2 * STEPS) {
    const int64_t deep = least(2 * STEPS, call.depth - k), steps = (deep + 2 * LANES - 1) / (2 * LANES) * LANES;
    const bool fresh = call.fresh && k == 0;
    for (int64_t first = start; first < last; first += TALL) {
      const int64_t tall = least(TALL, last - first);
      lay<LANES, bf16, SIDE, true>(call.left, first, tall, k, deep, steps, left);
      const int64_t columns = call.lower ? least(call.columns, first + tall) : call.columns;
      for (int64_t column = 0; column < columns; column += SIDE) {
        const int64_t across = least(SIDE, columns - column);
        lay<LANES, bf16, SIDE>(call.right, column, across, k, deep, steps, right);
        const int64_t begin = call.lower && column > first ? (column - first) / SIDE * SIDE : 0;
        for (int64_t row = begin; row < tall; row += SIDE) {
          sums(left + row * steps, right, steps, found);
          for (int64_t i = 0; i < least(SIDE, tall - row); i++)
            for (int64_t j = 0; j < across; j += LANES) {
              const int64_t some = least(LANES, across - j);
              float* const to = call.to + (first + row + i) * call.apart + column + j;
              const Vector before = fresh ? Vector{} : load_some(to, some);
              store_some(to, before + all(call.scale) * load(found + i * SIDE + j), some);
            }
        }
      }
    }
  }
  _tile_release();
}
