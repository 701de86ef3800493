#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Limits limits;
void (*last_words)() = nullptr;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 1 << 17, kMostShared = 48 << 10;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  unsigned exchanges;  // warp operations so far
};

std::vector<Fiber> fibers;
ucontext_t scheduler;
unsigned running;
const std::function<void()>* body;
std::mt19937 dice(7);
std::vector<char> memory;
// Values exchanged by lanes: two boxes in turn, since some lanes may be at their next operation while others still
// read.
std::vector<uint64_t> boxes;

void enter() {
  (*body)();
  fibers[running].state = State::done;
  swapcontext(&fibers[running].context, &scheduler);
}

void wait(State state) {
  const unsigned me = running;
  fibers[me].state = state;
  swapcontext(&fibers[me].context, &scheduler);
  running = me;
  threadIdx = {me};
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  fiber.stack.resize(kStack);
  fiber.state = State::ready;
  fiber.exchanges = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}

bool all(unsigned first, unsigned count, State state) {
  return std::all_of(&fibers[first], &fibers[first] + count, [=](const Fiber& f) { return f.state == state; });
}

void release(unsigned first, unsigned count) {
  for (unsigned thread = first; thread < first + count; ++thread) fibers[thread].state = State::ready;
}

// Fills the static shared memory: the thread-local variables of the program, which has no others.
int poison_program(dl_phdr_info* object, size_t, void*) {
  for (int i = 0; i < object->dlpi_phnum; ++i)
    if (object->dlpi_phdr[i].p_type == PT_TLS) std::memset(object->dlpi_tls_data, 0xff, object->dlpi_phdr[i].p_memsz);
  return 1;  // the program is the first object; libraries keep their variables
}

// Runs the ready threads of a warp, each up to its next stop. Returns whether there were any.
bool run_warp(unsigned warp) {
  const unsigned first = warp * kWarp;
  std::array<unsigned, kWarp> order;
  std::iota(order.begin(), order.end(), first);
  if (dice() % 2)
    std::shuffle(order.begin(), order.end(), dice);
  else
    std::reverse(order.begin(), order.end());
  bool moved = false;
  for (const unsigned thread : order)
    if (fibers[thread].state == State::ready) {
      running = thread;
      threadIdx = {thread};
      swapcontext(&scheduler, &fibers[thread].context);
      moved = true;
    }
  if (all(first, kWarp, State::in_warp)) release(first, kWarp);
  return moved;
}

void run_block(unsigned threads) {
  for (unsigned thread = 0; thread < threads; ++thread) start(thread);
  std::vector<unsigned> warps(threads / kWarp);
  std::iota(warps.begin(), warps.end(), 0u);
  while (!all(0, threads, State::done)) {
    // Either the warps advance in turn, or each runs up to the next barrier of the block before others start.
    const bool ahead = dice() % 2;
    bool moved = false;
    std::shuffle(warps.begin(), warps.end(), dice);
    for (const unsigned warp : warps)
      while (run_warp(warp)) {
        moved = true;
        if (!ahead) break;
      }
    if (all(0, threads, State::at_barrier))
      release(0, threads);
    else if (!moved)
      die("threads disagree about a barrier or a warp operation");
  }
}

}  // namespace

void die(const char* why) {
  std::printf("emulator: %s, in block %u, thread %u\n", why, blockIdx.x, threadIdx.x);
  if (last_words) last_words();
  std::fflush(stdout);
  std::_Exit(3);
}

void reseed(uint64_t seed) { dice.seed(std::mt19937::result_type(seed)); }

void launch(unsigned blocks, unsigned threads, size_t shared, const std::function<void()>& thread) {
  if (threads == 0 || threads % kWarp || threads > kMostThreads || shared > kMostShared || blocks == 0)
    die("a launch that no GPU takes");
  if (fibers.size() < threads) fibers.resize(threads);
  memory.resize(kMostShared + 16);
  boxes.resize(threads * 2);
  gridDim = {blocks};
  blockDim = {threads};
  body = &thread;
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), dice);
  for (const unsigned block : order) {
    blockIdx = {block};
    std::fill(memory.begin(), memory.end(), char(0xff));
    dl_iterate_phdr(poison_program, nullptr);
    run_block(threads);
  }
}

void barrier() { wait(State::at_barrier); }

bool any_of_block(bool mine) {
  static bool any;
  barrier();  // all threads have read the previous answer
  any = false;
  barrier();
  any = any || mine;
  barrier();
  return any;
}

void gather(uint64_t mine, uint64_t (&all)[32]) {
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint64_t* box = &boxes[(2 * warp + fibers[running].exchanges++ % 2) * kWarp];
  box[lane] = mine;
  wait(State::in_warp);
  std::copy(box, box + kWarp, all);
}

void* dynamic_memory() {
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (16 - address % 16) % 16;
}

}  // namespace emulator
