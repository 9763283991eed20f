#include "core/parallel.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "core/error.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#define PGOLF_X86 1
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define PGOLF_FORKS 1
#endif

namespace pgolf {
namespace {

thread_local int t_worker = 0;
thread_local bool t_inside = false;

struct Job {
  TaskFunction function = nullptr;
  void* context = nullptr;
  std::int64_t count = 0;
  std::atomic<std::int64_t> next{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  void work() {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        function(context, i);
      } catch (...) {
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { loop(i); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  bool try_run(std::int64_t count, TaskFunction function, void* context) {
    std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy) return false;
    job_.function = function;
    job_.context = context;
    job_.count = count;
    job_.next.store(0);
    job_.error = nullptr;
    {
      std::lock_guard lock(mutex_);
      open_ = true;
      ++generation_;
    }
    wake_.notify_all();
    t_inside = true;
    job_.work();
    t_inside = false;
    {
      std::lock_guard lock(mutex_);
      open_ = false;  // a worker that has not come by now is not waited for: the system may have no core for it
    }
    // The last pieces end within microseconds of each other: spin a little before sleeping.
    for (int spin = 0; spin < kSpins && active_.load(std::memory_order_acquire) > 0; ++spin) pause();
    if (active_.load(std::memory_order_acquire) > 0) {
      std::unique_lock lock(mutex_);
      done_.wait(lock, [&] { return active_.load(std::memory_order_acquire) == 0; });
    }
    if (job_.error) std::rethrow_exception(job_.error);
    return true;
  }

 private:
  static constexpr int kSpins = 4000;  // about 50 µs

  static void pause() {
#ifdef PGOLF_X86
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  void loop(int index) {
    t_worker = index;
    t_inside = true;
    FlushSubnormals flush;
    std::uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) pause();
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (stop_) return;
        if (!open_) continue;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      job_.work();
      if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> workers_;
  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> active_{0};  // workers inside the job
  bool stop_ = false, open_ = false;
  Job job_;
};

std::mutex g_pool_mutex;
std::shared_ptr<Pool>* g_pool = new std::shared_ptr<Pool>;  // leaked: threads may outlive static destruction

std::atomic<int> g_wanted_threads{0};  // what set_thread_count said; a forked child keeps it

int initial_threads() {
  if (const int wanted = g_wanted_threads.load()) return wanted;
  if (const char* text = std::getenv("PGOLF_NUM_THREADS"); text && *text) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    require(end != text && *end == '\0' && value >= 1 && value <= 1024, "PGOLF_NUM_THREADS is \"", text,
            "\"; it must be a whole number from 1 to 1024.");
    return static_cast<int>(value);
  }
  const unsigned cores = std::thread::hardware_concurrency();
  return cores ? static_cast<int>(cores) : 1;
}

thread_local std::shared_ptr<Pool> t_pool;  // kept by a NativeCall

std::shared_ptr<Pool> pool() {
  if (t_pool) return t_pool;
  std::lock_guard lock(g_pool_mutex);
  if (!*g_pool) {
#ifdef PGOLF_FORKS
    // A forked child has the pool's memory but not its threads: it starts with no pool and makes its own.
    // The parent's object is leaked there, since joining threads that do not exist would hang.
    static const int registered = pthread_atfork([] { g_pool_mutex.lock(); }, [] { g_pool_mutex.unlock(); },
                                                 [] {
                                                   g_pool = new std::shared_ptr<Pool>;
                                                   g_pool_mutex.unlock();
                                                   t_inside = false;
                                                   t_worker = 0;
                                                 });
    (void)registered;
#endif
    *g_pool = std::make_shared<Pool>(initial_threads());
  }
  return *g_pool;
}

}  // namespace

int thread_count() { return pool()->threads(); }
int worker_index() { return t_worker; }

void set_thread_count(int count) {
  require(count >= 1 && count <= 1024, "The number of threads is ", count, "; it must be from 1 to 1024.");
  auto replacement = std::make_shared<Pool>(count);
  g_wanted_threads.store(count);
  pool();  // registers what a fork needs
  std::lock_guard lock(g_pool_mutex);
  *g_pool = std::move(replacement);
}

void run_tasks(std::int64_t count, TaskFunction function, void* context) {
  if (count > 1 && !t_inside) {
    const auto current = pool();
    if (current->threads() > 1 && current->try_run(count, function, context)) return;
  }
  for (std::int64_t i = 0; i < count; ++i) function(context, i);
}

NativeCall::NativeCall() : outermost_(!t_pool) {
  if (outermost_) t_pool = pool();
}

NativeCall::~NativeCall() {
  if (outermost_) t_pool.reset();
}

FlushSubnormals::FlushSubnormals() {
#if defined(PGOLF_X86)
  saved_ = _mm_getcsr();
  _mm_setcsr(static_cast<unsigned>(saved_) | 0x8040);  // flush-to-zero, denormals-are-zero
#elif defined(__aarch64__)
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(saved_ | (1u << 24)));
#else
  saved_ = 0;
#endif
}

FlushSubnormals::~FlushSubnormals() {
#if defined(PGOLF_X86)
  _mm_setcsr(static_cast<unsigned>(saved_));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" ::"r"(saved_));
#endif
}

}  // namespace pgolf
