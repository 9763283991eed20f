// One thread pool. Work is cut by shape, never by thread count, and each piece is done whole by one
// thread: results have the same bits for any number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace pgolf {

int thread_count();
void set_thread_count(int count);  // 1 … 1024
int worker_index();                // inside a task: 0 … thread_count() − 1; selects a worker's scratch

using TaskFunction = void (*)(void* context, std::int64_t index);

// Runs function(context, i) for i in [0, count), the caller taking part. Inside a task, or while another
// thread has the pool, everything runs on the caller. The first exception of a task is rethrown.
void run_tasks(std::int64_t count, TaskFunction function, void* context);

template <class F>
void parallel_for(std::int64_t count, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_tasks(
      count, [](void* context, std::int64_t index) { (*static_cast<Body*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

// While alive, subnormal floats are zero on this thread: x86 takes a hundred cycles for each of them.
class FlushSubnormals {
 public:
  FlushSubnormals();
  ~FlushSubnormals();
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  std::uint64_t saved_;
};

// Held by every entry from Python: subnormals are zero, and this thread keeps its pool, so that scratch sized by
// thread_count() fits until the call ends; another thread's set_thread_count takes effect from the next call.
class NativeCall {
 public:
  NativeCall();
  ~NativeCall();
  NativeCall(const NativeCall&) = delete;
  NativeCall& operator=(const NativeCall&) = delete;

 private:
  FlushSubnormals flush_;
  bool outermost_;
};

}  // namespace pgolf
