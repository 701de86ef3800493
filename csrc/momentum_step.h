// The running sums of a momentum step, shared by host and device.
#pragma once

#include "dtype.h"

namespace moreau {

// Adds one step to the sums of an input; see `summed` in kernels.h.
MOREAU_HD void add_to_sums(const MomentumStep& a, int64_t input) {
  const double* products = a.products + input * kProducts;
  double* sums = a.sums + input * kSums;
  if (!a.first) {
    sums[summed::step_dot_last] += products[product::step_dot_last];
    sums[summed::last_sq] += products[product::last_sq];
  }
  if (a.squares) {
    const double square = products[product::dg_dg] * (a.samples / 2);
    sums[summed::differences] += 1;
    sums[summed::norms] += square;
    sums[summed::norms2] += square * square;
  }
  if (a.points) {
    sums[summed::lengths] += a.samples * a.statistics[input * kStatistics + displacement2];
    sums[summed::weight] += a.samples;
    sums[summed::steps] += 1;
  }
}

}  // namespace moreau
