// A pool in which the caller completes its own work.
//
// Work is cut into chunks that are claimed from one atomic word; the caller claims chunks like everybody else and at
// the end waits only for chunks that were claimed by others. On a loaded machine a worker that the system does not run
// claims nothing, so nobody waits for it: with a barrier, as in OpenMP, a small layer would take milliseconds.
//
// The word holds the number of the job and the next chunk. A worker reads the job first and then claims with a
// compare-and-swap: if the job has gone on meanwhile the word differs, the claim fails, and what it read is unused. For
// that the word is closed, with no chunk left to claim, before anything of the next job is written.
//
// The state is never destroyed and the workers are never joined: at exit the system ends them where they sleep. After
// a fork the child has no workers, so it starts with a state of its own.
#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

const int PER_THREAD = 8;  // chunks for each thread: small enough to even out, large enough to be worth a claim
const int PATIENCE = 2000;   // looks at the word before a worker sleeps: tens of microseconds
const int MOST_WORKERS = 256;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Pool {
  std::atomic<uint64_t> word{0};  // job << 32 | next chunk
  std::atomic<Kernel*> kernel{nullptr};
  std::atomic<const void*> call{nullptr};
  std::atomic<int64_t> items{0};
  std::atomic<uint32_t> chunks{0};
  std::atomic<uint32_t> done{0};
  std::atomic<int> wanted{0};  // workers that the job has room for
  std::mutex one_job;          // a second caller does its work alone
  std::mutex sleeping;
  std::condition_variable wake;
  std::atomic<int> sleepers{0};
  int workers = 0;  // under one_job
};

std::atomic<Pool*> pool{nullptr};

// Claim and run one chunk of the job with this number; false when there is none left.
bool run_chunk(Pool& p, uint32_t job) {
  uint64_t word = p.word.load(std::memory_order_acquire);
  for (;;) {
    const uint32_t chunk = uint32_t(word), chunks = p.chunks.load(std::memory_order_acquire);
    if (uint32_t(word >> 32) != job || chunk >= chunks) return false;
    Kernel* const kernel = p.kernel.load(std::memory_order_acquire);
    const void* const call = p.call.load(std::memory_order_acquire);
    const int64_t items = p.items.load(std::memory_order_acquire);
    if (!p.word.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
    kernel(call, items * chunk / chunks, items * (chunk + 1) / chunks);
    p.done.fetch_add(1, std::memory_order_release);
    return true;
  }
}

void work(Pool* p, int number) {
  uint32_t seen = 0;
  for (;;) {
    uint32_t job = uint32_t(p->word.load(std::memory_order_acquire) >> 32);
    for (int look = 0; job == seen && look < PATIENCE; look++) {
      pause();
      job = uint32_t(p->word.load(std::memory_order_acquire) >> 32);
    }
    if (job == seen) {
      std::unique_lock<std::mutex> lock(p->sleeping);
      p->sleepers.fetch_add(1);
      p->wake.wait(lock, [&] { return (job = uint32_t(p->word.load() >> 32)) != seen; });
      p->sleepers.fetch_sub(1);
    }
    seen = job;
    if (number < p->wanted.load(std::memory_order_acquire))
      while (run_chunk(*p, job)) {
      }
  }
}

bool start_worker(Pool& p) {
  try {
    std::thread(work, &p, p.workers).detach();
  } catch (const std::system_error&) {
    return false;  // the system gives no more threads: the caller and those there are do the work
  }
  p.workers++;
  return true;
}

void forget_after_fork() { pool.store(nullptr); }

Pool& the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
  Pool* made = new Pool;
  if (!pool.compare_exchange_strong(found, made)) {
    delete made;
    return *found;
  }
#ifndef _WIN32
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_after_fork); });
#endif
  return *made;
}

}  // namespace

void parallel(Kernel* kernel, const void* call, int64_t items, int threads) {
  if (items <= 0) return;
  if (threads > items) threads = int(items);
  if (threads > MOST_WORKERS) threads = MOST_WORKERS;
  if (threads <= 1) return kernel(call, 0, items);
  Pool& p = the_pool();
  std::unique_lock<std::mutex> mine(p.one_job, std::try_to_lock);
  if (!mine.owns_lock()) return kernel(call, 0, items);
  while (p.workers < threads - 1 && start_worker(p)) {
  }

  const int64_t pieces = int64_t(threads) * PER_THREAD;
  const uint32_t chunks = uint32_t(items < pieces ? items : pieces);
  const uint32_t before = uint32_t(p.word.load() >> 32), job = before + 1;
  p.word.store((uint64_t(before) << 32) | 0xffffffff);
  p.kernel.store(kernel);
  p.call.store(call);
  p.items.store(items);
  p.done.store(0);
  p.wanted.store(threads - 1);
  p.chunks.store(chunks);
  p.word.store(uint64_t(job) << 32);
  if (p.sleepers.load()) {
    { std::lock_guard<std::mutex> lock(p.sleeping); }  // a worker between its look and its sleep would miss the call
    p.wake.notify_all();
  }
  while (run_chunk(p, job)) {
  }
  for (int look = 0; p.done.load(std::memory_order_acquire) < chunks; look++) {
    pause();
    if (look % 1024 == 1023) std::this_thread::yield();
  }
}

extern "C" void* scratch(size_t bytes) {
  struct Memory {
    void* at = nullptr;
    size_t size = 0;
    ~Memory() { std::free(at); }
  };
  static thread_local Memory memory;
  if (bytes > memory.size) {
    std::free(memory.at);
    memory.size = (bytes + 4095) & ~size_t(4095);
    memory.at = std::aligned_alloc(64, memory.size);
    if (!memory.at) std::abort();
  }
  return memory.at;
}
