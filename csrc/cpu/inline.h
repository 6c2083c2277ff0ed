// For kernels: GCC keeps vectors in registers only where everything that touches them is inlined,
// and it leaves functions that take or return several of them out of line.
#pragma once

#define FASTRES_INLINED __attribute__((always_inline))
#define FASTRES_INLINE inline FASTRES_INLINED
