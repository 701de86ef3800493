// Prints hashes of the results of the CPU operations, so that builds for different instruction sets can be compared.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../csrc/kernels.h"

using namespace moreau;

namespace {

uint64_t hash(const void* data, size_t bytes) {
  uint64_t h = 1469598103934665603u;
  for (size_t i = 0; i < bytes; ++i) h = (h ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211u;
  return h;
}

void prox_step(int64_t batch, int64_t channels, int64_t positions, int64_t samples, Penalty penalty) {
  const int64_t features = channels * positions, n = batch * features;
  uint32_t state = 12345;
  const auto draw = [&] { return float(int32_t(state = state * 1664525u + 1013904223u)) * 0x1p-31f; };
  std::vector<float> x(n), displacement(n), gradient(n), total(n), gradients(n * samples), noisy(n * samples);
  for (auto* v : {&x, &displacement, &gradient, &total, &gradients})
    for (float& value : *v) value = draw();
  std::vector<float> sigma(batch, 0.3f), rho(batch, 0.7f), step_size(batch, 0.1f), eta(batch, 0.2f);
  std::vector<int64_t> keys(batch), step(1, 5);
  for (int64_t b = 0; b < batch; ++b) keys[b] = 0x123456789abcdef * (b + 1);
  const int32_t count = int32_t((features + 4) / 5);
  std::vector<int32_t> order(features), labels(features), offsets(count + 1, int32_t(features));
  for (int64_t i = 0; i < features; ++i) order[i] = int32_t(i), labels[i] = int32_t(i / 5);
  for (int32_t g = 0; g < count; ++g) offsets[g] = 5 * g;
  std::vector<float> weights(count, 1.5f), factors(2 * count * batch);
  const Extents extents{batch, channels, positions};
  std::vector<double> statistics(batch * kStatistics), partials(batch * cpu::prox_step_partials(extents) * kStatistics);
  ProxStep a{};
  a.dtype = Dtype::f32, a.extents = extents, a.gradients = gradients.data(), a.samples = samples, a.count = samples;
  a.gradient = gradient.data(), a.displacement = displacement.data(), a.total = total.data();
  a.total_of = Total::gradient, a.rho = rho.data(), a.step_size = step_size.data(), a.penalty = penalty;
  a.eta = eta.data(), a.eta_input = 1;
  a.groups = {order.data(), offsets.data(), labels.data(), weights.data(), count, false};
  a.x = x.data(), a.noise = {keys.data(), step.data(), sigma.data(), 3, 1, samples, true};
  a.noisy = noisy.data(), a.statistics = statistics.data(), a.partials = partials.data(), a.factors = factors.data();
  cpu::prox_step(a);
  std::printf("%016llx %016llx %016llx\n", (unsigned long long)hash(displacement.data(), n * sizeof(float)),
              (unsigned long long)hash(noisy.data(), noisy.size() * sizeof(float)),
              (unsigned long long)hash(statistics.data(), statistics.size() * sizeof(double)));
}

template <class S>
void momentum_step(Dtype dtype, int64_t batch, int64_t features) {
  const int64_t n = batch * features;
  uint32_t state = 54321;
  std::vector<S> all[10];
  for (auto& v : all) {
    v.resize(n);
    for (S& value : v) value = S(int32_t(state = state * 1664525u + 1013904223u)) * S(0x1p-31);
  }
  std::vector<double> products(batch * kProducts), sums(batch * kSums), statistics(batch * kStatistics, 0.3);
  std::vector<double> partials(batch * cpu::momentum_step_partials(features) * kProducts);
  MomentumStep a{};
  a.phases = Phases::both, a.dtype = dtype, a.batch = batch, a.features = features;
  a.y = all[0].data(), a.y_prev = all[1].data(), a.x = all[2].data(), a.x_prev = all[3].data();
  a.gradient = all[4].data(), a.last_gradient = all[5].data(), a.last_step = all[6].data();
  a.squares = all[7].data(), a.points = all[8].data(), a.gradients = all[9].data();
  a.products = products.data(), a.sums = sums.data(), a.statistics = statistics.data();
  a.samples = 6, a.momentum = 0.4, a.partials = partials.data();
  cpu::momentum_step(a);
  uint64_t tensors = 0;
  for (const auto& v : all) tensors = tensors * 31 + hash(v.data(), n * sizeof(S));
  std::printf("%016llx %016llx %016llx\n", (unsigned long long)tensors,
              (unsigned long long)hash(products.data(), products.size() * sizeof(double)),
              (unsigned long long)hash(sums.data(), sums.size() * sizeof(double)));
}

}  // namespace

int main() {
  for (const auto penalty : {Penalty::none, Penalty::l1, Penalty::group})
    for (const int64_t positions : {1, 33, 111, 1023, 4097}) {
      prox_step(3, 1, positions, 5, penalty);
      prox_step(2, 3, positions, 8, penalty);
    }
  for (const int64_t features : {1, 33, 111, 1023, 4097}) {
    momentum_step<float>(Dtype::f32, 3, features);
    momentum_step<double>(Dtype::f64, 3, features);
  }
}
