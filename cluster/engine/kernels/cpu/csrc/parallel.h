// Tasks over threads. Which thread runs a task never matters to its result.
#pragma once
#include <atomic>
#include <cstdlib>
#include "pool.h"
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

// work(task, scope) for every task; Scope is constructed once per thread. Which threads take part, and
// which tasks they get, is decided while it runs.
template <class Scope, class Work> void for_each_task(int threads, i64 tasks, const Work& work) {
  struct Call {
    const Work& work;
    const i64 tasks;
    std::atomic<i64> next{0};
    static void run(void* self) {
      Call& call = *static_cast<Call*>(self);
      FloatingPointMode mode;
      Scope scope;
      for (i64 task; (task = call.next.fetch_add(1, std::memory_order_relaxed)) < call.tasks;) call.work(task, scope);
    }
  } call{work, tasks};
  tandem_run_on_threads(threads < tasks ? threads : static_cast<int>(tasks), Call::run, &call);
}

struct NoScope {};

// More pieces than threads: a helper may come late or lose its core, then the others take its share.
constexpr i64 PIECES_PER_THREAD = 4;
inline i64 pieces(int threads, i64 useful) {
  if (threads <= 1 || useful <= 1) return 1;
  const i64 most = threads * PIECES_PER_THREAD;
  return useful < most ? useful : most;
}

// Rows over threads, when there is enough to do.
template <class Work> void for_each_row(int threads, i64 rows, i64 row_cost, const Work& work) {
  constexpr i64 WORTH_A_PIECE = 8192;  // elements; less than that is done sooner than a helper comes
  const i64 useful = rows * row_cost / WORTH_A_PIECE;
  const i64 parts = pieces(threads, useful < rows ? useful : rows);
  for_each_task<NoScope>(threads, parts, [&](i64 part, NoScope&) {
    for (i64 row = rows * part / parts; row < rows * (part + 1) / parts; row++) work(row);
  });
}

}  // namespace
