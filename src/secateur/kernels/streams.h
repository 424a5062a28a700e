// Several items read side by side: memory gives more to several streams than to one, and none has to wait for the sum it
// adds to.
//
// Everything here is static: each file keeps the copy compiled with its own flags.
#pragma once
#include <stdint.h>

namespace {

enum { STREAMS = 4 };

// Items COUNT at a time, `apart` from one to the next, until fewer are left; where those begin.
template <int COUNT, class Each>
inline int64_t abreast(int64_t begin, int64_t end, const Each& each) {
  const int64_t apart = (end - begin) / COUNT;
  for (int64_t item = begin; item < begin + apart; item++) each(item, apart);
  return begin + COUNT * apart;
}

// Items of different lengths: a Stream begins at one, takes `left` steps and finishes. What it needs is handed through.
template <int COUNT, class Stream, class... Given>
inline int64_t streamed(int64_t begin, int64_t end, const Given&... given) {
  return abreast<COUNT>(begin, end, [&](int64_t item, int64_t apart) {
    Stream streams[COUNT];
    int64_t all = INT64_MAX;  // steps that all of them have
    for (int i = 0; i < COUNT; i++) {
      streams[i].begin(item + i * apart, given...);
      all = streams[i].left < all ? streams[i].left : all;
    }
    for (int64_t step = 0; step < all; step++)
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) streams[i].step(given...);
    for (int i = 0; i < COUNT; i++) {
      for (int64_t step = all; step < streams[i].left; step++) streams[i].step(given...);
      streams[i].finish(item + i * apart, given...);
    }
  });
}

template <class Stream, class... Given>
inline void side_by_side(int64_t begin, int64_t end, const Given&... given) {
  streamed<1, Stream>(streamed<STREAMS, Stream>(begin, end, given...), end, given...);
}

}  // namespace
