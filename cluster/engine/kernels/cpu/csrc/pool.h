// Threads for one kernel call at a time.
#pragma once

// Runs body(context) on the caller and on up to threads - 1 helpers, at the same time; returns when none
// of them is in it any more. A helper that comes too late does not take part, so `body` has to fetch its
// work piece by piece. While one call is running, calls from other threads run on their caller alone.
void tandem_run_on_threads(int threads, void (*body)(void*), void* context);
