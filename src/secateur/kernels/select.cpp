// The oracle: a short row by the rank of each of its scores, a longer one by halving the range in which the score
// lies that is the last to go, a long one digit by digit.
#include "select.h"

namespace {

void by_rank(const Select& call, const float* score, uint8_t* keep) {
  for (int64_t i = 0; i < call.width; i++) {
    const uint32_t mine = key(score[i]);
    if (!number(mine)) *call.odd = 1;
    int64_t lower = 0;
    for (int64_t j = 0; j < call.width; j++) {
      const uint32_t other = key(score[j]);
      lower += other < mine || (other == mine && j < i);
    }
    keep[i] = lower >= call.drop;
  }
}

int64_t count_up_to(const uint32_t* keys, int64_t width, uint32_t most) {
  int64_t count = 0;
  for (int64_t i = 0; i < width; i++) count += keys[i] <= most;
  return count;
}

uint32_t by_halving(const Select& call, const float* score, int64_t* ties) {
  uint32_t* const keys = static_cast<uint32_t*>(scratch(call.width * sizeof(uint32_t)));
  uint32_t low = 0xffffffffu, high = 0;
  for (int64_t i = 0; i < call.width; i++) {
    keys[i] = key(score[i]);
    if (!number(keys[i])) *call.odd = 1;
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (count_up_to(keys, call.width, middle) >= call.drop) high = middle;
    else low = middle + 1;
  }
  *ties = call.drop - (low ? count_up_to(keys, call.width, low - 1) : 0);
  return low;
}

}  // namespace

extern "C" void select_f32_base(const void* pointer, int64_t begin, int64_t end) {
  const Select& call = *static_cast<const Select*>(pointer);
  const int64_t last = end * call.together < call.rows ? end * call.together : call.rows;
  for (int64_t row = begin * call.together; row < last; row++) {
    const float* const score = call.score + row * call.width;
    uint8_t* const keep = call.keep + row * call.width;
    if (call.width <= SMALL) {
      by_rank(call, score, keep);
      continue;
    }
    int64_t ties;
    const uint32_t edge = call.width < LONG ? by_halving(call, score, &ties)
                                            : digit_by_digit(score, call.width, call.drop, &ties, call.odd);
    for (int64_t i = 0; i < call.width; i++) {
      const uint32_t k = key(score[i]);
      keep[i] = k > edge || (k == edge && ties-- <= 0);
    }
  }
}
