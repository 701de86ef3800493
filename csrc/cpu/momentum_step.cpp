// Nesterov's momentum after a proximal step: inner products, then the update that depends on them.
#include "../momentum_step.h"

#include "spans.h"

namespace moreau::cpu {
namespace {

// Spans of one input's memory; its layout does not matter here.
Spans spans_of(const MomentumStep& a) { return Spans({a.batch, 1, a.features}); }

// products[b] = the inner products of `product` (kernels.h), summed over the features of input b.
template <class S>
void products(const MomentumStep& a) {
  const Spans spans = spans_of(a);
  parallel_for(spans.count(), a.batch * a.features, [&](int64_t i) {
    const Span span = spans[i];
    const auto at = [&](const void* tensor) {
      return static_cast<const S*>(tensor) + span.input * a.features + span.start;
    };
    products_range(at(a.y), at(a.y_prev), at(a.x), at(a.x_prev), at(a.gradient), at(a.last_gradient), at(a.last_step),
                   span.size, a.partials + i * kProducts);
  });
  const int64_t pieces = spans.per_input();
  for (int64_t b = 0; b < a.batch; ++b)
    for (int k = 0; k < kProducts; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < pieces; ++i) sum += a.partials[(b * pieces + i) * kProducts + k];
      a.products[b * kProducts + k] = sum;
    }
}

// x, y = y + beta (y - y_prev), beta = restart_product > 0 ? 0 : momentum; the running sums take the terms of this
// step.
template <class S>
void update(const MomentumStep& a) {
  const Spans spans = spans_of(a);
  parallel_for(spans.count(), a.batch * a.features, [&](int64_t i) {
    const Span span = spans[i];
    const int64_t first = span.input * a.features + span.start;
    const auto at = [&](void* tensor) { return static_cast<S*>(tensor) + first; };
    const S* gradient = static_cast<const S*>(a.gradient) + first;
    if (a.squares) add_change_range(at(a.squares), gradient, at(a.last_gradient), S(a.samples / 2), span.size);
    if (a.points) {
      add_scaled_range(at(a.points), at(a.x), S(a.samples), span.size);
      add_scaled_range(at(a.gradients), gradient, S(a.samples), span.size);
    }
    const double restart_product = a.products[span.input * kProducts + product::restart_product];
    momentum_range(at(a.y), at(a.y_prev), at(a.x), at(a.x_prev), at(a.last_gradient), at(a.last_step), gradient,
                   restart_product > 0 ? S(0) : S(a.momentum), span.size);
  });
  if (a.sums)
    for (int64_t input = 0; input < a.batch; ++input) add_to_sums(a, input);
}

template <class S>
void run(const MomentumStep& a) {
  if (includes(a.phases, Phases::products)) products<S>(a);
  if (includes(a.phases, Phases::update)) update<S>(a);
}

}  // namespace

int64_t momentum_step_partials(int64_t features) { return Spans({1, 1, features}).per_input(); }

void momentum_step(const MomentumStep& a) { a.dtype == Dtype::f64 ? run<double>(a) : run<float>(a); }

}  // namespace moreau::cpu
