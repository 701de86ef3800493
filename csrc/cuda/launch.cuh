// Launching a kernel: the device guard, the size of the grid, and the check that follows every launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "../check.h"

namespace moreau::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Below this many threads a card stands partly idle: an H200 holds 132 x 2048, and half of them hide the latency of
// memory.
constexpr int64_t kBusy = int64_t(1) << 17;

// What to do about the errors that come from the installation.
inline const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "; there is no NVIDIA driver, or one too old for CUDA " MOREAU_CUDA_VERSION;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "; this build has kernels for architectures " MOREAU_CUDA_ARCHITECTURES
             ": reinstall with CMAKE_CUDA_ARCHITECTURES set for this card";
    default: return "";
  }
}

inline void check(cudaError_t error, const char* operation, const char* doing) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // the next call must not report this error again
  fail(operation, ": CUDA could not ", doing, ": ", cudaGetErrorString(error), advice(error));
}

// Makes a device current, and the previous one again at the end.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* operation) {
    check(cudaGetDevice(&previous_), operation, "name the current device");
    changed_ = previous_ != device;
    if (changed_) check(cudaSetDevice(device), operation, "select the device");
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// One block per item as far as a grid reaches (2^31 - 1 blocks); kernels stride over the rest. `shared` is the dynamic
// shared memory in bytes, at most the 48 KB that need no leave.
template <class Kernel, class... Arguments>
void launch(const char* operation, Kernel* kernel, int64_t items, int threads, size_t shared, void* stream,
            const Arguments&... a) {
  const auto grid = unsigned(std::min<int64_t>(items, 0x7fffffff));
  kernel<<<grid, unsigned(threads), shared, static_cast<cudaStream_t>(stream)>>>(a...);
  check(cudaGetLastError(), operation, "launch the kernel");
}

}  // namespace moreau::cuda
