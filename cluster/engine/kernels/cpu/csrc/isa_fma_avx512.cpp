// Class fma, sixteen lanes in one register.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define TANDEM_ISA tandem_fma_avx512
#include "exports.h"
#endif
