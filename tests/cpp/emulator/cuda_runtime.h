// An emulator of a GPU that replaces CUDA's own header: g++ compiles the unedited kernels for the CPU, and fibers run
// them.
//
// Blocks run one after the other in a random order. Every thread of a block is a fiber. In a random order, the threads
// run up to their next barrier or warp operation; or each warp runs up to the next barrier of the block before others
// start. The program ends with a message if threads disagree about a barrier or warp operation, if a launch is too
// large, or if a vector is not aligned. Shared memory, static and dynamic, is poisoned before each block. The emulator
// implements what the kernels use and nothing else. It detects a race of two threads between barriers only by a wrong
// result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

// After those headers, which are compiled for the host.
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
// Blocks run one at a time, so one copy is enough. Thread-local variables of the program are adjacent in memory, so
// that they can be poisoned.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __CUDACC__ 1
#define MOREAU_EMULATED
#define MOREAU_CUDA_VERSION "emulated"
#define MOREAU_CUDA_ARCHITECTURES "emulated"

// In place of those of launch.cuh.
#define MOREAU_LAUNCH(KERNEL, BLOCKS, THREADS, SHARED, STREAM, ...) \
  (void)(STREAM), emulator::run(KERNEL, BLOCKS, THREADS, SHARED, __VA_ARGS__)
#define MOREAU_DYNAMIC_SHARED(TYPE, NAME) TYPE* const NAME = static_cast<TYPE*>(emulator::dynamic_memory())
#define MOREAU_LIMIT(NAME, VALUE, EMULATED) static const int64_t& NAME = emulator::limits.EMULATED

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Values of the constants that launch.cuh declares by MOREAU_LIMIT, varied so that small cases take the paths of large
// ones.
struct Limits {
  int64_t busy = int64_t(1) << 17;  // threads that a launch should have at least
  int64_t blocks = 1024;            // blocks of one input
  int64_t grid = 0x7fffffff;        // blocks of a launch
};
extern Limits limits;

// Makes the order of blocks and threads a function of what is launched from here on.
void reseed(uint64_t seed);

// Prints the current case when the program ends.
extern void (*last_words)();
[[noreturn]] void die(const char* why);
// Runs the threads of all blocks.
void launch(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& thread);
void barrier();
bool any_of_block(bool mine);
// Exchanges one value of every lane of this warp. Returns when all lanes have called it.
void gather(uint64_t mine, uint64_t (&all)[32]);
void* dynamic_memory();

template <class Kernel, class... Arguments>
void run(Kernel* kernel, unsigned blocks, unsigned threads, size_t shared, const Arguments&... arguments) {
  launch(blocks, threads, shared, [&] { kernel(arguments...); });
}

template <class T>
const T* aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) die("a vector at an address that is no multiple of its size");
  return p;
}

}  // namespace emulator

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_or(int mine) { return emulator::any_of_block(mine); }
// A block waits for blocks that have started, and here those have ended.
inline void __nanosleep(unsigned) { emulator::die("a block waits for one that has not started"); }

inline unsigned __ballot_sync(unsigned mask, bool mine) {
  if (mask != 0xffffffffu) emulator::die("a warp operation of less than a warp");
  uint64_t all[32];
  emulator::gather(mine, all);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane]) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) != 0; }

inline double __shfl_xor_sync(unsigned mask, double mine, int apart) {
  if (mask != 0xffffffffu) emulator::die("a warp operation of less than a warp");
  uint64_t bits, all[32];
  std::memcpy(&bits, &mine, sizeof bits);
  emulator::gather(bits, all);
  double other;
  std::memcpy(&other, &all[int(threadIdx.x % 32) ^ apart], sizeof other);
  return other;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline void __threadfence() {}  // writes are visible at once
inline int32_t atomicAdd(int32_t* to, int32_t value) {
  const int32_t before = *to;
  *to += value;
  return before;
}
inline double __ldcg(const double* p) { return *p; }
template <class T>
T __ldcs(const T* p) {
  return *emulator::aligned(p);
}
using std::fma;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned) { return *made = nullptr, cudaSuccess; }
