// The fused proximal gradient step, one pass over memory:
//
//   p      = sum_k gradients[k] / count                          average gradient
//   y      = -rho S_eta(p)                                       KKT image of delta
//   stats  = ||delta - y||^2, ||delta||^2, ||y||^2, ||p||^2, non-zeros of y
//   v      = (1 - gamma / rho) delta - gamma p                   gradient step, gamma = step_size
//   delta  = S_{gamma eta}(v)                                    proximal map of gamma eta Omega
//   total += p or delta
//   noisy[k] = x + delta + sigma z(k)                            next noisy copies
//
// S_t is the identity without a penalty, v - clip(v, -t, t) for l1, and v_g max(1 - t w_g / ||v_g||, 0) for groups.
#include "spans.h"

namespace moreau::cpu {
namespace {

template <class T>
struct Step {
  using S = state_t<T>;
  const ProxStep& a;
  Spans spans;
  int64_t features;

  explicit Step(const ProxStep& args) : a(args), spans(args.extents), features(spans.features()) {}

  S* gradient(const Span& s) const { return static_cast<S*>(a.gradient) + s.input * features + s.start; }
  S* displacement(const Span& s) const { return static_cast<S*>(a.displacement) + s.input * features + s.start; }
  Scalars<S> scalars(int64_t input) const {
    const S rho = static_cast<const S*>(a.rho)[input], step_size = static_cast<const S*>(a.step_size)[input];
    return {S(1) - step_size / rho, step_size, rho, S(a.count)};
  }
  void average(const Span& s) const {
    const T* g = static_cast<const T*>(a.gradients) + s.input * a.samples * features + s.start;
    add_rows(gradient(s), a.samples ? g : nullptr, a.samples, features, s.size, a.carry);
    mean_range(gradient(s), S(a.count), s.size);
  }
  void finish(const Span& s) const {
    const int64_t at = s.input * features + s.start;
    if (a.total_of != Total::none)
      add_range(static_cast<S*>(a.total) + at, a.total_of == Total::gradient ? gradient(s) : displacement(s), s.size);
    if (a.noise.samples == 0) return;
    alignas(64) S base[kSpan];
    base_range(base, static_cast<const T*>(a.x) + at, displacement(s), s.size);
    write_noisy(s, a.extents, a.noise, base, static_cast<T*>(a.noisy));
  }
  int64_t work() const { return features * a.extents.batch * (a.samples + a.noise.samples + 1); }

  void elementwise() const {
    parallel_for(spans.count(), work(), [&](int64_t i) {
      const Span s = spans[i];
      average(s);
      // No penalty is the threshold 0: soft_threshold then returns its argument.
      const S zero = 0;
      const bool l1 = a.penalty == Penalty::l1;
      const S* eta = l1 ? static_cast<const S*>(a.eta) + s.input * a.eta_input + s.start * a.eta_feature : &zero;
      step_range(displacement(s), gradient(s), scalars(s.input), eta, l1 ? a.eta_feature : 0, s.size,
                 a.partials + i * kStatistics);
      finish(s);
    });
  }

  // Three sweeps: averages; norms and factors of each group; the step. The last two find their data in the cache.
  void grouped() const {
    parallel_for(spans.count(), work(), [&](int64_t i) { average(spans[i]); });
    const Groups& groups = a.groups;
    parallel_for(a.extents.batch * groups.count, a.extents.batch * features, [&](int64_t i) {
      const int64_t input = i / groups.count, g = i % groups.count, row = groups.per_input ? input : 0;
      const int32_t* order = groups.order + row * features;
      const int32_t* offsets = groups.offsets + row * (groups.count + 1);
      const S* p = static_cast<const S*>(a.gradient) + input * features;
      const S* d = static_cast<const S*>(a.displacement) + input * features;
      const Scalars<S> k = scalars(input);
      double v2 = 0, p2 = 0;
      for (int32_t j = offsets[g]; j < offsets[g + 1]; ++j) {
        const S pj = p[order[j]], vj = k.keep * d[order[j]] - k.step_size * pj;
        v2 += double(vj) * double(vj);
        p2 += double(pj) * double(pj);
      }
      const double threshold = double(static_cast<const S*>(a.eta)[input * a.eta_input]) *
                               double(static_cast<const S*>(groups.weights)[row * groups.count + g]);
      S* factors = static_cast<S*>(a.factors) + 2 * i;
      factors[0] = S(group_factor(std::sqrt(v2), double(k.step_size) * threshold));
      factors[1] = S(group_factor(std::sqrt(p2), threshold));
    });
    parallel_for(spans.count(), work(), [&](int64_t i) {
      const Span s = spans[i];
      const int64_t row = groups.per_input ? s.input : 0;
      group_step_range(displacement(s), gradient(s), scalars(s.input), groups.labels + row * features + s.start,
                       static_cast<const S*>(a.factors) + 2 * s.input * groups.count, s.size,
                       a.partials + i * kStatistics);
      finish(s);
    });
  }

  void reduce() const {
    const int64_t pieces = spans.per_input();
    for (int64_t b = 0; b < a.extents.batch; ++b)
      for (int k = 0; k < kStatistics; ++k) {
        double sum = 0;
        for (int64_t i = 0; i < pieces; ++i) sum += a.partials[(b * pieces + i) * kStatistics + k];
        a.statistics[b * kStatistics + k] = sum;
      }
  }
};

}  // namespace

int64_t prox_step_partials(const Extents& extents) { return Spans(extents).per_input(); }

void prox_step(const ProxStep& a) {
  dispatch(a.dtype, [&](auto t) {
    const Step<decltype(t)> step(a);
    a.penalty == Penalty::group ? step.grouped() : step.elementwise();
    step.reduce();
  });
}

}  // namespace moreau::cpu
