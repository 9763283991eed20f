// The CUDA backend as the rest of the extension sees it: a library beside the extension, opened when it is first asked
// for. Whatever is missing on this machine becomes a sentence.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"

namespace pgolf {

struct CudaDevice {
  std::string name;  // "NVIDIA H100 80GB HBM3"
  int major, minor;  // compute capability
  std::uint64_t memory;
  std::string problem;  // why pgolf cannot use it; empty: it can
};

struct CublasLt {
  std::string path;
  int version = 0;  // 10000·major + 100·minor + patch
};

struct CudaStatus {
  // What is missing before a model can live on GPU 0: "backend" (the library), "working backend", "driver",
  // "newer driver", "GPU", "newer GPU", "code for GPU" (the library was compiled for others), "cuBLASLt"; empty:
  // nothing. `problem` says it as a sentence.
  std::string missing, problem;
  std::string library;       // path of libpgolf_cuda; empty where it is missing, and so is the rest
  std::string compiled_for;  // "90a-real,80-virtual"
  int runtime = 0;           // the CUDA it was compiled with, 1000·major + 10·minor
  int driver = 0;            // the newest CUDA that the driver supports; 0: no driver
  std::vector<CudaDevice> devices;
  CublasLt cublaslt;  // looked for only where GPU 0 can be used
};

// Where wheels keep cuBLASLt: folders that need not exist.
void set_library_folders(std::vector<std::string> folders);

CudaStatus cuda_status();

CublasLt open_cublaslt();  // throws DeviceError

// The dtype that training on a GPU stores activations in where nobody asks for another; throws DeviceError.
DType cuda_dtype(int device);

std::unique_ptr<Backend> make_cuda_backend(int device, DType storage);  // throws DeviceError

// What the library has allocated on the host, counted as core/memory.h counts for the extension; 0 where it is not
// open.
std::int64_t cuda_allocation_count() noexcept;

const char* build_stamp();  // version and a hash over all of csrc/, which library and extension must agree on

}  // namespace pgolf
