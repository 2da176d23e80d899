// Class fma, sixteen lanes in two registers.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define TANDEM_ISA tandem_fma_avx2
#include "exports.h"
#endif
