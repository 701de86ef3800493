// noisy[b, k] = x[b] + displacement[b] + sigma[b] z(b, k). A thread owns a quad and every `slices`-th draw of it.
#include "noise.cuh"

namespace moreau::cuda {
namespace {

constexpr int kThreads = Sizes::perturb_threads;

// noisy[k] = x + displacement + sigma z(k)
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) perturb_kernel(Perturb a, Quads quads, Draws draws, int slices) {
  using S = state_t<T>;
  const Copies<T> copies{static_cast<const T*>(a.x), static_cast<const S*>(a.displacement), static_cast<T*>(a.noisy)};
  const int64_t features = quads.features(), total = a.extents.batch * slices * quads.count();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const Division at = divide(i, quads.count()), row = divide(at.quotient, slices);
    write_copies<kVector>(copies, features, quads[at.remainder], a.noise, draws, row.quotient, uint32_t(row.remainder),
                          uint32_t(slices));
  }
}

template <class T>
void run(const Perturb& a, void* stream) {
  using S = state_t<T>;
  const Quads quads(a.extents, a.noise.element_offset);
  const Draws draws(a.noise);
  const int64_t all = a.extents.batch * quads.count();
  const int slices = slices_for(all, draws.count, Sizes::perturb_most_slices);
  const bool vector = quads.whole() && aligned(static_cast<const T*>(a.x)) &&
                      aligned(static_cast<const S*>(a.displacement)) && aligned(static_cast<const T*>(a.noisy));
  const auto kernel = vector ? perturb_kernel<T, true> : perturb_kernel<T, false>;
  launch("perturb", kernel, (all * slices + kThreads - 1) / kThreads, kThreads, 0, stream, a, quads, draws, slices);
}

}  // namespace

void perturb(const Perturb& a, int device, void* stream) {
  if (a.extents.batch * a.extents.channels * a.extents.positions * a.noise.samples == 0) return;
  const DeviceGuard guard(device, "perturb");
  dispatch(a.dtype, [&](auto t) { run<decltype(t)>(a, stream); });
}

}  // namespace moreau::cuda
