#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.hpp"

#ifdef ENTROLLM_HAVE_X86
#include <cpuid.h>
#endif
#ifdef ENTROLLM_HAVE_AMX
#include "kernels/x86/amx_parts.hpp"
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace entrollm {
namespace {

#ifdef ENTROLLM_HAVE_X86
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

// __builtin_cpu_supports() of Clang knows no name for it before version 16.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 1u << 4) != 0;
}

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni") &&
         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("bmi2");
}
#endif

#ifdef ENTROLLM_HAVE_NEON
bool runs_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  return true;  // every 64-bit ARM Mac has it
#else
  return false;
#endif
}
#endif

}  // namespace

std::span<const BuiltKernels> built_kernels() {
  static const BuiltKernels kernels[] = {
#ifdef ENTROLLM_HAVE_AMX
      {&kAmxKernels, runs_avx512() && runs_amx()},
#endif
#ifdef ENTROLLM_HAVE_X86
      {&kAvx512Kernels, runs_avx512()},
      {&kAvx2VnniKernels, runs_avx2() && has_avx_vnni()},
      {&kAvx2Kernels, runs_avx2()},
#endif
#ifdef ENTROLLM_HAVE_NEON
      {&kNeonDotKernels, runs_dot_product()},
      {&kNeonKernels, true},
#endif
      {&kScalarKernels, true},
  };
  return kernels;
}

const Kernels& select_kernels(const char* name) {
  const std::string wanted = name == nullptr ? "" : name;
  std::string known;
  for (const auto& [kernels, runs] : built_kernels()) {
    if (wanted.empty() ? runs : wanted == kernels->name) {
      if (!runs)
        throw std::invalid_argument("ENTROLLM_ISA=" + wanted + ": this processor lacks it");
      return *kernels;
    }
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("ENTROLLM_ISA=" + wanted + " is not one of: " + known);
}

const Kernels& kernels() {
  static const Kernels& chosen = select_kernels(std::getenv("ENTROLLM_ISA"));
  return chosen;
}

}  // namespace entrollm
