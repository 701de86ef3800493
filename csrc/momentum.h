// The numbers that a momentum step adds up for each input.
#pragma once

#include "dtype.h"

namespace moreau {

// What momentum_update adds to an input's sums.
MOREAU_HD void add_to_sums(const Momentum& a, int64_t input) {
  const double* products = a.products + input * kProducts;
  double* sums = a.sums + input * kSums;
  if (!a.first) {
    sums[summed::turned] += products[product::turned];
    sums[summed::length] += products[product::length];
  }
  if (a.squares) {
    const double square = products[product::square] * (a.samples / 2);
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
