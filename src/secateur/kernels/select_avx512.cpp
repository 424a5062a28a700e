// Sixteen scores at a time. Groups of 2, 4, 8 or 16 lie side by side in a register and are ranked by turning each group
// within itself; longer rows are counted against the middle of a range that halves, which ends as soon as a middle
// parts the row as asked.
#include <immintrin.h>

#include "select.h"

namespace {

inline __m512i keys_of(__m512 score) {
  const __m512i bits = _mm512_castps_si512(_mm512_add_ps(score, _mm512_setzero_ps()));
  const __m512i sign = _mm512_srai_epi32(bits, 31);  // all ones for a negative score
  return _mm512_xor_si512(bits, _mm512_or_si512(sign, _mm512_set1_epi32(int(0x80000000))));
}

// Scores are asked for ahead: not every processor foresees loads that are masked.
inline __m512 read(const float* score, __mmask16 lanes) {
  enum { AHEAD = 2048 };
  _mm_prefetch(reinterpret_cast<const char*>(score) + AHEAD, _MM_HINT_T0);
  return _mm512_maskz_loadu_ps(lanes, score);
}

inline __mmask16 lanes_of(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

inline void store(uint8_t* keep, __mmask16 lanes, __mmask16 stays) {
  _mm_mask_storeu_epi8(keep, lanes, _mm_maskz_set1_epi8(stays, 1));
}

// Groups of WIDTH lanes, as many as fit, from one register to the next.
template <int WIDTH>
void groups(const Select& call, const float* score, uint8_t* keep, int64_t count) {
  __m512i turned[WIDTH], before[WIDTH];  // one where the turned neighbour of a lane stands before it
  alignas(64) int32_t from[16], ahead[16];
#pragma GCC unroll 16
  for (int turn = 1; turn < WIDTH; turn++) {
    for (int lane = 0; lane < 16; lane++) {
      const int place = lane % WIDTH, other = (place + turn) % WIDTH;
      from[lane] = lane - place + other;
      ahead[lane] = other < place;
    }
    turned[turn] = _mm512_load_si512(from);
    before[turn] = _mm512_load_si512(ahead);
  }
  const __m512i one = _mm512_set1_epi32(1), drop = _mm512_set1_epi32(int(call.drop));
  __mmask16 odd = 0;
  for (int64_t at = 0; at < count; at += 16) {
    const __mmask16 lanes = lanes_of(count - at);
    const __m512 x = read(score + at, lanes);
    odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i mine = keys_of(x);
    __m512i lower = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int turn = 1; turn < WIDTH; turn++) {
      const __m512i other = _mm512_permutexvar_epi32(turned[turn], mine);
      // Of equal ones that which stands before is lower: less than the next key, which there is but for a NaN.
      const __mmask16 less = _mm512_cmplt_epu32_mask(other, _mm512_add_epi32(mine, before[turn]));
      lower = _mm512_mask_add_epi32(lower, less, lower, one);
    }
    store(keep + at, lanes, _mm512_cmpge_epi32_mask(lower, drop));
  }
  if (odd) *call.odd = 1;
}

int64_t count_up_to(const uint32_t* keys, int64_t width, uint32_t most) {
  const __m512i limit = _mm512_set1_epi32(int(most));
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 64 <= width; i += 64)
    count += __builtin_popcountll(
        uint64_t(_mm512_cmple_epu32_mask(_mm512_load_si512(keys + i), limit)) |
        uint64_t(_mm512_cmple_epu32_mask(_mm512_load_si512(keys + i + 16), limit)) << 16 |
        uint64_t(_mm512_cmple_epu32_mask(_mm512_load_si512(keys + i + 32), limit)) << 32 |
        uint64_t(_mm512_cmple_epu32_mask(_mm512_load_si512(keys + i + 48), limit)) << 48);
  for (; i < width; i += 16)
    count += __builtin_popcount(
        _mm512_mask_cmple_epu32_mask(lanes_of(width - i), _mm512_load_si512(keys + i), limit));
  return count;
}

// Of so many keys between two, the highest that goes where `drop` do; of those that equal it, `ties` do.
uint32_t halve(const uint32_t* keys, int64_t width, uint32_t low, uint32_t high, int64_t drop, int64_t* ties) {
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t count = count_up_to(keys, width, middle);
    if (count == drop) {  // all up to here, and nothing else
      *ties = width;
      return middle;
    }
    if (count > drop) high = middle;
    else low = middle + 1;
  }
  *ties = drop - (low ? count_up_to(keys, width, low - 1) : 0);
  return low;
}

