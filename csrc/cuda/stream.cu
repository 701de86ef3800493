#include "../kernels.h"
#include "launch.cuh"

namespace moreau::cuda {

void* make_stream(int device) {
  const DeviceGuard guard(device, "make_stream");
  cudaStream_t made;
  // Non-blocking: work on the legacy default stream of another thread would end a capture here.
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "make_stream", "create a stream");
  return made;
}

}  // namespace moreau::cuda
