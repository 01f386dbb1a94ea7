#include <cstdlib>
#include <initializer_list>
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
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace entrollm {
namespace {

#ifdef ENTROLLM_HAVE_X86
// Bits that CPUID and XGETBV report. The compilers' __builtin_cpu_supports needs a run-time library
// that is not linked on Windows, and lacks names for some of these in older versions.
struct Features {
  unsigned leaf1_ecx = 0;
  unsigned leaf7_ebx = 0;
  unsigned leaf7_ecx = 0;
  unsigned leaf7_1_eax = 0;
  unsigned saved_states = 0;  // registers that the system saves when it switches threads
};

Features read_features() {
  Features features;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &features.leaf1_ecx, &edx) == 0) return {};
  constexpr unsigned kHasXgetbv = 1u << 27;
  if ((features.leaf1_ecx & kHasXgetbv) != 0) {
    asm volatile("xgetbv" : "=a"(features.saved_states), "=d"(edx) : "c"(0));
  }
  if (__get_cpuid_count(7, 0, &eax, &features.leaf7_ebx, &features.leaf7_ecx, &edx) == 0) return {};
  const unsigned last_subleaf = eax;
  if (last_subleaf >= 1) __get_cpuid_count(7, 1, &features.leaf7_1_eax, &ebx, &ecx, &edx);
  return features;
}

const Features& features() {
  static const Features found = read_features();
  return found;
}

bool has_all(unsigned word, std::initializer_list<unsigned> bits) {
  for (const unsigned bit : bits) {
    if ((word >> bit & 1) == 0) return false;
  }
  return true;
}

bool runs_avx2() {
  return has_all(features().saved_states, {1, 2})        // SSE and AVX registers
         && has_all(features().leaf1_ecx, {12, 23, 29})  // FMA, POPCNT, F16C
         && has_all(features().leaf7_ebx, {3, 5, 8});    // BMI1, AVX2, BMI2
}

bool has_avx_vnni() { return has_all(features().leaf7_1_eax, {4}); }

bool runs_avx512() {
  return runs_avx2() && has_all(features().saved_states, {5, 6, 7})  // masks, high halves, ZMM16-31
         && has_all(features().leaf7_ebx, {16, 17, 30, 31})          // F, DQ, BW, VL
         && has_all(features().leaf7_ecx, {1, 6, 8, 11, 14});  // VBMI, VBMI2, GFNI, VNNI, VPOPCNTDQ
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

bool runs_matrix_products() {
#if defined(__linux__)
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers lack
  return (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__APPLE__)
  int found = 0;
  std::size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found != 0;
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
      {&kNeonI8mmKernels, runs_dot_product() && runs_matrix_products()},
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
