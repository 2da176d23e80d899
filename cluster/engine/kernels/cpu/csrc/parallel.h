// Tasks over threads. Which thread runs a task never matters to its result.
#pragma once
#include <atomic>
#include <cstdlib>
#include "vector.h"

namespace {

// Rounding to nearest, denormals kept, whatever the calling thread has set (torch can flush denormals).
struct FloatingPointMode {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FloatingPointMode() { _mm_setcsr(0x1f80); }
  ~FloatingPointMode() { _mm_setcsr(saved); }
#endif
  FloatingPointMode(const FloatingPointMode&) = delete;
};

// A thread's work space, grown as needed and freed with the thread.
struct Scratch {
  char* memory = nullptr;
  size_t capacity = 0;
  ~Scratch() { free(memory); }
  char* reserve(size_t bytes) {
    if (bytes > capacity) {
      free(memory);
      capacity = (bytes + 4095) / 4096 * 4096;
      memory = static_cast<char*>(aligned_alloc(4096, capacity));
      if (!memory) abort();  // out of memory: nothing sensible can follow
    }
    return memory;
  }
};
inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// work(task, scope) for every task; Scope is constructed once per thread.
template <class Scope, class Work> void for_each_task(int threads, i64 tasks, const Work& work) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    FloatingPointMode mode;
    Scope scope;
    for (i64 task = 0; task < tasks; task++) work(task, scope);
    return;
  }
  std::atomic<i64> next{0};
#pragma omp parallel num_threads(threads)
  {
    FloatingPointMode mode;
    Scope scope;
    for (i64 task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) work(task, scope);
  }
}

struct NoScope {};

// Rows over threads in equal parts, when there is enough to do.
template <class Work> void for_each_row(int threads, i64 rows, i64 row_cost, const Work& work) {
  constexpr i64 WORTH_A_THREAD = 16384;  // elements; below, waking a thread costs more than it saves
  const i64 useful = rows * row_cost / WORTH_A_THREAD;
  const i64 parts = useful < threads ? (useful < 1 ? 1 : useful) : threads;
  for_each_task<NoScope>(static_cast<int>(parts), parts, [&](i64 part, NoScope&) {
    for (i64 row = rows * part / parts; row < rows * (part + 1) / parts; row++) work(row);
  });
}

}  // namespace
