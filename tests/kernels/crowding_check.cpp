// When a team is given up for a while. Ends with 1 after naming the first expectation that does not hold.
#include <cstdio>

#include "../../kernels/native/team.hpp"

using namespace std::chrono_literals;

static bool alone_after(int threads, std::chrono::milliseconds late, std::chrono::milliseconds off_core) {
  mill::Crowding crowding(threads);
  const mill::Crowding::Clock::time_point start{};
  crowding.observe(start, start + 100ms, late, off_core);
  return crowding.alone(start + 101ms);
}

static int failed = 0;

static void expect(bool holds, const char* what) {
  if (!holds && !failed++) std::puts(what);
}

int main() {
  expect(alone_after(2, 60ms, 55ms), "a thread without a core for most of a step is a crowd");
  expect(!alone_after(2, 60ms, 5ms), "a thread that is late on its core is none");
  expect(!alone_after(2, 40ms, 40ms), "less than half of a step is no reason with two threads");
  expect(!alone_after(4, 60ms, 60ms) && alone_after(4, 80ms, 80ms), "with four it takes three quarters");

  mill::Team one(1);
  int runs = 0;
  one.run_step([&](int thread) { runs += 1 + thread; });
  expect(runs == 1 && one.crew() == 1, "a team of one runs a step once");
  return failed ? 1 : 0;
}
