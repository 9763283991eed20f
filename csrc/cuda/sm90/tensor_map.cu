#include "cuda/sm90/tensor_map.h"

#include <cudaTypedefs.h>

#include "cuda/common.cuh"

namespace pgolf::cuda::sm90 {
namespace {

// The driver's function, asked for by name: nothing here is linked with the driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    PGOLF_CUDA(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || !function)
      throw DeviceError("The NVIDIA driver has no cuTensorMapEncodeTiled; update it, or set PGOLF_CUDA_PATH=80.");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

}  // namespace

CUtensorMap tensor_map(const void* data, DType dtype, i64 count, i64 rows, i64 columns, int box_rows) {
  alignas(64) CUtensorMap map;
  const auto bytes = [&](i64 numbers) { return static_cast<cuuint64_t>(numbers) * size_of(dtype); };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(count)};
  const cuuint64_t strides[] = {bytes(columns), bytes(rows * columns)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1}, steps[] = {1, 1, 1};
  const CUresult result =
      encoder()(&map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw DeviceError(sentence("CUDA failed in cuTensorMapEncodeTiled for matrices [", count, ", ", rows, ", ", columns,
                               "]: error ", static_cast<int>(result), "."));
  return map;
}

}  // namespace pgolf::cuda::sm90
