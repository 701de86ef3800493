// norms[b, g] = ||v[b, members of g]||_2. One thread sums the members of a group in memory order, so the result does
// not depend on the number of threads.
#include "spans.h"

namespace moreau::cpu {
namespace {

template <class S>
void run(const GroupNorms& a) {
  const int64_t features = a.extents.channels * a.extents.positions, groups = a.groups.count;
  parallel_for(a.extents.batch * groups, a.extents.batch * features, [&](int64_t i) {
    const int64_t input = i / groups, g = i % groups, row = a.groups.per_input ? input : 0;
    const int32_t* order = a.groups.order + row * features;
    const int32_t* offsets = a.groups.offsets + row * (groups + 1);
    const S* v = static_cast<const S*>(a.v) + input * features;
    double sum = 0;
    for (int32_t k = offsets[g]; k < offsets[g + 1]; ++k) {
      const double value = v[order[k]];
      sum += value * value;
    }
    a.norms[i] = std::sqrt(sum);
  });
}

}  // namespace

void group_norms(const GroupNorms& a) {
  if (a.dtype == Dtype::f64) return run<double>(a);
  run<float>(a);
}

}  // namespace moreau::cpu
