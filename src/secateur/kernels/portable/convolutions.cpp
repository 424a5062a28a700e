// Convolutions of group_cols and depth_taps for machines that this package is not built on: vectors of four floats, as
// NEON of AArch64 and SIMD of WebAssembly have them, and the oracles beside them. No library is needed.
//
//   aarch64-linux-gnu-g++ -std=c++17 -O3 -static convolutions.cpp depth_taps.cpp -o convolutions
//     reads a message, writes the outcome
//   clang++ --target=wasm32 -std=c++17 -O3 -msimd128 -mbulk-memory -nostdlib -fno-exceptions -Wl,--no-entry
//     convolutions.cpp depth_taps.cpp -o convolutions.wasm
//     exports reserve and convolve
//
// A message is one piece of memory, little-endian: the numbers of `Message`, behind them the arrays of the weight, each
// from a multiple of eight bytes on, the pictures, and room for the outcome. Of group_cols the arrays are values, counts
// and steps, then columns, values, rows and offsets of its blocks, and the biases; of depth_taps, where `kept` is the
// number of shapes, values, shapes, begins and which.
#define LANES 4
#include "../depth_taps.h"
#include "../group_cols.cpp"
#include "../group_cols_tiles.h"

extern "C" Kernel depth_taps_conv_f32_vectors, depth_taps_conv_f32_base;

namespace {

enum { GROUP_COLS, DEPTH_TAPS };

struct Message {
  int32_t kind;
  int32_t outputs, columns, rows, values, kept, groups, whole, first, depth, blocks, padded, taken;
  int32_t pictures, channels, height, width, out_height, out_width;
  int32_t taps_high, taps_wide, stride_high, stride_wide, pad_high, pad_wide, apart_high, apart_wide;
  int32_t chunk, chunks, parts;
  float low, high;
};

template <class T>
T* next(char*& at, int64_t count) {
  T* found = reinterpret_cast<T*>(at);
  at += (count * int64_t(sizeof(T)) + 7) / 8 * 8;
  return found;
}

void answer(char* memory, bool by_the_oracle) {
  const Message m = *next<Message>(memory, 1);
  const float* values = next<float>(memory, m.values);
  GroupCols groups = {};
  KBlocked blocked = {};
  DepthTaps taps = {};
  if (m.kind == GROUP_COLS) {
    const int32_t* counts = next<int32_t>(memory, m.groups);
    const int32_t* steps = next<int32_t>(memory, m.kept);
    const int64_t abreast = m.rows < ABREAST ? ABREAST / m.rows : 1, bunches = int64_t(m.blocks) * m.padded / abreast;
    blocked = {m.outputs, m.columns, m.depth, m.padded};
    blocked.columns = next<uint16_t>(memory, m.taken * abreast);
    blocked.values = next<float>(memory, m.taken * abreast * m.rows);
    blocked.rows = next<int32_t>(memory, int64_t(m.blocks) * m.padded);
    blocked.offsets = next<int64_t>(memory, bunches + 1);
    const float* biases = next<float>(memory, m.outputs);
    groups = {m.outputs, m.columns, m.rows, values, counts, steps, m.first, m.groups, m.whole, &blocked, biases};
  } else {
    const int64_t* shapes = next<int64_t>(memory, m.kept);
    const int64_t* begins = next<int64_t>(memory, m.outputs);
    taps = {m.outputs, m.columns, values, shapes, next<int16_t>(memory, m.outputs), begins};
  }
  const float* x = next<float>(memory, int64_t(m.pictures) * m.channels * m.height * m.width);
  const void* const weight = m.kind == GROUP_COLS ? static_cast<const void*>(&groups) : &taps;
  Convolution call = {weight,        x,             reinterpret_cast<float*>(memory), m.pictures,  m.channels,
                      m.height,      m.width,       m.out_height,                     m.out_width, m.taps_high,
                      m.taps_wide,   m.stride_high, m.stride_wide,                    m.pad_high,  m.pad_wide,
                      m.apart_high,  m.apart_wide,  m.chunk,                          m.chunks,    m.parts,
                      m.low,         m.high};
  call.x_row = m.width;
  call.x_plane = int64_t(m.height) * m.width;
  call.y_row = m.out_width;
  call.y_plane = int64_t(m.out_height) * m.out_width;
  Kernel* const vectors = m.kind == GROUP_COLS ? convolve : depth_taps_conv_f32_vectors;
  Kernel* const oracle = m.kind == GROUP_COLS ? group_cols_conv_f32_base : depth_taps_conv_f32_base;
  (by_the_oracle ? oracle : vectors)(&call, 0, int64_t(m.pictures) * m.chunks * m.parts);
}

}  // namespace

#ifdef __wasm__

extern "C" unsigned char __heap_base;

namespace {
size_t used = 0, room_for_scratch = 0;
void* kept_for_scratch = nullptr;
}  // namespace

// Memory that stays: where a message is written to.
extern "C" __attribute__((export_name("reserve"))) void* reserve(size_t bytes) {
  const size_t page = 65536;
  if (!used) used = reinterpret_cast<size_t>(&__heap_base);
  used = (used + 63) & ~size_t(63);
  const size_t from = used, pages = (used + bytes + page - 1) / page, now = __builtin_wasm_memory_size(0);
  used += bytes;
  if (pages > now && __builtin_wasm_memory_grow(0, pages - now) == size_t(-1)) __builtin_trap();
  return reinterpret_cast<void*>(from);
}

extern "C" void* scratch(size_t bytes) {
  if (bytes > room_for_scratch) {
    kept_for_scratch = reserve(bytes);
    room_for_scratch = bytes;
  }
  return kept_for_scratch;
}

extern "C" __attribute__((export_name("convolve"))) void convolve_message(char* message, int by_the_oracle) {
  answer(message, by_the_oracle);
}

#else

#include <cstdio>
#include <cstdlib>

extern "C" void* scratch(size_t bytes) {
  static void* kept = nullptr;
  static size_t room = 0;
  if (bytes > room) {
    std::free(kept);
    room = (bytes + 63) & ~size_t(63);
    kept = std::aligned_alloc(64, room);
    if (!kept) std::abort();
  }
  return kept;
}

// convolutions [vectors|oracle [times]]: the message from standard input, and the same with the outcome in it to standard
// output, computed once or as often as is asked.
int main(int count, char** given) {
  size_t room = size_t(1) << 20, used = 0;
  char* message = static_cast<char*>(std::malloc(room));
  while (message && !std::feof(stdin) && !std::ferror(stdin)) {
    used += std::fread(message + used, 1, room - used, stdin);
    if (used == room) message = static_cast<char*>(std::realloc(message, room *= 2));
  }
  if (!message) return 1;
  const bool by_the_oracle = count > 1 && given[1][0] == 'o';
  for (int times = count > 2 ? std::atoi(given[2]) : 1; times > 0; times--)
    answer(message, by_the_oracle);
  return std::fwrite(message, 1, used, stdout) == used ? 0 : 1;
}

#endif
