// A private CUDA stream.
#include "../kernels.h"
#include "launch.cuh"

namespace moreau::cuda {

void* make_stream(int device) {
  const DeviceGuard guard(device, "make_stream");
  cudaStream_t made;
  // Non-blocking: otherwise work that another thread puts on the legacy default stream would end a capture here.
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "make_stream", "create a stream");
  return made;
}

}  // namespace moreau::cuda
