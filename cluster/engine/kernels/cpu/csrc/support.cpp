// What this processor and operating system offer.
#include <cstring>
#if defined(__x86_64__)
#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {
#if defined(__x86_64__)
// AMX needs the kernel's permission; it is for the whole process and all its threads.
bool amx_is_permitted() {
  constexpr long ARCH_REQUEST_COMPONENT_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQUEST_COMPONENT_PERMISSION, TILE_DATA) == 0;
}
bool has_leaf7(unsigned subleaf, unsigned output, unsigned bit) {  // output: 0 eax .. 3 edx
  unsigned r[4] = {};
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[output] >> bit & 1);
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif
}  // namespace

// 1 if the functions tandem_<name>_* may be called in this process.
extern "C" __attribute__((visibility("default"))) int tandem_supports(const char* name) {
  if (strcmp(name, "fma_portable") == 0) return 1;
#if defined(__x86_64__)
  if (strcmp(name, "fma_avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (strcmp(name, "fma_avx512") == 0) return has_avx512();
  if (strcmp(name, "avx512_bf16") == 0) return has_avx512() && has_leaf7(1, 0, 5);
  if (strcmp(name, "amx_bf16") == 0)
    return has_avx512() && has_leaf7(1, 0, 5) && has_leaf7(0, 3, 22) && has_leaf7(0, 3, 24) && amx_is_permitted();
#endif
  return 0;
}

extern "C" __attribute__((visibility("default"))) const char* tandem_source_hash() { return TANDEM_SOURCE_HASH; }
