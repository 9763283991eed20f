// PTX that only Hopper (sm_90a) has: TMA, mbarriers that count its bytes, and wgmma, the MMA of a warpgroup of 128
// threads. In code for other GPUs these functions trap: for has_wgmma() alone.
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

// Broadcasts lane 0 of a value that is the same in the whole warp, so that the compiler keeps it, and what follows from
// it (loop counts, matrix descriptors), in uniform registers.
template <class T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

// ---- mbarriers: 8 bytes of shared memory each. A phase completes when `count` threads have arrived and all expected
// bytes have come.

__device__ __forceinline__ void mbarrier_init(unsigned barrier, unsigned count) {
  PGOLF_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory"));
}
// After the last init, before the __syncthreads that makes the barriers visible to the block.
__device__ __forceinline__ void mbarrier_init_fence() {
  PGOLF_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
  PGOLF_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
}
// Arrives for a whole warp that has converged (__syncwarp) since its lanes read what is released here.
// compute-sanitizer's racecheck does not see that the other lanes' reads come before one lane's arrival; for it,
// -DPGOLF_RACECHECK makes every lane arrive.
#if defined(PGOLF_RACECHECK)
inline constexpr int kWarpArrivals = kWarp;
#else
inline constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void mbarrier_arrive_warp(unsigned barrier) {
  if (kWarpArrivals == kWarp || threadIdx.x % kWarp == 0) mbarrier_arrive(barrier);
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned barrier, unsigned bytes) {
  PGOLF_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"));
}
// Waits until the phase of this parity (0, 1, 0, …) has completed.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned phase) {
  PGOLF_SM90(
      asm volatile("{\n"
                   ".reg .pred done;\n"
                   "again:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                   "@!done bra again;\n"
                   "}" ::"r"(barrier),
                   "r"(phase) : "memory"));
}

// ---- TMA

// Loads a tensor map's box whose corner is (row, column) of a matrix into shared memory; rows that the matrix lacks
// come as zeros. `barrier` counts the bytes of the whole box.
__device__ __forceinline__ void tma_load(unsigned to, const CUtensorMap* map, int column, int row, int matrix,
                                         unsigned barrier) {
  PGOLF_SM90(
      asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                   "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                   "l"(map), "r"(column), "r"(row), "r"(matrix), "r"(barrier) : "memory"));
}
// Prefetches such a box into L2; nothing tells when it is there.
__device__ __forceinline__ void tma_prefetch_l2(const CUtensorMap* map, int column, int row, int matrix) {
  PGOLF_SM90(asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(column),
                          "r"(row), "r"(matrix) : "memory"));
}
// The bulk copy of contiguous `bytes`. They and both addresses are multiples of 16.
__device__ __forceinline__ void tma_load_bulk(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
  PGOLF_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(from), "r"(bytes), "r"(barrier) : "memory"));
}
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  PGOLF_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

// Eight rows of 128 bytes: where a swizzled tile may begin. Dynamic shared memory begins at a multiple of 16.
inline constexpr int kSwizzleBytes = 1024;
__device__ __forceinline__ unsigned char* align_shared(unsigned char* raw) {
  return raw + (kSwizzleBytes - shared_address(raw) % kSwizzleBytes) % kSwizzleBytes;
}

// Makes this thread's stores visible to TMA loads, which go through the async proxy, by whoever synchronises with it.
__device__ __forceinline__ void fence_proxy_async() { PGOLF_SM90(asm volatile("fence.proxy.async;" :: : "memory")); }
// The same for stores to shared memory alone: it does not wait for global memory.
__device__ __forceinline__ void fence_proxy_async_shared() {
  PGOLF_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// ---- wgmma

// The matrix descriptor of an operand in shared memory: rows of 64 16-bit numbers in the 128-byte swizzle, as TMA
// writes them, eight rows in 1,024 bytes. The tile begins at a multiple of 1,024. A step of 16 along k adds 32 bytes
// for a K-major operand, 2,048 for an MN-major one (advance_descriptor). leading_bytes, for an MN-major operand of more
// than 64 columns: from the tile of 64 of them to the next.
__device__ __forceinline__ std::uint64_t matrix_descriptor(unsigned address, unsigned leading_bytes = 0) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62, kEightRows = std::uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | std::uint64_t{leading_bytes >> 4} << 16 | ((address & 0x3ffff) >> 4);
}
// The descriptor of `bytes` further on: one addition, which cannot carry out of the address field, as shared memory is
// smaller than that.
__device__ __forceinline__ std::uint64_t advance_descriptor(std::uint64_t descriptor, unsigned bytes) {
  const unsigned low = static_cast<unsigned>(descriptor) + (bytes >> 4);
  return (descriptor & 0xffffffff00000000u) | low;
}

__device__ __forceinline__ void wgmma_fence() { PGOLF_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
__device__ __forceinline__ void wgmma_commit_group() {
  PGOLF_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
template <int kPending>  // groups that may still be in flight
__device__ __forceinline__ void wgmma_wait_group() {
  PGOLF_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"));
}
// After wgmma_wait_group: keeps NVVM from moving reads of the accumulator before the wait. It emits nothing.
template <int kTiles>
__device__ __forceinline__ void fence_operand(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

// ptxas 13.0 workaround: a store that is never executed, behind a condition that the compiler cannot decide, keeps
// these registers live up to it. Needed at the end of a loop body for A fragments that the next iteration's wgmma
// reads, whose registers ptxas else reuses, and before a wait for what is to be computed by then, which it else sinks
// below the wait.
__device__ __forceinline__ void keep_live(const unsigned (&a)[4], unsigned shared) {
  asm volatile("st.volatile.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a[0]), "r"(a[1]), "r"(a[2]),
               "r"(a[3]));
}
__device__ __forceinline__ void keep_live(const float (&a)[4], unsigned shared) {
  asm volatile("st.volatile.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(a[0]), "f"(a[1]), "f"(a[2]),
               "f"(a[3]));
}

template <int kRegisters>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  PGOLF_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}
template <int kRegisters>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  PGOLF_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

// c (+)= a·b for a [64, 16] and b [16, 128], both in shared memory. c: sixteen 16×8 tiles of each warp, which has 16 of
// the rows. `add` false: c is overwritten.
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
      : "l"(a), "l"(b), "r"(int{add}), "n"(static_cast<int>(kMajorB)))
// How b [k, n] is stored: K-major, as rows of n (a·bᵀ of these), or MN-major, as rows of k. wgmma's transpose bit.
enum class Major { k, mn };
template <class S, Major kMajorB = Major::k>
__device__ __forceinline__ void wgmma_m64n128k16(float (&c)[16][4], std::uint64_t a, std::uint64_t b, bool add) {
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

// c (+)= a·b for a [64, 16] in registers, of which each warp holds its 16 rows as an A fragment (mma.cuh), and b [16,
// 64] in shared memory.
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
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add}), "n"(static_cast<int>(kMajorB)))
template <class S, Major kMajorB>
__device__ __forceinline__ void wgmma_m64n64k16(float (&c)[8][4], const unsigned (&a)[4], std::uint64_t b,
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
