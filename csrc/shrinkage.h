// Soft-thresholding and group shrinkage, shared by host and device.
#pragma once

#include "dtype.h"

namespace moreau {

// S_t(v) = v - clip(v, -t, t) = sign(v) max(|v| - t, 0). Exactly +0 for |v| <= t, exactly v for t = 0, and NaN for a
// NaN in v or t: comparisons with NaN are false, so clip returns v or t, and one of them is NaN.
template <class S>
MOREAU_HD S soft_threshold(S v, S t) {
  const S upper = v <= t ? v : t;
  return v - (v < -t ? -t : upper);
}

// max(1 - t / norm, 0), the factor of a group. A group of norm 0 has the factor 0 (1 if t = 0), never 0/0.
MOREAU_HD double group_factor(double norm, double t) {
  if (t == 0.0) return 1.0;
  return norm <= t ? 0.0 : 1.0 - t / norm;
}

}  // namespace moreau
