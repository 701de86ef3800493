// Momentum after a proximal step: the inner products that it is judged by, then the step itself.
#include "../momentum.h"
#include "spans.h"

namespace moreau::cpu {
namespace {

// Spans of the memory of one input, whatever is in it.
Spans spans_of(const Momentum& a) { return Spans({a.batch, 1, a.features}); }

template <class S>
void products(const Momentum& a) {
  const Spans spans = spans_of(a);
  parallel_for(spans.count(), a.batch * a.features, [&](int64_t i) {
    const Span span = spans[i];
    const auto at = [&](const void* tensor) {
      return static_cast<const S*>(tensor) + span.input * a.features + span.start;
    };
    products_range(at(a.point), at(a.previous), at(a.here), at(a.before), at(a.gradient), at(a.last_gradient),
                   at(a.change), span.size, a.partials + i * kProducts);
  });
  const int64_t pieces = spans.per_input();
  for (int64_t b = 0; b < a.batch; ++b)
    for (int k = 0; k < kProducts; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < pieces; ++i) sum += a.partials[(b * pieces + i) * kProducts + k];
      a.products[b * kProducts + k] = sum;
    }
}

template <class S>
void update(const Momentum& a) {
  const Spans spans = spans_of(a);
  parallel_for(spans.count(), a.batch * a.features, [&](int64_t i) {
    const Span span = spans[i];
    const int64_t first = span.input * a.features + span.start;
    const auto at = [&](void* tensor) { return static_cast<S*>(tensor) + first; };
    const S* gradient = static_cast<const S*>(a.gradient) + first;
    if (a.squares) add_change_range(at(a.squares), gradient, at(a.last_gradient), S(a.samples / 2), span.size);
    if (a.points) {
      add_scaled_range(at(a.points), at(a.here), S(a.samples), span.size);
      add_scaled_range(at(a.gradients), gradient, S(a.samples), span.size);
    }
    const double uphill = a.products[span.input * kProducts + product::uphill];
    momentum_range(at(a.point), at(a.previous), at(a.here), at(a.before), at(a.last_gradient), at(a.change), gradient,
                   uphill > 0 ? S(0) : S(a.momentum), span.size);
  });
  if (a.sums)
    for (int64_t input = 0; input < a.batch; ++input) add_to_sums(a, input);
}

}  // namespace

int64_t momentum_partials(int64_t features) { return Spans({1, 1, features}).per_input(); }

void momentum_products(const Momentum& a) { a.dtype == Dtype::f64 ? products<double>(a) : products<float>(a); }

void momentum_update(const Momentum& a) { a.dtype == Dtype::f64 ? update<double>(a) : update<float>(a); }

}  // namespace moreau::cpu
