#include "cuda/blas.h"

#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <system_error>

#include "core/error.h"
#include "core/shared_library.h"

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
namespace pgolf::cuda::lt {
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(HeuristicResult, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(kSuccess == int{CUBLAS_STATUS_SUCCESS} && kCompute32F == int{CUBLAS_COMPUTE_32F});
static_assert(kTranspose == int{CUBLAS_OP_T});
static_assert(kReduceInComputeType == std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
static_assert(kTransposeA == int{CUBLASLT_MATMUL_DESC_TRANSA} && kTransposeB == int{CUBLASLT_MATMUL_DESC_TRANSB});
static_assert(kBatchCount == int{CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT});
static_assert(kBatchStride == int{CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET});
static_assert(kMaxWorkspace == int{CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES});
static_assert(kReductionSchemes == int{CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK});
static_assert(kAlignmentA == int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES});
static_assert(kAlignmentB == int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES});
static_assert(kAlignmentC == int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES});
static_assert(kAlignmentD == int{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES});
static_assert(kId == int{CUBLASLT_ALGO_CONFIG_ID} && kTile == int{CUBLASLT_ALGO_CONFIG_TILE_ID});
static_assert(kSplitK == int{CUBLASLT_ALGO_CONFIG_SPLITK_NUM});
static_assert(kReduction == int{CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME});
static_assert(kSwizzle == int{CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING});
static_assert(kCustom == int{CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION} && kStages == int{CUBLASLT_ALGO_CONFIG_STAGES_ID});
static_assert(kInnerShape == int{CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID});
static_assert(kClusterShape == int{CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID});
}  // namespace pgolf::cuda::lt
#endif

namespace pgolf::cuda {
namespace {

constexpr int kMajor = 13;  // its binary interface changes with the next
#if defined(_WIN32)
constexpr const char* kFile = "cublasLt64_13.dll";
#else
constexpr const char* kFile = "libcublasLt.so.13";
#endif

std::string version_text(int version) {
  return sentence(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

// Throws DeviceError where pgolf cannot use it.
BlasLibrary examine(const SharedLibrary& library, std::string name) {
  BlasLibrary blas{};
  const auto find = [&]<class F>(const char* symbol, F*& function) {
    function = library.symbol<F>(symbol);
    if (!function) throw DeviceError(sentence(name, " cannot serve as cuBLASLt: it has no function ", symbol, "."));
  };
  find("cublasLtGetVersion", blas.call.GetVersion);
  if (std::string path = file_of(reinterpret_cast<const void*>(blas.call.GetVersion)); !path.empty()) name = path;
  blas.path = name;
  blas.version = static_cast<int>(blas.call.GetVersion());
  if (blas.version / 10000 != kMajor)
    throw DeviceError(
        sentence(name, " is cuBLASLt ", version_text(blas.version), "; pgolf needs version ", kMajor, "."));
  lt::for_each(blas.call, find);
  return blas;
}

BlasLibrary find_blas(const std::vector<std::string>& folders) {
  if (const auto loaded = SharedLibrary::loaded(kFile)) return examine(loaded, kFile);
  std::string why;
  if (const char* named = std::getenv("PGOLF_CUBLASLT"); named && *named) {
    if (const auto library = SharedLibrary::open(named, why)) return examine(library, named);
    throw DeviceError(sentence("PGOLF_CUBLASLT is \"", named, "\", which cannot be opened: ", why, "."));
  }
  for (const std::string& folder : folders) {
    const std::string path = (std::filesystem::path(folder) / kFile).string();
    std::error_code error;
    if (!std::filesystem::exists(path, error)) continue;
    if (const auto library = SharedLibrary::open(path, why)) return examine(library, path);
    throw DeviceError(sentence(path, " cannot be opened: ", why, "."));
  }
  if (const auto library = SharedLibrary::open(kFile, why)) return examine(library, kFile);
  throw DeviceError(sentence("cuBLASLt ", kMajor, " (", kFile, ") is neither in the Python environment nor on the ",
                             "system; pip install 'pgolf[cuda]' brings it."));
}

cudaDataType_t type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return CUDA_R_32F;
    case DType::bf16:
      return CUDA_R_16BF;
    case DType::f16:
      return CUDA_R_16F;
    default:
      throw std::invalid_argument("A matrix product takes float32, bfloat16 or float16.");
  }
}

const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "float32" : dtype == DType::bf16 ? "bfloat16" : "float16";
}

std::string describe(const Gemm& p) {
  return sentence(p.count, " × ", name_of(p.out), " [", p.m, ", ", p.n, "] = ", name_of(p.in),
                  p.transpose_a ? " transposed" : "", " [", p.m, ", ", p.k, "] · ", p.transpose_b ? "transposed " : "",
                  "[", p.k, ", ", p.n, "], rows ", p.lda, ", ", p.ldb, " and ", p.ldd, " apart");
}

// The largest power of two up to 256, all that algorithms ask for, that every matrix of a batch is aligned to.
std::uint32_t alignment_of(const void* first, i64 count, i64 step, DType dtype) {
  auto bits = reinterpret_cast<std::uintptr_t>(first) | std::uintptr_t{256};
  if (count > 1) bits |= static_cast<std::uintptr_t>(step) * size_of(dtype);
  return static_cast<std::uint32_t>(bits & (~bits + 1));
}

}  // namespace

