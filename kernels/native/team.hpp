// The threads of a step: the caller is one of them, the others wait for it.
//
// Rule: idle is idle. A helper spins for a short time after a step (the next one usually follows at once), then sleeps.
// Inside a step threads meet at barriers that spin, and yield the core when the partner does not come soon. Where others
// want the cores too, a step of hundreds of meetings waits most of the time for a thread that has no core: the caller
// then goes on alone for a while (see Crowding), which changes no number.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <ctime>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mill {

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The processor time of this thread.
inline std::chrono::nanoseconds time_on_core() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
}

// Whether a team is worth having now. Alone the caller would need `threads` times its own share of the step; so the team
// has lost when waiting for late threads took more than (threads - 1) / threads of the step, and they were late for want of
// a core: one that is late because the kernel clears the memory it writes first is no reason to do without it. Then the
// caller goes on alone for ten times as long as that step took: trying again costs a tenth of the time at most.
class Crowding {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Crowding(int threads) : threads_(threads) {}

  bool alone(Clock::time_point now) const { return now < until_; }
  void go_alone(Clock::time_point until) { until_ = until; }
  // Of a step with the team: how long the caller waited for late threads, and the most that one of them had no core.
  void observe(Clock::time_point start, Clock::time_point end, Clock::duration late, Clock::duration off_core) {
    if (late * threads_ > (end - start) * (threads_ - 1) && 2 * off_core > late) until_ = end + kRest * (end - start);
  }

 private:
  static constexpr int kRest = 10;
  int threads_;
  Clock::time_point until_{};
};

class Team {
 public:
  explicit Team(int size)
      : size_(size), crew_(size), crowding_(size), caller_(std::this_thread::get_id()), off_core_(size_t(size)) {
    for (int index = 1; index < size; index++) helpers_.emplace_back([this, index] { help(index); });
  }

  ~Team() {
    stopping_.store(true);
    announce();
    for (auto& helper : helpers_) helper.join();
  }

  int size() const { return size_; }
  // How many of them take part in what runs now: all, or the caller alone.
  int crew() const { return crew_; }
  // Steps that begin before then are the caller's alone.
  void go_alone(Crowding::Clock::time_point until) { crowding_.go_alone(until); }

  // Runs work(thread) on every thread of the team and returns when all are done. One call at a time.
  void run(const std::function<void(int)>& work) {
    crew_ = size_;
    work_ = &work;
    announce();
    in_plain_rounding(work, 0);
    meet();
  }

  // Runs work(thread) on the crew that is quickest now. The work must not count on more threads than crew().
  void run_step(const std::function<void(int)>& work) {
    const auto start = Crowding::Clock::now();
    if (size_ == 1 || crowding_.alone(start)) {
      crew_ = 1;
      in_plain_rounding(work, 0);
      return;
    }
    caller_ = std::this_thread::get_id();
    late_ = {};
    start_ = start;
    run(work);
    crowding_.observe(start, Crowding::Clock::now(), late_, *std::max_element(off_core_.begin() + 1, off_core_.end()));
  }

  // Nobody passes before everybody has arrived.
  void meet() {
    if (crew_ == 1) return;
    const uint32_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int tries = 0; round_.load(std::memory_order_acquire) == round; tries++) {
      if (tries == kSpinsBeforeYield) return wait_for_late(round);
      pause_briefly();
    }
  }

 private:
  void wait_for_late(uint32_t round) {
    const auto start = Crowding::Clock::now();
    while (round_.load(std::memory_order_acquire) == round) std::this_thread::yield();
    if (std::this_thread::get_id() == caller_) late_ += Crowding::Clock::now() - start;
  }

  static constexpr int kSpinsBeforeYield = 4000;                   // some 60 us: longer than any healthy phase's imbalance
  static constexpr auto kSpinAfterStep = std::chrono::microseconds(200);  // a wake-up costs about 50

  void announce() {
    epoch_.fetch_add(1);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> hold(lock_);
      wake_.notify_all();
    }
  }

  void help(int index) {
    uint32_t seen = 0;
    while (true) {
      const auto start = std::chrono::steady_clock::now();
      while (epoch_.load() == seen && std::chrono::steady_clock::now() - start < kSpinAfterStep)
        for (int i = 0; i < 16; i++) pause_briefly();
      if (epoch_.load() == seen) {
        std::unique_lock<std::mutex> hold(lock_);
        sleepers_.fetch_add(1);
        wake_.wait(hold, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen++;
      if (stopping_.load()) return;
      const auto on_core = time_on_core();
      in_plain_rounding(*work_, index);
      off_core_[size_t(index)] = Crowding::Clock::now() - start_ - (time_on_core() - on_core);
      meet();
    }
  }

  // Other libraries may have left this thread flushing denormals or rounding elsewhere; a step must not notice.
  static void in_plain_rounding(const std::function<void(int)>& work, int index) {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1F80);
    work(index);
    _mm_setcsr(before);
#else
    work(index);
#endif
  }

  const int size_;
  int crew_;  // written by the caller between steps
  Crowding crowding_;
  std::thread::id caller_;
  Crowding::Clock::time_point start_{};
  Crowding::Clock::duration late_{};  // the caller's waiting, in this step, for threads that came late
  std::vector<Crowding::Clock::duration> off_core_;  // [threads] of the step that each helper had no core; written by it
  std::vector<std::thread> helpers_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex lock_;
  std::condition_variable wake_;
};

}  // namespace mill
