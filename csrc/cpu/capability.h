// Which instruction set serves this process. The kernel files (*_kernel.cpp) are compiled once per
// set, each time into a namespace of its own; everything else is compiled for the baseline.
#pragma once

#include <string>
#include <vector>

namespace fastres::cpu {

enum class Capability { kDefault, kAvx2, kAvx512 };

// The best set that was compiled and that ATen would choose too (ATEN_CPU_CAPABILITY included).
Capability capability();

// What multiplies bfloat16 values faster than float32 ones.
enum class Bfloat16Unit {
  kNone,    // nothing: Intel's AVX-512 instructions for it do their work at float32's rate
  kVector,  // AVX-512 at twice float32's rate: AMD's processors since Zen 4
  kMatrix,  // AMX, or what only the libraries know of
};

Bfloat16Unit bfloat16_unit();

// Whether the libraries' kernels were written for this processor above all.
bool is_intel();

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
// Of kernels that are nothing without vectors (setup.py: is_built_for): an empty table then.
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
