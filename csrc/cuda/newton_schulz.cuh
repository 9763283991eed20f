// Newton–Schulz iterations on all matrices of Muon: memory, grouping by shape, and the GEMMs, by cuBLASLt or in one
// launch of sm90/newton_schulz.cuh.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/muon_matrices.cuh"
#include "cuda/sm90/newton_schulz.cuh"

namespace pgolf::cuda {

class NewtonSchulz {
 public:
  NewtonSchulz(Layout& layout, DType storage, std::span<const MuonTensor> tensors) : dtype_(storage) {
    for (const MuonTensor& t : tensors) {
      if (t.w.size() == 0) continue;
      MuonMatrix matrix{t.w.as<float>(),
                        t.grad.as<float>(),
                        t.momentum.as<float>(),
                        nullptr,
                        nullptr,
                        static_cast<int>(t.w.shape[0]),
                        static_cast<int>(t.w.shape[1])};
      matrix.partials = layout.take<double>(MuonMatrix::scratch_doubles(matrix.rows));
      const i64 r = matrix.padded_r(), c = matrix.padded_c();
      auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.r == r && g.c == c; });
      if (group == groups_.end()) group = groups_.insert(group, Group{.count = 0, .r = r, .c = c});
      placed_.push_back({matrix, static_cast<std::size_t>(group - groups_.begin()), group->count++});
    }
    states_ = static_cast<i64>(groups_.size() + placed_.size() + preparations() + placed_.size());
    state_ = layout.take<unsigned>(states_);
    for (Group& g : groups_) {
      g.x = layout.take(dtype_, g.count * g.r * g.c);
      g.next = layout.take(dtype_, g.count * g.r * g.c);
      g.gram = layout.take(dtype_, g.count * g.r * g.r);
      g.poly = layout.take(dtype_, g.count * g.r * g.r);
    }
  }

  // Calls launch(preparation, counters) until every matrix was in one; first of all, as it sets all counters to 0.
  template <class F>
  void prepare(cudaStream_t stream, bool normalize_rows, F&& launch) const {
    if (placed_.empty()) return;
    PGOLF_CUDA(cudaMemsetAsync(state_, 0, static_cast<std::size_t>(states_) * sizeof *state_, stream));
    unsigned* counters = state_ + groups_.size() + placed_.size();
    Preparation preparation;
    preparation.normalize_rows = normalize_rows;
    for (const Placed& p : placed_) {
      preparation.matrices[preparation.count++] = with_x(p);
      if (preparation.count < Preparation::kMatrices && &p != &placed_.back()) continue;
      preparation.number();
      launch(preparation, counters);
      counters += 1 + preparation.count;
      preparation.count = 0;
    }
  }

  // Calls launch(batch) until every matrix was in one, with blocks_of(matrix) blocks each.
  template <class BlocksOf, class F>
  void in_all(BlocksOf&& blocks_of, F&& launch) const {
    multi_tensor_apply(placed_, [&](const Placed& p) { return with_x(p); }, blocks_of, launch);
  }

  void iterate(const CudaBackend& backend, const NewtonSchulzSteps& steps) {
    if (groups_.empty()) return;
    with_storage(dtype_, [&](auto storage) {
      using S = decltype(storage);
      if constexpr (sizeof(S) == 2)
        if (backend.has_wgmma()) return sm90::launch_newton_schulz<S>(backend, groups_, steps, state_);
      for (const Group& g : groups_) iterate_group(backend, g, steps);
    });
    if (steps.steps % 2 != 0)
      for (Group& g : groups_) std::swap(g.x, g.next);
  }

 private:
  using Group = sm90::WideMatrices;
  struct Placed {
    MuonMatrix matrix;
    std::size_t group;
    i64 place;
  };

  std::size_t preparations() const { return (placed_.size() + Preparation::kMatrices - 1) / Preparation::kMatrices; }

  MuonMatrix with_x(const Placed& p) const {
    const Group& g = groups_[p.group];
    MuonMatrix matrix = p.matrix;
    matrix.x = static_cast<char*>(g.x) + static_cast<std::size_t>(p.place * g.r * g.c) * size_of(dtype_);
    return matrix;
  }

  void iterate_group(const CudaBackend& backend, const Group& g, const NewtonSchulzSteps& steps) const {
    Gemm square;  // gram = x·xᵀ
    square.transpose_b = true;
    square.m = square.n = g.r;
    square.k = square.lda = square.ldb = g.c;
    square.ldd = g.r;
    square.in = square.out = dtype_;
    square.d = g.gram;
    square.count = g.count;
    square.a_step = square.b_step = g.r * g.c;
    square.d_step = g.r * g.r;
    Gemm quartic = square;  // poly = c·gram² + b·gram; the Gram matrix is symmetric: its square is G·Gᵀ
    quartic.k = quartic.lda = quartic.ldb = g.r;
    quartic.a = quartic.b = quartic.c = g.gram;
    quartic.d = g.poly;
    quartic.a_step = quartic.b_step = g.r * g.r;
    Gemm quintic = quartic;  // next = poly·x + a·x
    quintic.transpose_b = false;
    quintic.n = quintic.ldb = quintic.ldd = g.c;
    quintic.a = g.poly;
    quintic.alpha = 1.0f;
    quintic.b_step = quintic.d_step = g.r * g.c;
    for (int step = 0; step < steps.steps; ++step) {
      quartic.alpha = static_cast<float>(steps.of(step).c);
      quartic.beta = static_cast<float>(steps.of(step).b);
      quintic.beta = static_cast<float>(steps.of(step).a);
      square.a = square.b = quintic.b = quintic.c = step % 2 == 0 ? g.x : g.next;
      quintic.d = step % 2 == 0 ? g.next : g.x;
      backend.gemm(square);
      backend.gemm(quartic);
      backend.gemm(quintic);
    }
  }

  DType dtype_;
  std::vector<Placed> placed_;
  std::vector<Group> groups_;
  unsigned* state_ = nullptr;  // zeros at first: launch_newton_schulz's, then those of prepare's launches
  i64 states_ = 0;
};

}  // namespace pgolf::cuda
