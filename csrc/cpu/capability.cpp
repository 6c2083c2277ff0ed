#include "capability.h"

#include <ATen/Version.h>
#if defined(FASTRES_X86)
#include <cpuid.h>
#endif

namespace fastres::cpu {
namespace {

// Whether AVX-512 instructions take two turns through units of 256 bits: AMD's before Zen 5.
bool has_half_vectors() {
#if defined(FASTRES_X86)
  static const bool half = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    if (!__builtin_cpu_is("amd") || __get_cpuid(1, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned kZen5 = 0x1a;
    return (a >> 8 & 0xf) + (a >> 20 & 0xff) < kZen5;
  }();
  return half;
#else
  return false;
#endif
}

}  // namespace

Capability capability() {
  static const Capability chosen = [] {
#if defined(FASTRES_X86)
    const std::string aten = at::get_cpu_capability();
    if (aten == "AVX512") return Capability::kAvx512;
    if (aten == "AVX2") return Capability::kAvx2;
#endif
    return Capability::kDefault;
  }();
  return chosen;
}

Bfloat16Unit bfloat16_unit() {
#if defined(FASTRES_X86)
  static const Bfloat16Unit found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("amx-bf16")) return Bfloat16Unit::kMatrix;
    if (!__builtin_cpu_is("amd") || !__builtin_cpu_supports("avx512bf16")) {
      return Bfloat16Unit::kNone;
    }
    return capability() == Capability::kAvx512 ? Bfloat16Unit::kVector : Bfloat16Unit::kMatrix;
  }();
  return found;
#else
  return Bfloat16Unit::kMatrix;
#endif
}

std::string capability_name() {
  switch (capability()) {
    case Capability::kAvx512:
      return "AVX512";
    case Capability::kAvx2:
      return "AVX2";
    case Capability::kDefault:
      break;
  }
  return "DEFAULT";
}

std::vector<std::string> compiled_capabilities() {
#if defined(FASTRES_X86)
  return {"DEFAULT", "AVX2", "AVX512"};
#else
  return {"DEFAULT"};
#endif
}

bool is_intel() {
#if defined(FASTRES_X86)
  __builtin_cpu_init();
  static const bool intel = __builtin_cpu_is("intel");
  return intel;
#else
  return false;
#endif
}

double multiply_adds() {
  constexpr double kOfAvx2 = 2 * 8;
  return capability() == Capability::kAvx512 && !has_half_vectors() ? 2 * kOfAvx2 : kOfAvx2;
}

}  // namespace fastres::cpu
