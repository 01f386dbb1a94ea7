#include <stdexcept>
#include <string>
#include <vector>

#include "isa/kernels.hpp"

namespace entrollm {
namespace {

bool runs_here(const Kernels& kernels) {
#ifdef ENTROLLM_HAVE_AVX512
  if (&kernels == &kAvx512Kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni") &&
           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("popcnt") &&
           __builtin_cpu_supports("bmi2");
  }
#endif
  return &kernels == &kScalarKernels;
}

// Fastest first.
const std::vector<const Kernels*>& built_kernels() {
  static const std::vector<const Kernels*> kernels = {
#ifdef ENTROLLM_HAVE_AVX512
      &kAvx512Kernels,
#endif
      &kScalarKernels,
  };
  return kernels;
}

}  // namespace

const Kernels& select_kernels(const char* name) {
  const std::string wanted = name == nullptr ? "" : name;
  std::string known;
  for (const Kernels* kernels : built_kernels()) {
    if (wanted.empty() ? runs_here(*kernels) : wanted == kernels->name) {
      if (!runs_here(*kernels)) {
        throw std::invalid_argument("ENTROLLM_ISA=" + wanted + ": this processor lacks it");
      }
      return *kernels;
    }
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("ENTROLLM_ISA=" + wanted + " is not one of: " + known);
}

}  // namespace entrollm