const BlasLibrary& open_blas(const std::vector<std::string>& folders) {
  static std::mutex mutex;
  static std::optional<BlasLibrary> found;
  const std::lock_guard lock(mutex);
  if (!found) found = find_blas(folders);
  return *found;
}

Blas::Blas(Backend& backend)
    : library_(open_blas({})), backend_(backend), workspace_(backend.allocate(kWorkspaceBytes)) {
  if (const lt::Status status = library_.call.Create(&context_); status != lt::kSuccess) {
    backend.release(workspace_);
    check(status, "cublasLtCreate");
  }
}

Blas::~Blas() {
  plans_.clear();
  (void)library_.call.Destroy(context_);
  backend_.release(workspace_);
}

void Blas::check(lt::Status status, const std::string& what) const {
  if (status == lt::kSuccess) return;
  (void)cudaGetLastError();
  throw DeviceError(sentence("cuBLASLt ", version_text(library_.version), " failed in ", what, ": ",
                             library_.call.GetStatusName(status), "."));
}

Blas::Key Blas::key_of(const Gemm& p) {
  const bool batch = p.count > 1;
  const auto align = [&](const void* first, i64 step, DType dtype) {
    return i64{alignment_of(first, p.count, step, dtype)};
  };
  const i64 kind =
      i64{p.transpose_a} + 2 * i64{p.transpose_b} + 4 * static_cast<i64>(p.in) + 64 * static_cast<i64>(p.out);
  return {p.m,
          p.n,
          p.k,
          kind,
          p.lda,
          p.ldb,
          p.ldd,
          p.count,
          batch ? p.a_step : 0,
          batch ? p.b_step : 0,
          batch ? p.d_step : 0,
          align(p.a, p.a_step, p.in),
          align(p.b, p.b_step, p.in),
          align(p.c ? p.c : p.d, p.d_step, p.out),
          align(p.d, p.d_step, p.out)};
}

Blas::Owned<lt::Layout> Blas::make_layout(DType dtype, i64 rows, i64 columns, i64 ld, i64 count, i64 step) const {
  lt::Layout* raw = nullptr;
  check(library_.call.MatrixLayoutCreate(&raw, type_of(dtype), rows, columns, ld), "cublasLtMatrixLayoutCreate");
  Owned<lt::Layout> layout(raw, library_.call.MatrixLayoutDestroy);
  if (count > 1) {
    const auto batch = static_cast<std::int32_t>(count);
    check(library_.call.MatrixLayoutSetAttribute(raw, lt::kBatchCount, &batch, sizeof batch), "a batch's size");
    check(library_.call.MatrixLayoutSetAttribute(raw, lt::kBatchStride, &step, sizeof step), "a batch's stride");
  }
  return layout;
}

