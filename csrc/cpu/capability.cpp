#include "capability.h"

#include <ATen/Version.h>

namespace fastres::cpu {

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

}  // namespace fastres::cpu
