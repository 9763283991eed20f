// Which kernels a GPU runs: plain arithmetic, tested without one.
#pragma once

namespace pgolf::cuda {

// Sets of kernels, named after the instructions that they need. sm_90a's exist on compute capability 9.0 alone: in code
// for any other GPU, a later one too, they trap. So whoever chooses a kernel asks for a capability, never for a set "or
// newer". `PGOLF_CUDA_PATH=75|80|90` forces a lower set.
enum class KernelSet { sm75 = 75, sm80 = 80, sm90a = 90 };

// The set of code that was compiled for __CUDA_ARCH__ = `arch`; sm90a_features: __CUDA_ARCH_FEAT_SM90_ALL is defined.
constexpr KernelSet kernel_set_of(int arch, bool sm90a_features) {
  if (sm90a_features) return KernelSet::sm90a;
  return arch >= 800 ? KernelSet::sm80 : KernelSet::sm75;
}

constexpr bool has_bf16(KernelSet set) { return set != KernelSet::sm75; }
constexpr bool has_wgmma(KernelSet set) { return set == KernelSet::sm90a; }  // and TMA

}  // namespace pgolf::cuda
