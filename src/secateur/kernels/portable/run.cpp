// Any kernel of the library, on another machine than the one that asks: a message from standard input, and the same after
// the call to standard output, the level that ran first. Linked with the library's sources.
//
// A message is the name of a kernel, the numbers below, for each pointer its place and what it points to, as offsets in
// the memory that follows, and that memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

extern "C" int secateur_machine();
extern "C" void* secateur_find(const char* name, int level, int* found);
extern "C" void secateur_run(void* kernel, const void* call, int64_t items, int threads);

struct Message {
  char name[64];
  int64_t items, threads, call, pointers, size;
};

template <class T>
T* read(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 64) / 64 * 64;
  T* found = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (!found || std::fread(found, sizeof(T), size_t(count), stdin) != size_t(count)) std::exit(1);
  return found;
}

int main() {
  const Message m = *read<Message>(1);
  const int64_t* pointers = read<int64_t>(2 * m.pointers);
  char* memory = read<char>(m.size);
  for (int64_t i = 0; i < m.pointers; i++) {
    char* to = memory + pointers[2 * i + 1];
    std::memcpy(memory + pointers[2 * i], &to, sizeof to);
  }
  int32_t level = -1;
  void* kernel = secateur_find(m.name, secateur_machine(), &level);
  if (!kernel) return 2;
  secateur_run(kernel, memory + m.call, m.items, int(m.threads));
  std::fwrite(&level, sizeof level, 1, stdout);
  return std::fwrite(memory, 1, size_t(m.size), stdout) == size_t(m.size) ? 0 : 1;
}
