// Soft-thresholding and group shrinkage, shared by host and device.
#pragma once

#include "dtype.h"

namespace moreau {

// S_t(v) = v - clip(v, -t, t): sign(v) * max(|v| - t, 0). Exactly +0 inside the threshold, exactly v for t = 0,
// NaN for NaN; a comparison with NaN is false, so no branch hides it.
template <class S>
MOREAU_HD S soft_threshold(S v, S t) {
  const S upper = v > t ? t : v;
  return v - (v < -t ? -t : upper);
}

// The factor max(1 - t / norm, 0) of a group. A zero group is scaled by 0 (or 1 where t = 0), never by 0/0.
MOREAU_HD double group_factor(double norm, double t) {
  if (t == 0.0) return 1.0;
  return norm <= t ? 0.0 : 1.0 - t / norm;
}

}  // namespace moreau
