#include "../kernels.h"
#include "launch.cuh"

namespace moreau::cuda {

Stream::Stream(int device) {
  const DeviceGuard guard(device, "Stream");
  cudaStream_t made;
  // Non-blocking: work on the legacy default stream of another thread would end a capture here.
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "Stream", "create a stream");
  address_ = made;
}

// An error is one of the context, which the next launch reports.
Stream::~Stream() { (void)cudaStreamDestroy(static_cast<cudaStream_t>(address_)); }

}  // namespace moreau::cuda
