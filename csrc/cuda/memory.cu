// Memory of the GPU, copies between it and the host, and recorded steps.
#include <algorithm>
#include <cstring>

#include "cuda/common.cuh"
#include "cuda/transfer.h"

namespace pgolf::cuda {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

std::size_t mebibytes(std::size_t bytes) { return bytes / kMiB + (bytes % kMiB != 0); }

// For calls that wait: what failed may be any kernel before them.
void check_finished(cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw DeviceError(sentence("The GPU reported \"", cudaGetErrorString(status),
                             "\" while it was computing; the work since the last checkpoint is lost."));
}

}  // namespace

void Transfer::upload(void* to, const void* from, std::size_t bytes) {
  auto* target = static_cast<char*>(to);
  const auto* source = static_cast<const char*>(from);
  while (bytes > 0) {
    if (used_ == kSlotBytes) {
      slot_ = (slot_ + 1) % kSlots;
      check_finished(cudaEventSynchronize(copied_[slot_]));
      used_ = 0;
    }
    const std::size_t piece = std::min(bytes, kSlotBytes - used_);
    char* staged = ring_.data() + static_cast<std::size_t>(slot_) * kSlotBytes + used_;
    std::memcpy(staged, source, piece);
    PGOLF_CUDA(cudaMemcpyAsync(target, staged, piece, cudaMemcpyHostToDevice, stream_));
    PGOLF_CUDA(cudaEventRecord(copied_[slot_], stream_));
    used_ += (piece + kSlotAlign - 1) / kSlotAlign * kSlotAlign;
    target += piece;
    source += piece;
    bytes -= piece;
  }
}

int Transfer::read(const void* from, std::size_t bytes) {
  require(bytes > 0 && bytes <= Backend::kReadBytes, "A later read takes ", bytes, " bytes; it may take 1 to ",
          Backend::kReadBytes, ".");
  const auto free = std::find_if(std::begin(reads_), std::end(reads_), [](const Read& r) { return r.ticket == 0; });
  require(free != std::end(reads_), "All ", Backend::kReads,
          " later reads are under way; one must be waited for before the next.");
  char* pinned = read_memory_.data() + static_cast<std::size_t>(free - reads_) * Backend::kReadBytes;
  PGOLF_CUDA(cudaMemcpyAsync(pinned, from, bytes, cudaMemcpyDeviceToHost, stream_));
  PGOLF_CUDA(cudaEventRecord(free->done, stream_));
  free->bytes = bytes;
  return free->ticket = ++last_ticket_;
}

void Transfer::wait(int ticket, void* to, std::size_t bytes) {
  const auto found = std::find_if(std::begin(reads_), std::end(reads_),
                                  [&](const Read& r) { return ticket > 0 && r.ticket == ticket; });
  require(found != std::end(reads_), "No later read with the ticket ", ticket,
          " is under way; a ticket is waited for once.");
  require(bytes <= found->bytes, "The later read took ", found->bytes, " bytes; ", bytes, " cannot be had from it.");
  found->ticket = 0;
  check_finished(cudaEventSynchronize(found->done));
  std::memcpy(to, read_memory_.data() + static_cast<std::size_t>(found - reads_) * Backend::kReadBytes, bytes);
}

void* CudaBackend::allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  use();
  blocks_.reserve(blocks_.size() + 1);
  void* pointer = nullptr;
  const bool allowed = bytes <= limit_ && allocated_ <= limit_ - bytes;
  const cudaError_t status = allowed ? cudaMalloc(&pointer, bytes) : cudaErrorMemoryAllocation;
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    std::size_t free = 0, total = 0;
    PGOLF_CUDA(cudaMemGetInfo(&free, &total));
    throw DeviceError(sentence("Out of GPU memory: tried to allocate ", mebibytes(bytes), " MiB; ",
                               mebibytes(allocated_), " MiB are taken, the limit is ", limit_ / kMiB, " MiB, and ",
                               free / kMiB, " MiB of the GPU's ", total / kMiB, " MiB are free."));
  }
  check(status, "cudaMalloc");
  allocated_ += bytes;
  peak_ = std::max(peak_, allocated_);
  blocks_.emplace_back(pointer, bytes);
  return pointer;
}

void CudaBackend::release(void* pointer) noexcept {
  const auto block = std::find_if(blocks_.begin(), blocks_.end(), [=](const auto& b) { return b.first == pointer; });
  if (block == blocks_.end()) return;
  allocated_ -= block->second;
  blocks_.erase(block);
  (void)cudaSetDevice(device_);
  (void)cudaFree(pointer);
}

void CudaBackend::upload(void* to, const void* from, std::size_t bytes) {
  use();
  transfer_->upload(to, from, bytes);
}

void CudaBackend::download(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  use();
  check_finished(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
  check_finished(cudaStreamSynchronize(stream_));
}

void CudaBackend::zero(const TensorView& t) {
  if (t.size() == 0) return;
  use();
  PGOLF_CUDA(cudaMemsetAsync(t.data, 0, t.bytes(), stream_));
}

void CudaBackend::copy(const TensorView& to, const TensorView& from) {
  if (from.size() == 0) return;
  use();
  PGOLF_CUDA(cudaMemcpyAsync(to.data, from.data, from.bytes(), cudaMemcpyDeviceToDevice, stream_));
}

void CudaBackend::synchronize() {
  use();
  check_finished(cudaStreamSynchronize(stream_));
}

int CudaBackend::read_later(const void* from, std::size_t bytes) {
  use();
  return transfer_->read(from, bytes);
}

void CudaBackend::wait(int ticket, void* to, std::size_t bytes) {
  use();
  transfer_->wait(ticket, to, bytes);
}

int CudaBackend::capture(int recording, const std::function<void()>& fn) {
  use();
  if (recording != 0) {
    const auto index = static_cast<std::size_t>(recording) - 1;
    require(index < recordings_.size() && recordings_[index], "There is no recording ", recording,
            "; it was never made or has been forgotten.");
    PGOLF_CUDA(cudaGraphLaunch(recordings_[index], stream_));
    return recording;
  }
  fn();  // kernels and library calls load their code when they first run, which no capture may see
  if (!graphs_) return 0;

  cudaGraph_t graph = nullptr;
  PGOLF_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  try {
    fn();
  } catch (...) {
    (void)cudaStreamEndCapture(stream_, &graph);
    if (graph) (void)cudaGraphDestroy(graph);
    (void)cudaGetLastError();
    throw;
  }
  PGOLF_CUDA(cudaStreamEndCapture(stream_, &graph));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  (void)cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  auto place = std::find(recordings_.begin(), recordings_.end(), nullptr);
  if (place == recordings_.end()) place = recordings_.insert(place, nullptr);
  *place = executable;
  PGOLF_CUDA(cudaGraphUpload(executable, stream_));
  return static_cast<int>(place - recordings_.begin()) + 1;
}

void CudaBackend::forget(int recording) noexcept {
  const auto index = static_cast<std::size_t>(recording) - 1;
  if (recording <= 0 || index >= recordings_.size() || !recordings_[index]) return;
  (void)cudaSetDevice(device_);
  (void)cudaStreamSynchronize(stream_);  // it may still be running
  (void)cudaGraphExecDestroy(recordings_[index]);
  recordings_[index] = nullptr;
}

}  // namespace pgolf::cuda
