// Which instruction set serves this process. The kernel files (*_kernel.cpp) are compiled once per
// set, each time into a namespace of its own; everything else is compiled for the baseline.
#pragma once

#include <string>
#include <vector>

namespace fastres::cpu {

enum class Capability { kDefault, kAvx2, kAvx512 };

// The best set that was compiled and that ATen would choose too (ATEN_CPU_CAPABILITY included).
Capability capability();

// Whether a product of bfloat16 vectors takes half the time of a float32 one. It does where there
// are matrix units (AMX), and on AMD's processors since Zen 4; Intel's AVX-512 instructions for it
// do their work at float32's rate.
bool bfloat16_is_faster();

// Of float32, that a core can begin in a cycle.
double multiply_adds();

std::string capability_name();
std::vector<std::string> compiled_capabilities();

// Names the variants of a kernel table, declared as `template <typename T> Table<T> GETTER();`.
#if defined(FASTRES_X86)
#define FASTRES_DECLARE_KERNELS(Table, getter) \
  namespace DEFAULT {                          \
  template <typename T>                        \
  Table<T> getter();                           \
  }                                            \
  namespace AVX2 {                             \
  template <typename T>                        \
  Table<T> getter();                           \
  }                                            \
  namespace AVX512 {                           \
  template <typename T>                        \
  Table<T> getter();                           \
  }
#define FASTRES_SELECT_KERNELS(getter, T)                                    \
  (::fastres::cpu::capability() == Capability::kAvx512 ? AVX512::getter<T>() \
   : ::fastres::cpu::capability() == Capability::kAvx2 ? AVX2::getter<T>()   \
                                                       : DEFAULT::getter<T>())
// Of kernels that are nothing without vectors (setup.py: VECTOR_KERNELS): an empty table then.
#define FASTRES_SELECT_VECTOR_KERNELS(getter, T)                             \
  (::fastres::cpu::capability() == Capability::kAvx512 ? AVX512::getter<T>() \
   : ::fastres::cpu::capability() == Capability::kAvx2 ? AVX2::getter<T>()   \
                                                       : decltype(AVX2::getter<T>()){})
#else
#define FASTRES_DECLARE_KERNELS(Table, getter) \
  namespace DEFAULT {                          \
  template <typename T>                        \
  Table<T> getter();                           \
  }
#define FASTRES_SELECT_KERNELS(getter, T) DEFAULT::getter<T>()
#define FASTRES_SELECT_VECTOR_KERNELS(getter, T) \
  decltype(DEFAULT::getter<T>()) {}
#endif

}  // namespace fastres::cpu
