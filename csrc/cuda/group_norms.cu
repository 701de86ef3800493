// norms[b, g] = ||v[b, members of g]||_2. A block owns the groups that start in one chunk of the sorted members.
#include "../dtype.h"
#include "groups.cuh"

namespace moreau::cuda {
namespace {

constexpr int kThreads = Sizes::group_norms_threads;

// norms[g] = sqrt(sum_{i in g} v_i^2), 0 for an empty group
template <class S>
__global__ void __launch_bounds__(kThreads, Sizes::group_norms_blocks)
    group_norms_kernel(GroupNorms a, int64_t chunks_each) {
  __shared__ double shared[kParts][1];
  const int64_t features = a.extents.channels * a.extents.positions;
  for (int64_t i = blockIdx.x; i < a.extents.batch * chunks_each; i += gridDim.x) {
    const int64_t input = i / chunks_each;
    const Chunk chunk(a.groups, features, input, i % chunks_each);
    const S* __restrict__ v = static_cast<const S*>(a.v) + input * features;
    double* __restrict__ norms = a.norms + input * a.groups.count;
    for (int64_t g = chunk.group + threadIdx.x; g < chunk.groups_end; g += kThreads)
      if (chunk.offsets[g] == chunk.offsets[g + 1]) norms[g] = 0.0;
    group_sums<1>(
        chunk, shared,
        [&](int32_t member, double (&sums)[1]) {
          const double value = v[chunk.order[member]];
          sums[0] = fma(value, value, sums[0]);
        },
        [&](int64_t g, const double (&sums)[1]) { norms[g] = sqrt(sums[0]); });
    __syncthreads();  // before the next item uses `shared`
  }
}

template <class S>
void run(const GroupNorms& a, void* stream) {
  const int64_t each = chunks(a.extents);
  launch("group_norms", group_norms_kernel<S>, a.extents.batch * each, kThreads, 0, stream, a, each);
}

}  // namespace

void group_norms(const GroupNorms& a, int device, void* stream) {
  if (a.extents.batch * a.extents.channels * a.extents.positions * a.groups.count == 0) return;
  const DeviceGuard guard(device, "group_norms");
  if (a.dtype == Dtype::f64) return run<double>(a, stream);
  run<float>(a, stream);
}

}  // namespace moreau::cuda
