// Single instructions that only Hopper has: the copy engine (TMA), barriers in shared memory that count its bytes, and
// products of a whole warpgroup of 128 threads (wgmma). In code for other GPUs they trap: for has_wgmma() alone.
#pragma once

#include <cuda.h>

#include "cuda/mma.cuh"

namespace pgolf::cuda::sm90 {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PGOLF_SM90(...) __VA_ARGS__
#else
#define PGOLF_SM90(...) __trap()
#endif

inline constexpr int kWarpgroup = 4 * kWarp;

// A number that is the same in all lanes of a warp, which the compiler learns by this: what follows from it, as loops
// and descriptors of products, then takes no lane's registers and none of their moves.
template <class T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// ---- Barriers: 8 bytes each. A phase ends when `count` threads have arrived and all expected bytes have come.

__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned count) {
  PGOLF_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory"));
}
// After the last init, before the __syncthreads that shows the barriers to everybody.
__device__ __forceinline__ void barriers_ready() {
  PGOLF_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  PGOLF_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
}
// Arrives for a whole warp, whose lanes have met (__syncwarp) since they read what is given back here.
// compute-sanitizer's racecheck does not see that the others' reads come before an arrival by one of them; for it,
// -DPGOLF_RACECHECK makes every lane arrive.
#if defined(PGOLF_RACECHECK)
inline constexpr int kWarpArrivals = kWarp;
#else
inline constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void warp_arrive(unsigned barrier) {
  if (kWarpArrivals == kWarp || threadIdx.x % kWarp == 0) barrier_arrive(barrier);
}
__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {  // arrives too
  PGOLF_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"));
}
// Waits for the end of the phase of this parity: 0, 1, 0, …
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  PGOLF_SM90(
      asm volatile("{\n"
                   ".reg .pred done;\n"
                   "again:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra again;\n"
                   "}" ::"r"(barrier),
                   "r"(parity) : "memory"));
}

// ---- The copy engine

// The box of a tensor map whose first number is that of (row, column) of a matrix to shared memory; rows that the
// matrix lacks come as zeros. `barrier` gets the bytes of the whole box.
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap* map, int column, int row, int matrix,
                                         unsigned barrier) {
  PGOLF_SM90(
      asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                   "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                   "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier) : "memory"));
}
// Such a box to the second-level cache alone, at some time.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int column, int row, int matrix) {
  PGOLF_SM90(asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(column),
                          "r"(row), "r"(matrix) : "memory"));
}
// `bytes`, a multiple of 16, as they lie; both addresses too are such multiples.
__device__ __forceinline__ void copy_bytes(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  PGOLF_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(from), "r"(bytes), "r"(barrier) : "memory"));
}
__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
  PGOLF_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

// Eight rows of 128 bytes: where a swizzled tile may begin. Dynamic shared memory begins at a multiple of 16.
inline constexpr int kSwizzleBytes = 1024;
__device__ __forceinline__ unsigned char* align_shared(unsigned char* raw) {
  return raw + (kSwizzleBytes - shared_address(raw) % kSwizzleBytes) % kSwizzleBytes;
}

// Orders what this thread has stored before the copies of whoever learns of it: the engine has a way of its own to
// memory.
__device__ __forceinline__ void stores_before_copies() { PGOLF_SM90(asm volatile("fence.proxy.async;" :: : "memory")); }
// The same for what this thread has stored in shared memory alone: it does not wait for memory.
__device__ __forceinline__ void shared_stores_before_copies() {
  PGOLF_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// ---- Products of a warpgroup

// Where wgmma finds rows of 64 16-bit numbers, eight rows in 1,024 bytes, in the copy engine's 128-byte swizzle. The
// tile begins at a multiple of 1,024; where products sum over columns, a step of 16 adds 32 bytes to the address
// (behind), where they sum over rows 2,048. Where they sum over rows that have more than 64 numbers, `next` is how many
// bytes further the tile of the next 64 of each begins.
__device__ __forceinline__ std::uint64_t descriptor(unsigned address, unsigned next = 0) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62, kEightRows = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | std::uint64_t{next >> 4} << 16 | ((address & 0x3ffff) >> 4);
}
// The same for `bytes` further on: one addition, for no shared memory reaches so far that it would carry.
__device__ __forceinline__ std::uint64_t behind(std::uint64_t descriptor, unsigned bytes) {
  const unsigned low = static_cast<unsigned>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000u) | low;
}

