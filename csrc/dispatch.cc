// Chooses the table of kernels once, by what the processor says of itself.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace dlm {

// With DLM_ISA, as the kernels have it, the module holds that instruction set alone, and runs where its builder knows that it can.
#if defined(DLM_ISA)
extern const Kernels DLM_JOIN(kernels_, DLM_ISA);
#else
extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16;
#endif
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool available;
};

// Best first.
std::vector<Candidate> candidates() {
#if defined(DLM_ISA)
  return {{&DLM_JOIN(kernels_, DLM_ISA), true}};
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{&kernels_avx512_bf16, avx512_bf16}, {&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_portable, true}};
#else
  return {{&kernels_portable, true}};
#endif
}

const Kernels& choose() {
  const char* wanted = std::getenv("DLM_KERNELS_ISA");
  std::string known;
  for (const Candidate& candidate : candidates()) {
    const std::string isa = candidate.kernels->isa;
    if (wanted == nullptr || *wanted == '\0') {
      if (candidate.available) return *candidate.kernels;
    } else if (isa == wanted) {
      if (!candidate.available) throw std::invalid_argument("DLM_KERNELS_ISA: this processor has no " + isa);
      return *candidate.kernels;
    }
    known += (known.empty() ? "" : ", ") + isa;
  }
  throw std::invalid_argument("DLM_KERNELS_ISA: expected one of " + known + ", got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.available) names.push_back(candidate.kernels->isa);
  return names;
}

}  // namespace dlm
