// sum[b] (+)= sum_k gradients[b, k]
#include "spans.h"

namespace moreau::cpu {
namespace {

template <class T>
void run(const Accumulate& a) {
  using S = state_t<T>;
  const Spans spans(a.extents);
  const int64_t features = spans.features();
  parallel_for(spans.count(), features * a.extents.batch * a.samples, [&](int64_t i) {
    const Span span = spans[i];
    add_rows(static_cast<S*>(a.sum) + span.input * features + span.start,
             static_cast<const T*>(a.gradients) + span.input * a.samples * features + span.start, a.samples, features,
             span.size, a.carry);
  });
}

}  // namespace

void accumulate(const Accumulate& a) {
  dispatch(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

}  // namespace moreau::cpu
