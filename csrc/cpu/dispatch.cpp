// Chooses the instruction set once, when the first backend is made. Compiled for the baseline machine.
#include <cstdlib>
#include <string_view>

#include "backend.h"
#include "core/error.h"
#include "cpu/product.h"

namespace pgolf {

namespace plain {
std::unique_ptr<Backend> make_backend(DType, DType);
void run_product(const CpuProduct&);
double run_multiply_adds(std::int64_t);
}  // namespace plain
#ifdef PGOLF_HAVE_X86_KERNELS
namespace avx2 {
std::unique_ptr<Backend> make_backend(DType, DType);
void run_product(const CpuProduct&);
double run_multiply_adds(std::int64_t);
}  // namespace avx2
namespace avx512 {
std::unique_ptr<Backend> make_backend(DType, DType);
void run_product(const CpuProduct&);
double run_multiply_adds(std::int64_t);
}  // namespace avx512
#endif

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  std::unique_ptr<Backend> (*make)(DType, DType);
  void (*product)(const CpuProduct&);
  double (*multiply_adds)(std::int64_t);
};

#ifdef PGOLF_HAVE_X86_KERNELS
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

// Widest first.
constexpr Isa kSets[] = {
#ifdef PGOLF_HAVE_X86_KERNELS
    {"avx512", has_avx512, avx512::make_backend, avx512::run_product, avx512::run_multiply_adds},
    {"avx2", has_avx2, avx2::make_backend, avx2::run_product, avx2::run_multiply_adds},
#endif
    {"plain", [] { return true; }, plain::make_backend, plain::run_product, plain::run_multiply_adds},
};

const Isa& chosen() {
  static const Isa& isa = []() -> const Isa& {
    const char* wanted = std::getenv("PGOLF_CPU_ISA");
    if (wanted && *wanted) {
      std::string names;
      for (const Isa& set : kSets) {
        if (std::string_view(wanted) == set.name) {
          require(set.supported(), "PGOLF_CPU_ISA is \"", wanted, "\", which this processor does not have.");
          return set;
        }
        names += (names.empty() ? "" : ", ") + std::string(set.name);
      }
      require(false, "PGOLF_CPU_ISA is \"", wanted, "\"; this build knows: ", names, ".");
    }
    for (const Isa& set : kSets)
      if (set.supported()) return set;
    return kSets[std::size(kSets) - 1];
  }();
  return isa;
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(DType master, DType rounding) { return chosen().make(master, rounding); }
double cpu_multiply_adds(std::int64_t steps) { return chosen().multiply_adds(steps); }
void cpu_product(const CpuProduct& product) { chosen().product(product); }
std::string cpu_isa() { return chosen().name; }

}  // namespace pgolf
