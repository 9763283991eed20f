// Pinned memory between host and GPU: neither side waits for the other unless a ring is full.
#pragma once

#include "cuda/common.cuh"

namespace pgolf::cuda {

class Event {
 public:
  Event() { PGOLF_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class PinnedMemory {
 public:
  explicit PinnedMemory(std::size_t bytes) { PGOLF_CUDA(cudaMallocHost(reinterpret_cast<void**>(&data_), bytes)); }
  ~PinnedMemory() { (void)cudaFreeHost(data_); }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
};

class Transfer {
 public:
  explicit Transfer(cudaStream_t stream) : stream_(stream) {}

  void upload(void* to, const void* from, std::size_t bytes);
  int read(const void* from, std::size_t bytes);  // returns a ticket
  void wait(int ticket, void* to, std::size_t bytes);

 private:
  // Uploads are packed into a slot one after another; a slot is used again when its last copy is done.
  static constexpr int kSlots = 4;
  static constexpr std::size_t kSlotBytes = std::size_t{4} << 20;
  static constexpr std::size_t kSlotAlign = 256;

  struct Read {
    int ticket = 0;  // 0: free
    std::size_t bytes = 0;
    Event done;
  };

  cudaStream_t stream_;
  PinnedMemory ring_{kSlots * kSlotBytes};
  Event copied_[kSlots];
  int slot_ = 0;
  std::size_t used_ = 0;  // bytes of the slot

  PinnedMemory read_memory_{Backend::kReads * Backend::kReadBytes};
  Read reads_[Backend::kReads];
  int last_ticket_ = 0;
};

}  // namespace pgolf::cuda
