// Prints the largest errors, relative to max(|z|, 1), of the GPU's and of the CPU's Box-Muller in float against
// float64, and the two bounds of philox.h. The host uses exact functions in place of the GPU's approximate intrinsics.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "../../csrc/philox.h"

using namespace moreau;

namespace {

struct Worst {
  double fast = 0, exact = 0;

  static void take(double& worst, const float (&z)[2], const double (&expected)[2]) {
    for (int i = 0; i < 2; ++i) {
      const double error = std::fabs(double(z[i]) - expected[i]) / std::max(1.0, std::fabs(expected[i]));
      worst = error <= worst ? worst : error == error ? error : std::numeric_limits<double>::infinity();
    }
  }
  void at(uint32_t a, uint32_t b) {
    float z[2];
    double expected[2];
    box_muller<double>(a, b, expected[0], expected[1]);
    fast_box_muller(a, b, z[0], z[1]);
    take(fast, z, expected);
    box_muller<float>(a, b, z[0], z[1]);
    take(exact, z, expected);
    // The argument of the square root must be positive.
    if (!(fast_minus_two_log(a) > 0.0f)) fast = std::numeric_limits<double>::infinity();
  }
};

}  // namespace

int main() {
  Worst worst;
  uint32_t state = 1;
  const auto next = [&] { return state = state * 1664525u + 1013904223u, state ^ state >> 15; };
  for (int i = 0; i < 2000000; ++i) {
    const uint32_t a = next();
    worst.at(a, next());
  }
  // Both ends and the middle of u, where the formulas change, and every eighth of a turn.
  for (uint32_t corner = 0; corner < 8; ++corner)
    for (const uint32_t centre : {corner << 29, 0xb504f333u, 0xbfffffffu})
      for (int i = -5000; i < 5000; ++i) {
        const uint32_t k = centre + uint32_t(i), other = next();
        worst.at(k, other), worst.at(other, k), worst.at(k, k), worst.at(k, corner << 29);
      }
  std::printf("%.9g %.9g %.9g %.9g\n", worst.fast, worst.exact, kFastError, kIntrinsicsError);
}
