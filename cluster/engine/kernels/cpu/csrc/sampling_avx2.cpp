// Drawing of tokens, sixteen lanes in two registers.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include "sampling.h"
TANDEM_SAMPLING_FUNCTIONS(fma_avx2)
#endif
