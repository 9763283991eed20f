// What pgolf uses of cuBLASLt 13, declared here so that compiling needs neither the library nor its headers (a wheel of
// 440 MB, for these lines). The numbers are part of cuBLASLt's binary interface and the same in all releases of a major
// version; where its headers are at hand, blas.cpp compares.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace pgolf::cuda::lt {

struct Context;
struct Operation;
struct Layout;
struct Preference;
struct Algorithm {
  std::uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  std::size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

using Status = int;
inline constexpr Status kSuccess = 0;

inline constexpr int kCompute32F = 68;
inline constexpr std::int32_t kTranspose = 1;
inline constexpr std::uint32_t kReduceInComputeType = 2;
enum OperationAttribute : int { kTransposeA = 3, kTransposeB = 4 };
enum LayoutAttribute : int { kBatchCount = 5, kBatchStride = 6 };
enum PreferenceAttribute : int {
  kMaxWorkspace = 1,
  kReductionSchemes = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8,
};
enum AlgorithmAttribute : int {
  kId = 0,
  kTile = 1,
  kSplitK = 2,
  kReduction = 3,
  kSwizzle = 4,
  kCustom = 5,
  kStages = 6,
  kInnerShape = 7,    // uint16_t, the others are 32 bits wide
  kClusterShape = 8,  // uint16_t
};

struct Functions {
  std::size_t (*GetVersion)();
  const char* (*GetStatusName)(Status status);
  Status (*Create)(Context** context);
  Status (*Destroy)(Context* context);
  Status (*MatmulDescCreate)(Operation** operation, int compute, cudaDataType_t scale);
  Status (*MatmulDescDestroy)(Operation* operation);
  Status (*MatmulDescSetAttribute)(Operation* operation, OperationAttribute attribute, const void* value,
                                   std::size_t bytes);
  Status (*MatrixLayoutCreate)(Layout** layout, cudaDataType_t type, std::uint64_t rows, std::uint64_t columns,
                               std::int64_t ld);
  Status (*MatrixLayoutDestroy)(Layout* layout);
  Status (*MatrixLayoutSetAttribute)(Layout* layout, LayoutAttribute attribute, const void* value, std::size_t bytes);
  Status (*MatmulPreferenceCreate)(Preference** preference);
  Status (*MatmulPreferenceDestroy)(Preference* preference);
  Status (*MatmulPreferenceSetAttribute)(Preference* preference, PreferenceAttribute attribute, const void* value,
                                         std::size_t bytes);
  Status (*MatmulAlgoGetHeuristic)(Context* context, Operation* operation, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int requested, HeuristicResult* results, int* found);
  Status (*MatmulAlgoConfigGetAttribute)(const Algorithm* algorithm, AlgorithmAttribute attribute, void* value,
                                         std::size_t bytes, std::size_t* written);
  Status (*Matmul)(Context* context, Operation* operation, const void* alpha, const void* a, Layout* a_layout,
                   const void* b, Layout* b_layout, const void* beta, const void* c, Layout* c_layout, void* d,
                   Layout* d_layout, const Algorithm* algorithm, void* workspace, std::size_t workspace_bytes,
                   cudaStream_t stream);
};

// Calls body(name in the library, the pointer to it) for each of them.
template <class Body>
void for_each(Functions& f, Body&& body) {
#define PGOLF_FUNCTION(name) body("cublasLt" #name, f.name)
  PGOLF_FUNCTION(GetVersion);
  PGOLF_FUNCTION(GetStatusName);
  PGOLF_FUNCTION(Create);
  PGOLF_FUNCTION(Destroy);
  PGOLF_FUNCTION(MatmulDescCreate);
  PGOLF_FUNCTION(MatmulDescDestroy);
  PGOLF_FUNCTION(MatmulDescSetAttribute);
  PGOLF_FUNCTION(MatrixLayoutCreate);
  PGOLF_FUNCTION(MatrixLayoutDestroy);
  PGOLF_FUNCTION(MatrixLayoutSetAttribute);
  PGOLF_FUNCTION(MatmulPreferenceCreate);
  PGOLF_FUNCTION(MatmulPreferenceDestroy);
  PGOLF_FUNCTION(MatmulPreferenceSetAttribute);
  PGOLF_FUNCTION(MatmulAlgoGetHeuristic);
  PGOLF_FUNCTION(MatmulAlgoConfigGetAttribute);
  PGOLF_FUNCTION(Matmul);
#undef PGOLF_FUNCTION
}

}  // namespace pgolf::cuda::lt
