// A GPU of fibers, in the place of CUDA's own header: g++ compiles the kernels for the CPU, and this runs them.
//
// Blocks run one by one in a random order. The threads of a block are fibers that run, again in a random order, up to
// their next barrier or warp operation, or warp by warp as far as they get, to the next barrier of the block. Where
// they disagree about one, where a launch is too large or a vector is not aligned, the program ends and says so.
// Shared memory, static and dynamic, is poisoned before each block. It knows what our kernels use and nothing else, and
// cannot see two threads that race between barriers but by what comes out.
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
// One block at a time, so one copy is enough; the program's thread-local variables lie together, where they can be
// poisoned.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __CUDACC__ 1
#define MOREAU_CUDA_VERSION "emulated"
#define MOREAU_CUDA_ARCHITECTURES "emulated"

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// In the place of constants of the kernels, so that small cases reach what is made for large ones.
struct Limits {
  int64_t busy = int64_t(1) << 17;  // kBusy: how many threads a launch tries to have
  int64_t blocks = 1024;            // kMostBlocks: of one input
  int64_t grid = 0x7fffffff;        // blocks of a launch
};
extern Limits limits;

// Makes the order of blocks and threads a function of what is launched from here on.
void reseed(uint64_t seed);

// What to say when a program dies: of what it was at.
extern void (*last_words)();
[[noreturn]] void die(const char* why);
// Runs the threads of all blocks.
void launch(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& thread);
void barrier();
bool any_of_block(bool mine);
// What the lanes of this warp hand over; all of them have to come.
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
// A block waits for others that have begun, and here those have ended.
inline void __nanosleep(unsigned) { emulator::die("a block waits for one that has not begun"); }

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
inline void __threadfence() {}  // everything is seen at once
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
