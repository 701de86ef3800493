// Sizes that the kernels are tuned to, and the conditions that they rely on.
//
// Registers, occupancy and loads in flight are measured by benchmarks/ptxas_table.py and benchmarks/sass_table.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moreau::cuda {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
// Features of a quad, see quads.cuh.
constexpr int kLanes = 4;

// The GPU that the sizes are chosen for, an H200, and limits that all GPUs share (CUDA C++ Programming Guide, technical
// specifications).
struct Gpu {
  static constexpr int64_t multiprocessors = 132;
  static constexpr int64_t threads = 2048;   // resident on a multiprocessor
  static constexpr int registers = 65536;    // of a multiprocessor
  static constexpr int most_threads = 1024;  // of a block
  static constexpr int64_t most_grid = 0x7fffffff;
  static constexpr size_t most_shared = 48 << 10;     // bytes that a kernel gets without asking for more
  static constexpr size_t most_parameters = 4 << 10;  // bytes

  // Registers of each thread when so many blocks are resident; they are allocated in units of 8.
  static constexpr int registers_of(int threads, int blocks = 1) { return registers / (threads * blocks) / 8 * 8; }
};

// Sizes that do not depend on a type.
struct Sizes {
  // Threads that a launch should have at least: half of those that fit the GPU, enough to hide the latency of memory.
  static constexpr int64_t busy = int64_t(1) << 17;
  static_assert(busy <= Gpu::multiprocessors * Gpu::threads / 2 && 2 * busy > Gpu::multiprocessors * Gpu::threads / 2,
                "the power of two next to half of the threads of the GPU");

  // accumulate. Without a number of blocks ptxas stops at 72 registers for sm_120, and spills.
  static constexpr int accumulate_threads = 128, accumulate_blocks = 5;
  static_assert(Gpu::registers_of(accumulate_threads, accumulate_blocks) == 96, "the kernels use up to 91 registers");

  // perturb
  static constexpr int perturb_threads = 128, perturb_most_slices = 64;

  // group_norms. Without a number of blocks ptxas stops at 48 registers for sm_120, and spills.
  static constexpr int group_norms_threads = 256, group_norms_blocks = 4;
  static_assert(Gpu::registers_of(group_norms_threads, group_norms_blocks) == 64);

  // momentum_step. The last block of an input adds as many partial sums as the input has blocks, so they are limited.
  static constexpr int momentum_threads = 256, momentum_products_blocks = 2;
  static constexpr int64_t momentum_most_blocks = 1024;
  static_assert(Gpu::registers_of(momentum_threads, momentum_products_blocks) == 128);
  static_assert(momentum_most_blocks * momentum_threads * kLanes == 1 << 20, "larger inputs stride");

  // prox_step: quads of a block. One CIFAR-10 image makes 12 blocks, a batch of 64 images 768, which fill the GPU.
  static constexpr int quads = 64;
  static_assert(quads % kWarp == 0, "sums of a block are sums of whole warps");
  static_assert(3 * 32 * 32 == 12 * quads * kLanes && 64 * 12 >= 4 * Gpu::multiprocessors, "four blocks on each");
  // Blocks of an input; larger inputs stride. 4096 blocks fill the GPU, and the last one adds as many partial sums.
  static constexpr int64_t most_blocks = 4096;
  static_assert(most_blocks * quads >= Gpu::multiprocessors * Gpu::threads / 2, "the blocks of one input fill the GPU");

  // The counter of an input's blocks has the arrived ones in its low 16 bits, the started ones in its high 16 bits.
  static constexpr int32_t arrived = 0xffff;
  static_assert(3 * most_blocks <= 0x7fff, "averaging, summing and stepping blocks fit either half, without a sign");

  // Groups. One lane sums a group of up to `lane_members` members (pixels), a warp one of up to `chunk` members (tiles,
  // tokens), `parts` warps a larger one.
  static constexpr int chunk = 1024, lane_members = 32, parts = 8;
  static_assert(chunk == kWarp * lane_members, "a lane of a warp sums as many members as a lane on its own");
  static_assert(parts * kWarp == group_norms_threads, "in group_norms every warp has one part");
};

// Sizes for the storage type T.
template <class T>
struct Tuning {
  static constexpr size_t quad_bytes = kLanes * sizeof(T);

  // Rows of gradients that a thread loads before it adds the first one, by vectors and by scalars. With 8 rows a warp
  // waits for memory 4 times at 32 samples. More rows of double do not fit the registers beside the state of a step.
  static constexpr int vector_rows = sizeof(T) == 8 ? 2 : 8;
  static constexpr int scalar_rows = sizeof(T) == 8 ? 2 : 4;

  // Threads that share a quad in prox_step, at most; and the threads of a block that this makes.
  static constexpr int most_slices = sizeof(T) == 8 ? 4 : 8;
  static constexpr int most_threads = Sizes::quads * most_slices;
  static_assert(most_threads <= Gpu::most_threads);
  // Threads of a block as ptxas is told. On sm_90 a bound above the real one limits a thread to 96 registers, so that
  // ten blocks of 64 threads fit a multiprocessor instead of eight: those that draw noise hide the loads of others. On
  // other architectures ptxas would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr int bound = sizeof(T) == 8 ? 256 : 640;
  static_assert(sizeof(T) == 8 || Gpu::registers_of(bound) == 96);
#else
  static constexpr int bound = sizeof(T) == 8 ? 256 : 512;
#endif
  static_assert(most_threads <= bound, "a launch must not exceed the bound of its kernel");

  // Rows that each thread of a team (gradients.cuh) loads before the block waits. 32 samples take one wait with 8
  // slices, two with 4. Values of 2 bytes allow twice as many; scalar loads half as many, since their addresses need
  // registers too.
  static constexpr int vector_staged = sizeof(T) == 2 ? 8 : 4;
  static constexpr int scalar_staged = 2;
  static_assert(scalar_staged <= vector_staged, "the stage has room for vector_staged rows");
  static_assert(vector_staged * most_slices >= (sizeof(T) == 8 ? 16 : 32));
  static_assert(vector_staged * most_threads * quad_bytes == 32 << 10, "the stage takes 32 KB at most");
  static_assert(32 << 10 <= Gpu::most_shared);
};
// The 20 warps of a multiprocessor at 96 registers have 80 KB in flight; 30 KB hide the latency of memory.
static_assert(Gpu::registers_of(20 * kWarp) == 96 && 20 * kWarp * Tuning<float>::vector_rows * 16 == 80 << 10);

}  // namespace moreau::cuda
