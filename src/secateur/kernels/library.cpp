// The C interface: which kernel serves a name on this processor, and a kernel run over its items by several threads.
#include <cstring>

#include "kernels.h"
#include "pool.h"

#ifdef SECATEUR_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define KERNEL(name, level) extern "C" Kernel name##_##level;
#ifdef SECATEUR_X86
#define X86(name, level) KERNEL(name, level)
#else
#define X86(name, level)
#endif
#ifdef __aarch64__
#define ARM(name, level) KERNEL(name, level)
#else
#define ARM(name, level)
#endif
#include "table.inc"
#undef KERNEL

namespace {

enum Level { base, avx2, avx512, avx512bf16, amx, neon };  // each holds those before it; neon only base

struct Entry {
  const char* name;
  Level level;
  Kernel* kernel;
};

const Entry table[] = {
#define KERNEL(name, level) {#name, level, name##_##level},
#include "table.inc"
#undef KERNEL
};

#ifdef SECATEUR_TILES_IN_SOFTWARE
const bool in_software = true;
#else
const bool in_software = false;
#endif

#ifdef SECATEUR_X86
// The family of a processor of AMD's: 0x19 are Zen 3 and 4, 0x1a is Zen 5. 0 of others.
unsigned family_of_amd() {
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return ((a >> 8) & 0xf) + ((a >> 20) & 0xff);
}

bool bit(unsigned word, int at) { return (word >> at) & 1; }

uint64_t saved_by_the_system() {  // XCR0: the registers that the operating system keeps between threads
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

bool tiles_allowed() {  // Linux gives the tile registers to a process that asks
#ifdef __linux__
  const int request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

Level detect() {
  unsigned a, b, c, d, b7, c7, d7, a71 = 0, unused;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return base;  // OSXSAVE
  const bool fma = bit(c, 12) && bit(c, 28) && bit(c, 29) && bit(c, 23);  // and AVX, F16C, POPCNT
  if (!__get_cpuid_count(7, 0, &unused, &b7, &c7, &d7)) return base;
  const uint64_t saved = saved_by_the_system();
  if (!fma || !bit(b7, 5) || !bit(b7, 8) || !bit(b7, 3) || (saved & 0x6) != 0x6) return base;  // AVX2, BMI2, BMI1
  const bool wide = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);  // F, DQ, BW, VL
  if (!wide || !bit(c7, 1) || !bit(c7, 6) || (saved & 0xe6) != 0xe6) return avx2;  // VBMI, VBMI2
  __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
  if (!bit(a71, 5) || !bit(c7, 11)) return avx512;  // AVX512-BF16, VNNI
  const bool tiles = bit(d7, 22) && bit(d7, 24) && bit(d7, 25);  // AMX-BF16, AMX-TILE, AMX-INT8
  const bool there = tiles && (saved & 0x60000) == 0x60000 && tiles_allowed();
  return there || in_software ? amx : avx512bf16;
}
#elif defined(__aarch64__)
unsigned family_of_amd() { return 0; }
Level detect() { return neon; }  // no such processor is without
#else
unsigned family_of_amd() { return 0; }
Level detect() { return base; }
#endif

}  // namespace

// Raised when a struct that Python fills in changes, or the levels, of which Python gets numbers: a library of other
// sources is then refused.
SECATEUR_API int secateur_version() { return 10; }

extern "C" bool asks_ahead() {
  static const bool found = family_of_amd() != 0x19;  // measured on Zen 4; of Zen 5 and of Intel's it is not so
  return found;
}

extern "C" bool moves_lanes() {
  static const bool found = family_of_amd() == 0x1a;
  return found;
}

// The highest level that this processor and its system can run.
SECATEUR_API int secateur_machine() {
  static const Level found = detect();
  return found;
}

// The kernel of a name for the highest level up to `level` that it was written for, or null; `found` says which.
SECATEUR_API void* secateur_find(const char* name, int level, int* found) {
  const Entry* best = nullptr;
  for (const Entry& entry : table)
    if (!std::strcmp(entry.name, name) && entry.level <= level && (!best || entry.level > best->level)) best = &entry;
  if (best) *found = best->level;
  return best ? reinterpret_cast<void*>(best->kernel) : nullptr;
}

// Items [0, items) of any kernel.
SECATEUR_API void secateur_run(void* kernel, const void* call, int64_t items, int threads) {
  parallel(reinterpret_cast<Kernel*>(kernel), call, items, threads);
}

// Several kernels, each over its items, one after another, once pointers that change from call to call are where they
// belong.
struct Step {
  Kernel* kernel;
  const void* call;
  int64_t items;
};

struct Place {
  void** at;
  int64_t which;  // of the pointers
};

SECATEUR_API void secateur_run_all(const Step* steps, int64_t count, const Place* places, int64_t places_count,
                                   void* const* pointers, int threads) {
  for (const Place* place = places; place < places + places_count; place++) *place->at = pointers[place->which];
  for (const Step* step = steps; step < steps + count; step++) parallel(step->kernel, step->call, step->items, threads);
}

SECATEUR_API void secateur_matmul(void* kernel, const void* weight, const void* x, void* y, const void* bias,
                                  int64_t rows, int64_t items, int threads) {
  const Matmul call = {weight, x, y, bias, rows};
  parallel(reinterpret_cast<Kernel*>(kernel), &call, items, threads);
}
