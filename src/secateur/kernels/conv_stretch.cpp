#include "conv_stretch.h"

namespace {

// A room that no other thread has, as long as this lives.
class Room {
 public:
  explicit Room(uint64_t& taken) : taken(taken) {
    uint64_t seen = __atomic_load_n(&taken, __ATOMIC_RELAXED);
    do {
      number = __builtin_ctzll(~seen);
    } while (!__atomic_compare_exchange_n(&taken, &seen, seen | bit(), true, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
  }
  ~Room() { __atomic_fetch_and(&taken, ~bit(), __ATOMIC_RELEASE); }

  int64_t number;

 private:
  uint64_t bit() const { return uint64_t(1) << number; }
  uint64_t& taken;
};

}  // namespace

extern "C" void conv_stretch_base(const void* pointer, int64_t begin, int64_t end) {
  Stretch& stretch = *static_cast<Stretch*>(const_cast<void*>(pointer));
  const Room room(stretch.taken);
  for (int64_t first = begin * stretch.together; first < end * stretch.together; first += stretch.together) {
    const int64_t left = stretch.pictures - first;
    for (const StretchStep* step = stretch.steps; step < stretch.steps + stretch.count; step++) {
      const auto of = [&](int value) { return first * step->apart[value] + room.number * step->rooms[value]; };
      Convolution call = *step->call;
      call.pictures = left < stretch.together ? left : stretch.together;
      call.x += of(READ);
      call.y += of(MADE);
      if (call.more) call.more += of(ADDED);
      step->kernel(&call, 0, call.pictures * call.chunks * call.parts);
    }
  }
}