uint32_t by_halving(const Select& call, const float* score, int64_t* ties) {
  uint32_t* const keys = static_cast<uint32_t*>(scratch((call.width + 16) * sizeof(uint32_t)));
  __m512i lowest = _mm512_set1_epi32(-1), highest = _mm512_setzero_si512();
  __mmask16 odd = 0;
  for (int64_t i = 0; i < call.width; i += 16) {
    const __mmask16 lanes = lanes_of(call.width - i);
    const __m512 x = read(score + i, lanes);
    odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i k = keys_of(x);
    _mm512_store_si512(keys + i, k);
    lowest = _mm512_mask_min_epu32(lowest, lanes, lowest, k);
    highest = _mm512_mask_max_epu32(highest, lanes, highest, k);
  }
  if (odd) *call.odd = 1;
  return halve(keys, call.width, _mm512_reduce_min_epu32(lowest), _mm512_reduce_max_epu32(highest), call.drop, ties);
}

// A long row: the highest digit of the edge by counting all, and the rest of it among those few that have that digit.
uint32_t by_first_digit(const Select& call, const float* score, int64_t* ties) {
  enum { BELOW = 21 };
  int64_t* const count = static_cast<int64_t*>(scratch(4 * DIGITS * sizeof(int64_t)));
  for (int digit = 0; digit < 4 * DIGITS; digit++) count[digit] = 0;
  __mmask16 odd = 0;
  alignas(64) uint32_t digits[16];
  for (int64_t i = 0; i < call.width; i += 16) {
    const __mmask16 lanes = lanes_of(call.width - i);
    const __m512 x = read(score + i, lanes);
    odd |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm512_store_si512(digits, _mm512_srli_epi32(keys_of(x), BELOW));
    const int there = call.width - i < 16 ? int(call.width - i) : 16;
    for (int lane = 0; lane < there; lane++) count[4 * digits[lane] + (lane & 3)]++;
  }
  if (odd) *call.odd = 1;
  int64_t left = call.drop, few = 0;
  uint32_t digit = 0;
  for (;; digit++) {
    const int64_t* const four = count + 4 * digit;
    few = four[0] + four[1] + four[2] + four[3];
    if (left <= few) break;
    left -= few;
  }
  // Nearly equal scores: to copy them would take as much memory again.
  if (few > call.width / 4) return digit_by_digit(score, call.width, call.drop, ties, call.odd);
  uint32_t* const keys = static_cast<uint32_t*>(scratch((few + 32) * sizeof(uint32_t)));
  const __m512i wanted = _mm512_set1_epi32(int(digit));
  int64_t found = 0;
  for (int64_t i = 0; i < call.width; i += 16) {
    const __mmask16 lanes = lanes_of(call.width - i);
    const __m512i k = keys_of(read(score + i, lanes));
    const __mmask16 same = _mm512_mask_cmpeq_epi32_mask(lanes, _mm512_srli_epi32(k, BELOW), wanted);
    _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(same, k));
    found += __builtin_popcount(same);
  }
  const uint32_t low = digit << BELOW;
  return halve(keys, few, low, low | ((1u << BELOW) - 1), left, ties);
}

// What stands above the edge stays, and of what equals it all but the first `ties`.
void part(const float* score, uint8_t* keep, int64_t width, uint32_t edge, int64_t ties) {
  const __m512i limit = _mm512_set1_epi32(int(edge));
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 lanes = lanes_of(width - i);
    const __m512i k = keys_of(read(score + i, lanes));
    uint32_t stays = _mm512_cmpgt_epu32_mask(k, limit);
    const uint32_t equal = _mm512_mask_cmpeq_epu32_mask(lanes, k, limit);
    if (equal) {
      const int64_t count = __builtin_popcount(equal), gone = ties < count ? ties : count;
      stays |= equal & ~_pdep_u32(gone >= 16 ? 0xffffu : (1u << gone) - 1, equal);
      ties -= gone;
    }
    store(keep + i, lanes, __mmask16(stays));
  }
}

}  // namespace

extern "C" void select_f32_avx512(const void* pointer, int64_t begin, int64_t end) {
  const Select& call = *static_cast<const Select*>(pointer);
  const int64_t first = begin * call.together, to = end * call.together, last = to < call.rows ? to : call.rows;
  const float* const score = call.score + first * call.width;
  uint8_t* const keep = call.keep + first * call.width;
  const int64_t all = (last - first) * call.width;
  if (call.width == 2) return groups<2>(call, score, keep, all);
  if (call.width == 4) return groups<4>(call, score, keep, all);
  if (call.width == 8) return groups<8>(call, score, keep, all);
  if (call.width == 16) return groups<16>(call, score, keep, all);
  for (int64_t row = 0; row < last - first; row++) {
    const float* const mine = score + row * call.width;
    int64_t ties;
    const uint32_t edge = call.width < LONG ? by_halving(call, mine, &ties)
                                            : by_first_digit(call, mine, &ties);
    part(mine, keep + row * call.width, call.width, edge, ties);
  }
}
