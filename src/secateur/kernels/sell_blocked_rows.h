// What the variants of sell_blocked_matmul by registers of 512 bits share. An instruction picks 64 bytes of 128 that lie in
// two registers, so x lies as planes: of 256 inputs the lowest bytes, then the next, to the highest. Each plane of a block
// is four registers, and what is picked of it comes together again as floats, or as pairs of bfloat16. A gather takes five
// to ten times as long.
#pragma once
#include "sell_blocked.h"
#include "wide.h"

namespace {

enum {
  TOGETHER = 8,  // rows of x for which the weights of a block are read once
  AHEAD = 2048,  // bytes of columns, and as many steps of values
  PLANES = 4
};

// Bytes of the float that a number is, from this one on: those before it are zero.
constexpr int lowest(float) { return 0; }
constexpr int lowest(f16) { return 1; }
constexpr int lowest(bf16) { return 2; }

struct Plane {
  __m512i parts[4];

  void load(const uint8_t* from) {
    for (int i = 0; i < 4; i++) parts[i] = _mm512_load_si512(from + 64 * i);
  }

  // A byte for each of 64 columns; `later` says which are of the upper half.
  __m512i of(__m512i columns, __mmask64 later) const {
    return _mm512_mask_blend_epi8(later, _mm512_permutex2var_epi8(parts[0], columns, parts[1]),
                                  _mm512_permutex2var_epi8(parts[2], columns, parts[3]));
  }
};

// A row of x as planes [4, room]; false where something in it is not finite.
template <class T>
bool lay_planes(const T* x, int64_t inputs, int64_t room, uint8_t* planes) {
  const __m512i infinite = _mm512_set1_epi32(0x7f800000);
  __mmask16 wild = 0;
  for (int64_t input = 0; input < room; input += PANEL) {
    const __mmask16 there = input < inputs ? first(inputs - input) : 0;
    const __m512i some = _mm512_castps_si512(load(x + (there ? input : 0), there));
    wild |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(some, infinite), infinite);
    for (int p = lowest(T()); p < PLANES; p++)
      _mm_store_si128(reinterpret_cast<__m128i*>(planes + p * room + input),
                      _mm512_cvtepi32_epi8(_mm512_srlv_epi32(some, _mm512_set1_epi32(8 * p))));
  }
  return !wild;
}

// By has the inputs of a block in registers, from begin on, and multiplies a panel with them: sum.
template <class T, class By>
void matmul(const void* pointer, int64_t begin, int64_t end) {
  const Matmul& call = *static_cast<const Matmul*>(pointer);
  const SellBlocked& weight = *static_cast<const SellBlocked*>(call.weight);
  const int64_t room = (weight.inputs + DEPTH - 1) / DEPTH * DEPTH;
  float* const sums = static_cast<float*>(scratch(size_t(TOGETHER * (CHUNK * sizeof(float) + PLANES * room))));
  uint8_t* const planes = reinterpret_cast<uint8_t*>(sums + TOGETHER * CHUNK);
  for (int64_t from = 0; from < call.rows; from += TOGETHER) {
    const int64_t rows = call.rows - from < TOGETHER ? call.rows - from : TOGETHER;
    bool finite[TOGETHER];
    for (int64_t row = 0; row < rows; row++)
      finite[row] = lay_planes(static_cast<const T*>(call.x) + (from + row) * weight.inputs, weight.inputs, room,
                               planes + row * PLANES * room);
    for (int64_t item = begin; item < end; item++) {
      const Chunk chunk(weight, item);
      for (int64_t i = 0; i < rows * CHUNK; i++) sums[i] = 0;
      for (int64_t block = 0; block < chunk.blocks; block++)
        for (int64_t row = 0; row < rows; row++) {
          if (!finite[row]) continue;
          By by;
          by.begin(planes + row * PLANES * room + block * DEPTH, room);
          float* const mine = sums + row * CHUNK;
          const int64_t first = chunk.first + block * chunk.panels;
          for (int64_t panel = first; panel < first + chunk.panels; panel++) {
            const int64_t at = weight.offsets[panel] * STEP, steps = weight.offsets[panel + 1] - weight.offsets[panel];
            if (!steps) continue;
            alignas(64) float made[PANEL];
            by.sum(weight.columns + at, static_cast<const T*>(weight.values) + at, steps, made);
            const uint8_t* const outputs = weight.rows + panel * PANEL;
            for (int lane = 0; lane < PANEL; lane++) mine[outputs[lane]] += made[lane];
          }
        }
      for (int64_t row = 0; row < rows; row++)
        if (finite[row])
          put<T>(sums + row * CHUNK, chunk, call, from + row, weight.outputs);
        else
          sell_blocked_row(call, item, from + row, T());
    }
  }
}

// The columns of two steps, or of the one that is left.
inline __m512i two_steps(const uint8_t* columns) { return _mm512_loadu_si512(columns); }
inline __m512i one_step(const uint8_t* columns) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns)));
}

template <class T>
inline void ask_for(const uint8_t* columns, const T* values) {
  _mm_prefetch(reinterpret_cast<const char*>(columns) + AHEAD, _MM_HINT_T0);
  for (size_t i = 0; i < sizeof(T); i++)
    _mm_prefetch(reinterpret_cast<const char*>(values + AHEAD) + 64 * i, _MM_HINT_T0);
}

}  // namespace
