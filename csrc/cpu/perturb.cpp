// noisy[b, k] = x[b] + displacement[b] + sigma[b] z(b, k)
#include "spans.h"

namespace moreau::cpu {
namespace {

template <class T>
void run(const Perturb& a) {
  using S = state_t<T>;
  const Spans spans(a.extents);
  const auto* x = static_cast<const T*>(a.x);
  const auto* displacement = static_cast<const S*>(a.displacement);
  parallel_for(spans.count(), spans.features() * a.extents.batch * a.noise.samples, [&](int64_t i) {
    const Span span = spans[i];
    const int64_t at = span.input * spans.features() + span.start;
    alignas(64) S base[kSpan];
    base_range(base, x + at, displacement ? displacement + at : nullptr, span.size);
    write_noisy(span, a.extents, a.noise, base, static_cast<T*>(a.noisy));
  });
}

}  // namespace

void perturb(const Perturb& a) {
  dispatch(a.dtype, [&](auto t) { run<decltype(t)>(a); });
}

}  // namespace moreau::cpu
