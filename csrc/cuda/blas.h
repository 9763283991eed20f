// Matrix products by cuBLASLt, which is opened at run time: `open_blas` once a process, a Blas for each backend.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cublaslt.h"
#include "cuda/cuda_backend.h"

namespace pgolf::cuda {

struct BlasLibrary {
  std::string path;
  int version;  // 10000·major + 100·minor + patch
  lt::Functions call;
};

// The first of: a copy that the process has loaded (PyTorch's), the file that PGOLF_CUBLASLT names, a file in one of
// the folders, the system's. Throws DeviceError. Once it was found, it is the same for ever.
const BlasLibrary& open_blas(const std::vector<std::string>& folders);

class Blas {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what NVIDIA recommends for Hopper

  explicit Blas(Backend& backend);  // whose device must be the thread's; its workspace is the backend's memory
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // A shape's first product chooses its algorithm, the later ones allocate nothing.
  void multiply(const Gemm& product, cudaStream_t stream);

  // What was chosen, a line per shape: same lines, same library, same GPU, same bits.
  std::string choices() const;

 private:
  using Key = std::array<i64, 15>;  // all that the choice of an algorithm depends on
  static Key key_of(const Gemm& product);

  template <class T>
  using Owned = std::unique_ptr<T, lt::Status (*)(T*)>;
  struct Plan {
    Owned<lt::Operation> operation;
    Owned<lt::Layout> first, second, out;
    lt::Algorithm algorithm;
    std::string text;  // for `choices`
  };
  Plan make_plan(const Gemm& product) const;
  Owned<lt::Layout> make_layout(DType dtype, i64 rows, i64 columns, i64 ld, i64 count, i64 step) const;
  std::string describe_algorithm(const lt::Algorithm& algorithm) const;
  void check(lt::Status status, const std::string& what) const;

  const BlasLibrary& library_;
  Backend& backend_;
  void* workspace_;
  lt::Context* context_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace pgolf::cuda
