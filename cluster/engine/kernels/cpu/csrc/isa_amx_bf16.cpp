// AMX tiles for the dot chains, AVX-512 for the rest.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#define TANDEM_DOT_AMX
#define TANDEM_ISA tandem_amx_bf16
#include "exports.h"
#endif