__device__ __forceinline__ void products_begin() {
  PGOLF_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}
__device__ __forceinline__ void products_commit() {
  PGOLF_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
template <int kGroups>  // that may still be under way
__device__ __forceinline__ void products_wait() {
  PGOLF_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory"));
}
// After a wait: from here on these are the products. Without it NVVM may read them before; it leaves nothing in PTX.
template <int kTiles>
__device__ __forceinline__ void products_done(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

// To be called where the program never comes, and the compiler does not know: these registers are then what they were
// made up to there. ptxas (13.0) has to be told so
//   at the end of a loop's body of fragments that products of its next turn read, for it gives their registers to
//   others; before a wait of what is to be done by then, for it puts it off until after the wait.
__device__ __forceinline__ void keep(const unsigned (&a)[4], unsigned shared) {
  asm volatile("st.volatile.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a[0]), "r"(a[1]), "r"(a[2]),
               "r"(a[3]));
}
__device__ __forceinline__ void keep(const float (&a)[4], unsigned shared) {
  asm volatile("st.volatile.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(a[0]), "f"(a[1]), "f"(a[2]),
               "f"(a[3]));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  PGOLF_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  PGOLF_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

// c (+)= a·bᵀ for 64 rows of a, 128 rows of b and 16 columns of both; or a·b, for 16 rows of b of 128 numbers. c as
// sixteen 16×8 results of each warp, which has 16 of the rows. `add` false: c is overwritten.
#define PGOLF_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define PGOLF_WGMMA_64X128(type)                                                                                     \
  asm volatile(                                                                                                      \
      "{\n"                                                                                                          \
      ".reg .pred kept;\n"                                                                                           \
      "setp.ne.b32 kept, %66, 0;\n"                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "        \
      "%64, %65, kept, 1, 1, 0, %67;\n"                                                                              \
      "}"                                                                                                            \
      : PGOLF_C4(0), PGOLF_C4(1), PGOLF_C4(2), PGOLF_C4(3), PGOLF_C4(4), PGOLF_C4(5), PGOLF_C4(6), PGOLF_C4(7),      \
        PGOLF_C4(8), PGOLF_C4(9), PGOLF_C4(10), PGOLF_C4(11), PGOLF_C4(12), PGOLF_C4(13), PGOLF_C4(14), PGOLF_C4(15) \
      : "l"(a), "l"(b), "r"(int{add}), "n"(static_cast<int>(kSecond)))
enum class Second { transposed, plain };  // bᵀ or b
template <class S, Second kSecond = Second::transposed>
__device__ __forceinline__ void multiply_add_64x128(float (&c)[16][4], std::uint64_t a, std::uint64_t b, bool add) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same_v<S, bf16>)
    PGOLF_WGMMA_64X128("bf16");
  else
    PGOLF_WGMMA_64X128("f16");
#else
  __trap();
#endif
}
#undef PGOLF_WGMMA_64X128

// c (+)= a·bᵀ or a·b for 64 rows of a, 16 of whose columns each warp holds as an A fragment of its 16 rows (mma.cuh),
// and 64 rows of b of 16 columns, or 16 rows of 64 numbers.
#define PGOLF_WGMMA_64X64(type)                                                                                     \
  asm volatile(                                                                                                     \
      "{\n"                                                                                                         \
      ".reg .pred kept;\n"                                                                                          \
      "setp.ne.b32 kept, %37, 0;\n"                                                                                 \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, kept, 1, 1, %38;\n"                 \
      "}"                                                                                                           \
      : PGOLF_C4(0), PGOLF_C4(1), PGOLF_C4(2), PGOLF_C4(3), PGOLF_C4(4), PGOLF_C4(5), PGOLF_C4(6), PGOLF_C4(7)      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add}), "n"(static_cast<int>(kSecond)))
template <class S, Second kSecond>
__device__ __forceinline__ void multiply_add_64x64(float (&c)[8][4], const unsigned (&a)[4], std::uint64_t b,
                                                   bool add = true) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same_v<S, bf16>)
    PGOLF_WGMMA_64X64("bf16");
  else
    PGOLF_WGMMA_64X64("f16");
#else
  __trap();
#endif
}
#undef PGOLF_WGMMA_64X64
#undef PGOLF_C4
#undef PGOLF_SM90

}  // namespace pgolf::cuda::sm90