// cuBLASLt's matrices are column-major. Read that way, every matrix here is its own transpose, and D = A·B becomes
// Dᵀ = Bᵀ·Aᵀ: what cuBLASLt calls A is our B, its B our A, its rows our n, and the transpositions stay what they are.
Blas::Plan Blas::make_plan(const Gemm& p) const {
  const lt::Functions& call = library_.call;
  const std::string shape = describe(p);

  lt::Operation* operation = nullptr;
  check(call.MatmulDescCreate(&operation, lt::kCompute32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  Plan plan{Owned<lt::Operation>(operation, call.MatmulDescDestroy),
            make_layout(p.in, p.transpose_b ? p.k : p.n, p.transpose_b ? p.n : p.k, p.ldb, p.count, p.b_step),
            make_layout(p.in, p.transpose_a ? p.m : p.k, p.transpose_a ? p.k : p.m, p.lda, p.count, p.a_step),
            make_layout(p.out, p.n, p.m, p.ldd, p.count, p.d_step),
            {},
            {}};
  const auto transpose = [&](lt::OperationAttribute attribute) {
    check(call.MatmulDescSetAttribute(operation, attribute, &lt::kTranspose, sizeof lt::kTranspose), "a transposition");
  };
  if (p.transpose_b) transpose(lt::kTransposeA);
  if (p.transpose_a) transpose(lt::kTransposeB);

  lt::Preference* raw = nullptr;
  check(call.MatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate");
  const Owned<lt::Preference> preference(raw, call.MatmulPreferenceDestroy);
  const auto prefer = [&](lt::PreferenceAttribute attribute, auto value) {
    check(call.MatmulPreferenceSetAttribute(raw, attribute, &value, sizeof value), "a preference");
  };
  prefer(lt::kMaxWorkspace, std::uint64_t{kWorkspaceBytes});
  // A product cut along k is summed in float32, in order, and rounded once.
  prefer(lt::kReductionSchemes, lt::kReduceInComputeType);
  prefer(lt::kAlignmentA, alignment_of(p.b, p.count, p.b_step, p.in));
  prefer(lt::kAlignmentB, alignment_of(p.a, p.count, p.a_step, p.in));
  prefer(lt::kAlignmentC, alignment_of(p.c ? p.c : p.d, p.count, p.d_step, p.out));
  prefer(lt::kAlignmentD, alignment_of(p.d, p.count, p.d_step, p.out));

  lt::HeuristicResult result{};
  int found = 0;
  const lt::Status status =
      call.MatmulAlgoGetHeuristic(context_, operation, plan.first.get(), plan.second.get(), plan.out.get(),
                                  plan.out.get(), preference.get(), 1, &result, &found);
  if (status != lt::kSuccess || found == 0 || result.state != lt::kSuccess)
    throw DeviceError(
        sentence("cuBLASLt ", version_text(library_.version), " has no algorithm on this GPU for ", shape, "."));
  plan.algorithm = result.algorithm;
  plan.text = shape + ": " + describe_algorithm(plan.algorithm);
  return plan;
}

std::string Blas::describe_algorithm(const lt::Algorithm& algorithm) const {
  const auto get = [&](lt::AlgorithmAttribute attribute, auto value) {
    std::size_t written = 0;
    check(library_.call.MatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof value, &written),
          "cublasLtMatmulAlgoConfigGetAttribute");
    return value;
  };
  constexpr std::uint32_t word = 0;
  constexpr std::uint16_t half_word = 0;
  return sentence("algorithm ", get(lt::kId, word), ", tile ", get(lt::kTile, word), ", stages ",
                  get(lt::kStages, word), ", split-k ", get(lt::kSplitK, word), ", reduction ",
                  get(lt::kReduction, word), ", swizzle ", get(lt::kSwizzle, word), ", custom ", get(lt::kCustom, word),
                  ", inner shape ", get(lt::kInnerShape, half_word), ", cluster ", get(lt::kClusterShape, half_word));
}

void Blas::multiply(const Gemm& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0 || p.count == 0) return;
  const Key key = key_of(p);
  auto found = plans_.find(key);
  if (found == plans_.end()) found = plans_.emplace(key, make_plan(p)).first;
  const Plan& plan = found->second;
  const lt::Status status = library_.call.Matmul(context_, plan.operation.get(), &p.alpha, p.b, plan.first.get(), p.a,
                                                 plan.second.get(), &p.beta, p.c ? p.c : p.d, plan.out.get(), p.d,
                                                 plan.out.get(), &plan.algorithm, workspace_, kWorkspaceBytes, stream);
  if (status != lt::kSuccess) check(status, describe(p));
}

std::string Blas::choices() const {
  std::string lines;
  for (const auto& [key, plan] : plans_) lines += plan.text + "\n";
  return lines;
}

void CudaBackend::gemm(const Gemm& product) const { blas_->multiply(product, stream_); }

}  // namespace pgolf::cuda
