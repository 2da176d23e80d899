// Why not OpenMP: at the end of a region OpenMP waits for every thread of the team, also for one that has
// not begun because another process has its core. With a prefill and a decode worker on the same cores
// that was measured at milliseconds a call. Here the caller never waits for a helper without work, and an
// idle helper gives up its core after SPIN_NS.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <ctime>
#include <mutex>

namespace {

constexpr int64_t SPIN_NS = 50'000;  // longer than the Python between two kernels, shorter than a step's other work
constexpr int MAX_HELPERS = 255;

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}
void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("" ::: "memory");
#endif
}

struct Pool {
  std::mutex caller;  // one call at a time
  int num_helpers = 0;

  // The current call. A helper enters (num_inside + 1), then looks whether the call is open; the caller
  // closes it, then waits for num_inside = 0: one of the two sees the other.
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::atomic<int> num_wanted{0};
  std::atomic<bool> is_open{false};
  std::atomic<int> num_inside{0};

  std::atomic<uint32_t> generation{0};  // of calls; helpers sleep on it
  std::atomic<int> num_asleep{0};

  long futex(int operation, uint32_t value) {
    return syscall(SYS_futex, &generation, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
  }

  uint32_t next_call(uint32_t seen) {
    for (const int64_t end = now_ns() + SPIN_NS; now_ns() < end;)
      for (int i = 0; i < 16; i++) {
        if (generation.load(std::memory_order_acquire) != seen) return generation.load();
        relax();
      }
    num_asleep++;
    while (generation.load() == seen) futex(FUTEX_WAIT, seen);
    num_asleep--;
    return generation.load();
  }

  void help(int index) {
    for (uint32_t seen = 0;;) {
      seen = next_call(seen);
      if (index >= num_wanted.load()) continue;
      num_inside++;
      if (is_open.load()) body(context);
      num_inside--;
    }
  }

  void run(int threads, void (*new_body)(void*), void* new_context) {
    grow(threads - 1);
    body = new_body;
    context = new_context;
    num_wanted = threads - 1;
    is_open = true;
    generation++;
    if (num_asleep.load() > 0) futex(FUTEX_WAKE, static_cast<uint32_t>(threads - 1));
    new_body(new_context);
    is_open = false;
    if (num_inside.load() == 0) return;
    for (const int64_t end = now_ns() + SPIN_NS; num_inside.load() > 0;) {
      relax();
      if (now_ns() > end) sched_yield();  // a helper lost its core in the middle of its work
    }
  }

  void grow(int wanted);
};

// Replaced in a forked child, where the helpers do not exist.
Pool* pool = new Pool;

struct Start {
  Pool* pool;
  int index;
};
void* helper_main(void* argument) {
  const Start start = *static_cast<Start*>(argument);
  delete static_cast<Start*>(argument);
  start.pool->help(start.index);
  return nullptr;
}

void Pool::grow(int wanted) {
  if (num_helpers >= wanted) return;
  sigset_t all, before;  // signals are for the threads of the application
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; num_helpers < wanted && num_helpers < MAX_HELPERS; num_helpers++) {
    pthread_t thread;
    Start* start = new Start{this, num_helpers};
    if (pthread_create(&thread, nullptr, helper_main, start) != 0) {  // out of threads: fewer helpers, same result
      delete start;
      break;
    }
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });

}  // namespace

void tandem_run_on_threads(int threads, void (*body)(void*), void* context) {
  Pool* const ours = pool;
  if (threads <= 1 || !ours->caller.try_lock()) return body(context);
  ours->run(threads, body, context);
  ours->caller.unlock();
}
