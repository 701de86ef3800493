// sum[b] (+)= sum_k gradients[b, k]. A thread owns a quad.
#include "gradients.cuh"

namespace moreau::cuda {
namespace {

constexpr int kThreads = Sizes::accumulate_threads;

// sum = (carry ? sum : 0) + gradients[0] + gradients[1] + ..., from left to right
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, Sizes::accumulate_blocks) accumulate_kernel(Accumulate a, Quads quads) {
  using S = state_t<T>;
  const int64_t features = quads.features(), total = a.extents.batch * quads.count();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
    const Division at = divide(i, quads.count());
    const Quad quad = quads[at.remainder];
    S* __restrict__ to = static_cast<S*>(a.sum) + at.quotient * features;
    Pack<S> sum{};
    if (a.carry) sum = load_quad<kVector>(to, quad);
    add_rows<kVector>(sum.v, static_cast<const T*>(a.gradients) + at.quotient * a.samples * features, a.samples,
                      features, quad);
    store_quad<kVector>(to, quad, sum.v);
  }
}

template <class T>
void run(const Accumulate& a, void* stream) {
  using S = state_t<T>;
  const Quads quads(a.extents, 0);
  const bool vector =
      quads.whole() && aligned(static_cast<const T*>(a.gradients)) && aligned(static_cast<const S*>(a.sum));
  const auto kernel = vector ? accumulate_kernel<T, true> : accumulate_kernel<T, false>;
  const int64_t blocks = (a.extents.batch * quads.count() + kThreads - 1) / kThreads;
  launch("accumulate", kernel, blocks, kThreads, 0, stream, a, quads);
}

}  // namespace

void accumulate(const Accumulate& a, int device, void* stream) {
  if (a.extents.batch * a.extents.channels * a.extents.positions == 0) return;
  const DeviceGuard guard(device, "accumulate");
  dispatch(a.dtype, [&](auto t) { run<decltype(t)>(a, stream); });
}

}  // namespace moreau::cuda
