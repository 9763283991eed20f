// The pipeline of warp-specialised kernels: stages of shared memory that a producer fills and consumers work at, and
// the turns that two consumer warpgroups take.
#pragma once

#include "cuda/sm90/instructions.cuh"

namespace pgolf::cuda::sm90 {

// Where a thread is in a pipeline. The phase is the parity that it waits for: a barrier starts as if the phase of
// parity 1 had just ended, so that a producer's first wait for each stage ends at once.
struct PipelineState {
  int stage, phase;

  static __device__ PipelineState of_producer() { return {0, 1}; }
  static __device__ PipelineState of_consumer() { return {0, 0}; }
  // The phase of the stage before this one, which may lie at the end of the ring.
  __device__ int phase_before() const { return stage == 0 ? phase ^ 1 : phase; }
};

// A ring of stages. Each has two mbarriers side by side: `full`, on which the producer arrives and which counts the
// bytes of its TMA loads, and `empty`, on which the consumers arrive. A barrier tells only one phase from the next:
// nobody may wait for a phase of a stage before all have seen the end of the phase two before it.
template <int kStages>
struct Pipeline {
  static constexpr int kBarrierBytes = 16 * kStages;
  unsigned barriers;     // in shared memory, kBarrierBytes
  int stages = kStages;  // those in use

  __device__ unsigned full(int stage) const { return barriers + 16 * stage; }
  __device__ unsigned empty(int stage) const { return barriers + 16 * stage + 8; }

  // By one thread; mbarrier_init_fence and a __syncthreads have to follow. consumers: arrivals that empty a stage.
  __device__ void init(unsigned consumers) const {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), consumers);
    }
  }
  __device__ void advance(PipelineState& at) const {
    if (++at.stage == stages) at.stage = 0, at.phase ^= 1;
  }
  // Where consumers find what was the number-th to fill a stage.
  __device__ PipelineState at(int number) const { return {number % stages, number / stages & 1}; }

  // The producer: waits until the stage is empty. With bytes, the stage is full when so many have come by TMA loads,
  // which get the barrier that is returned; without, commit says so.
  __device__ void acquire(const PipelineState& at) const { mbarrier_wait(empty(at.stage), at.phase); }
  __device__ unsigned acquire(const PipelineState& at, unsigned bytes) const {
    acquire(at);
    mbarrier_arrive_expect_tx(full(at.stage), bytes);
    return full(at.stage);
  }
  __device__ void commit(const PipelineState& at) const { mbarrier_arrive(full(at.stage)); }

  // A consumer: waits until the stage is full, and gives it back.
  __device__ void wait(const PipelineState& at) const { wait(at.stage, at.phase); }
  __device__ void wait(int stage, int phase) const { mbarrier_wait(full(stage), phase); }
  __device__ void release(int stage) const { mbarrier_arrive(empty(stage)); }
  // For a warp that has converged since its lanes read the stage by ordinary loads; kWarpArrivals arrivals.
  __device__ void release_warp(int stage) const { mbarrier_arrive_warp(empty(stage)); }
};

// `count` stages further on, for a thread that leaves them to others: both numbers are worked out once.
struct PipelineSkip {
  int stages, phases;

  template <int kStages>
  __device__ PipelineSkip(const Pipeline<kStages>& pipeline, int count)
      : stages(count % pipeline.stages), phases(count / pipeline.stages & 1) {}
  template <int kStages>
  __device__ void operator()(const Pipeline<kStages>& pipeline, PipelineState& at) const {
    at.stage += stages;
    at.phase ^= phases;
    if (at.stage >= pipeline.stages) at.stage -= pipeline.stages, at.phase ^= 1;
  }
};

// Two consumer warpgroups that take turns (ping-pong): one issues its wgmma while the other one is in its epilogue.
struct PingPong {
  static constexpr int kWarpgroups = 2, kBarrierBytes = 8 * kWarpgroups;
  unsigned barriers;  // in shared memory, kBarrierBytes

  __device__ void init() const {
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup)
      mbarrier_init(barriers + 8 * warpgroup, kWarpgroup / kWarp);
  }
  // The first warpgroup's first wait ends at once.
  static __device__ int first_phase(int warpgroup) { return warpgroup == 0; }
  __device__ void wait(int warpgroup, int phase) const { mbarrier_wait(barriers + 8 * warpgroup, phase); }
  // By one lane of each warp.
  __device__ void pass_on(int warpgroup) const { mbarrier_arrive(barriers + 8 * (1 - warpgroup)); }
};

}  // namespace pgolf::cuda::sm90
