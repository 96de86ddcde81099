// The instruction sets that kernels for the CPU are written for, and the one that they take.

#pragma once

#include "../check.h"

#include <cstdlib>
#include <string>

namespace rpe_ops {

enum class Isa : int { plain, avx2, avx512, avx512_bf16 };
constexpr const char* kIsaNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};

// the highest that this machine has
inline Isa isa_of_machine() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(RPE_OPS_PLAIN)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return Isa::plain;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::plain;
#endif
}

// That one, or the lower one that RPE_OPS_ISA names: read in every call, so that tests try each.
inline Isa isa() {
  static const Isa machine = isa_of_machine();
  const char* wish = std::getenv("RPE_OPS_ISA");
  if (wish == nullptr || *wish == '\0') return machine;
  std::string names;
  for (int n = 0; n <= int(machine); ++n) {
    if (std::string(wish) == kIsaNames[n]) return Isa(n);
    names += (n > 0 ? ", " : "") + std::string(kIsaNames[n]);
  }
  check(false, "RPE_OPS_ISA=", wish, ": this machine has ", names, "; expected one of these, or nothing");
  return machine;
}

}  // namespace rpe_ops
