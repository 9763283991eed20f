// The kernels of this folder are compiled once per instruction set, each time in a namespace of its own
// (PGOLF_ISA = plain, avx2, avx512, given by the build). They use no standard containers, so that no
// template of the standard library is compiled with instructions that another machine lacks.
#pragma once

#ifndef PGOLF_ISA
#define PGOLF_ISA plain  // for editors
#endif

#define PGOLF_CPU_BEGIN \
  namespace pgolf {     \
  namespace PGOLF_ISA {
#define PGOLF_CPU_END \
  }                   \
  }

// Lets the compiler keep several partial sums of a reduction: the order is then fixed by the build.
#if defined(_MSC_VER) && !defined(__clang__)
#define PGOLF_SIMD
#define PGOLF_SIMD_SUM(x)
#define PGOLF_SIMD_MAX(x)
#else
#define PGOLF_PRAGMA(x) _Pragma(#x)
#define PGOLF_SIMD PGOLF_PRAGMA(omp simd)
#define PGOLF_SIMD_SUM(x) PGOLF_PRAGMA(omp simd reduction(+ : x))
#define PGOLF_SIMD_MAX(x) PGOLF_PRAGMA(omp simd reduction(max : x))
#endif
