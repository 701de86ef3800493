// Launch of a kernel: the device guard, the size of the grid, and the check that follows every launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../check.h"
#include "traits.cuh"

// The constructs that only a CUDA compiler reads. The emulator of the tests (tests/cpp/emulator) defines its own.
#ifndef MOREAU_EMULATED
// Launches `KERNEL(...)`.
#define MOREAU_LAUNCH(KERNEL, BLOCKS, THREADS, SHARED, STREAM, ...) \
  KERNEL<<<BLOCKS, THREADS, SHARED, static_cast<cudaStream_t>(STREAM)>>>(__VA_ARGS__)
// Declares `TYPE NAME[]`, the dynamic shared memory of the block.
#define MOREAU_DYNAMIC_SHARED(TYPE, NAME) extern __shared__ TYPE NAME[]
// Declares a constant of the host code that the emulator varies, so that small cases take the paths of large ones.
#define MOREAU_LIMIT(NAME, VALUE, EMULATED) constexpr int64_t NAME = VALUE
#endif

namespace moreau::cuda {

MOREAU_LIMIT(kBusy, Sizes::busy, busy);
// Blocks of a grid.
MOREAU_LIMIT(kMostGrid, Gpu::most_grid, grid);

// Advice on errors that come from the installation.
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

// One block per item, up to the largest grid; kernels stride over the rest. `shared`: bytes of dynamic shared memory.
template <class Kernel, class... Arguments>
void launch(const char* operation, Kernel* kernel, int64_t items, int threads, size_t shared, void* stream,
            const Arguments&... a) {
  static_assert((std::is_trivially_copyable_v<Arguments> && ...), "a launch copies the bytes of its arguments");
  static_assert((sizeof(Arguments) + ...) <= Gpu::most_parameters);
  const auto grid = unsigned(std::min<int64_t>(items, kMostGrid));
  MOREAU_LAUNCH(kernel, grid, unsigned(threads), shared, stream, a...);
  check(cudaGetLastError(), operation, "launch the kernel");
}

}  // namespace moreau::cuda
