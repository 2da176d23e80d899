// Drawing of tokens, sixteen lanes in one register.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#include "sampling.h"
TANDEM_SAMPLING_FUNCTIONS(fma_avx512)
#endif
