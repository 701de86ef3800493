// Random cases of every operation: the CUDA kernels, run by the emulator, against the CPU kernels.
//
//   emulated COUNT SEED            prints the number of cases of each operation that passed; prints the first case that
//                                  fails and exits with 1
//   emulated OPERATION INDEX SEED  runs one case
//   emulated fault NAME            runs a kernel with a fault that the emulator must detect
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"
#include "emulator/cuda_runtime.h"

using namespace moreau;

namespace {

// kFastError of philox.h, relative to max(|z|, 1) <= 6.8, and the CPU's own error.
constexpr double kNoiseError = 1.5 * 6.8 * 6e-7;

std::string described;

void print_case() {
  std::printf("  of %s\n", described.c_str());
  std::fflush(stdout);
}

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  print_case();
  std::_Exit(1);
}

struct Random {
  std::mt19937_64 engine;

  int64_t between(int64_t a, int64_t b) { return a + int64_t(engine() % uint64_t(b - a + 1)); }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  double normal() { return std::normal_distribution<double>()(engine); }
};

size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
Dtype state_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// Numbers of one type, at an address that is a multiple of 16 bytes or one number beyond it. Guard bytes on both sides
// must stay unwritten.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count, bool off = false) : dtype_(dtype), count_(count), off_(off) {
    bytes_.resize(bytes() + 2 * kGuard + 32, kUnwritten);
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  ~Buffer() {
    if (bytes_.empty()) return;  // moved from
    const auto unwritten = [](char byte) { return byte == kUnwritten; };
    const char *begin = bytes_.data(), *end = begin + bytes_.size();
    if (!std::all_of(begin, static_cast<const char*>(data()), unwritten) ||
        !std::all_of(static_cast<const char*>(data()) + bytes(), end, unwritten))
      fail("a tensor is written beyond its ends");
  }
  Buffer(Random& random, Dtype dtype, int64_t count, bool off = false) : Buffer(dtype, count, off) {
    for (int64_t i = 0; i < count; ++i) set(i, random.normal());
  }

  char* data() const {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data()) + kGuard;
    return const_cast<char*>(bytes_.data()) + kGuard + (16 - address % 16) % 16 + (off_ ? size_of(dtype_) : 0);
  }
  int64_t count() const { return count_; }
  bool off() const { return off_; }
  size_t bytes() const { return size_t(count_) * size_of(dtype_); }
  Buffer copy() const {
    Buffer other(dtype_, count_, off_);
    std::memcpy(other.data(), data(), bytes());
    return other;
  }
  // The first `count` numbers, at an aligned address or off it.
  Buffer head(int64_t count, bool off) const {
    Buffer other(dtype_, count, off);
    std::memcpy(other.data(), data(), other.bytes());
    return other;
  }

  double operator[](int64_t i) const {
    switch (dtype_) {
      case Dtype::f64: return read<double>(i);
      case Dtype::f32: return read<float>(i);
      case Dtype::f16: return float(read<_Float16>(i));
      default: return as_float(uint32_t(read<uint16_t>(i)) << 16);
    }
  }
  void set(int64_t i, double value) {
    switch (dtype_) {
      case Dtype::f64: return write(i, value);
      case Dtype::f32: return write(i, float(value));
      case Dtype::f16: return write(i, _Float16(value));
      default: return write(i, uint16_t(as_bits(float(value)) >> 16));
    }
  }
  void poison() {
    for (int64_t i = 0; i < count_; ++i) set(i, NAN);
  }
  // Distance of neighbouring numbers at `value`.
  double spacing(double value) const {
    const int digits = dtype_ == Dtype::f64 ? 53 : dtype_ == Dtype::f32 ? 24 : dtype_ == Dtype::f16 ? 11 : 8;
    int exponent;
    std::frexp(value, &exponent);
    return std::ldexp(1.0, std::max(exponent, -14) - digits);
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr char kUnwritten = 0x5a;

  static float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
  }
  template <class T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, data() + i * int64_t(sizeof(T)), sizeof value);
    return value;
  }
  template <class T>
  void write(int64_t i, T value) {
    std::memcpy(data() + i * int64_t(sizeof(T)), &value, sizeof value);
  }

  Dtype dtype_;
  int64_t count_;
  bool off_;
  std::vector<char> bytes_;
};

void same_bits(const Buffer& emulated, const Buffer& cpu, const char* what) {
  if (std::memcmp(emulated.data(), cpu.data(), cpu.bytes()) != 0) fail(std::string(what) + ": other bits");
}

// |a - b| <= tolerance(b); NaN never passes.
template <class A, class B, class Tolerance>
void close(const A& emulated, const B& cpu, int64_t count, const char* what, Tolerance tolerance) {
  for (int64_t i = 0; i < count; ++i)
    if (!(std::fabs(emulated[i] - cpu[i]) <= tolerance(double(cpu[i])))) {
      std::ostringstream text;
      text.precision(17);
      text << what << "[" << i << "] is " << emulated[i] << ", on the CPU " << cpu[i];
      fail(text.str());
    }
}

void close_sums(const std::vector<double>& emulated, const std::vector<double>& cpu, const char* what,
                double relative = 1e-12, double absolute = 0) {
  close(emulated, cpu, int64_t(cpu.size()), what, [=](double v) { return relative * std::fabs(v) + absolute; });
}

// Noisy copies with standard deviations up to `sigma`, of displacements that differ by up to `displaced`.
void close_copies(const Buffer& emulated, const Buffer& cpu, Dtype dtype, double sigma, double displaced = 0) {
  const double error = displaced + sigma * (dtype == Dtype::f64 ? 1e-13 : kNoiseError);
  if (error == 0) return same_bits(emulated, cpu, "noisy");
  const Buffer state(state_of(dtype), 0);
  close(emulated, cpu, cpu.count(), "noisy", [&](double v) {
    // One rounding of the sum and one to the dtype.
    const double sum = 2 * state.spacing(v), stored = cpu.spacing(v) > state.spacing(v) ? cpu.spacing(v) : 0;
    return error + sum + stored;
  });
}

// Sizes, types and addresses of one case.
struct Case {
  Dtype dtype, state;
  int64_t batch, channels, positions, features, count;  // count: numbers of a tensor
  int64_t tensors, made = 0;                            // of the operation; of them so far
  bool off;                                             // some addresses are no multiple of a vector:
  int64_t lone;                                         // of this tensor alone, or -1
  Extents extents;

  Case(Random& random, int64_t all_tensors, bool halves = true) : tensors(all_tensors) {
    dtype = Dtype(random.between(0, halves ? 3 : 1)), state = state_of(dtype);
    // Large enough for groups longer than a chunk.
    const bool large = random.one_in(8);
    batch = random.between(1, large ? 2 : 4);
    channels = random.one_in(3) ? random.between(2, 6) : 1;
    positions = random.one_in(4) ? random.between(1, 12) : large ? random.between(1000, 6000) : random.between(1, 700);
    if (random.one_in(2)) positions = (positions + 3) / 4 * 4;
    if (channels > 1) positions = (positions + 3) / 4;
    features = channels * positions, count = batch * features;
    off = random.one_in(2);
    lone = random.one_in(3) ? -1 : random.between(0, tensors - 1);
    extents = {batch, channels, positions};
    emulator::limits = {};
    if (random.one_in(2)) emulator::limits.busy = int64_t(1) << random.between(0, 10);
    if (random.one_in(3)) emulator::limits.blocks = random.between(1, 5);
    if (random.one_in(3)) emulator::limits.grid = random.between(1, 5);
    std::ostringstream text;
    text << ", dtype " << int(dtype) << ", [" << batch << ", " << channels << ", " << positions << "], off " << off
         << ", lone " << lone << ", busy " << emulator::limits.busy << ", blocks " << emulator::limits.blocks
         << ", grid " << emulator::limits.grid;
    described += text.str();
  }
  Buffer tensor(Random& random, Dtype of, int64_t rows = 1) {
    const int64_t number = made++;
    return Buffer(random, of, count * rows, off && (lone < 0 ? random.one_in(2) : number == lone));
  }
};

std::vector<int32_t> no_arrivals(int64_t batch) { return std::vector<int32_t>(size_t(batch), 0); }

void all_zero(const std::vector<int32_t>& arrivals) {
  if (std::any_of(arrivals.begin(), arrivals.end(), [](int32_t v) { return v != 0; })) fail("arrivals: not zero again");
}

struct Bank {
  std::vector<int64_t> keys, step;
  Buffer sigma;
  Noise noise;

  Bank(Random& random, const Case& c, int64_t samples) : sigma(c.state, c.batch) {
    for (int64_t b = 0; b < c.batch; ++b) keys.push_back(int64_t(random.engine()));
    step.push_back(random.between(0, 1000));
    for (int64_t b = 0; b < c.batch; ++b) sigma.set(b, 0.1 + 0.9 * double(random.between(0, 8)) / 8);
    const int64_t far = random.one_in(10) ? int64_t(1) << 34 : 0;
    const int64_t element = random.one_in(2) ? 4 * random.between(0, 5) + far : random.between(0, 9);
    noise = {keys.data(), step.data(), sigma.data(), element, random.between(0, 4), samples, random.one_in(2)};
    if (random.one_in(10)) noise.sigma = nullptr;
    std::ostringstream text;
    text << ", element " << element << ", sample " << noise.sample_offset << ", copies " << samples << ", antithetic "
         << noise.antithetic << ", sigma " << bool(noise.sigma);
    described += text.str();
  }
  double most() const { return noise.sigma ? 1.0 : 0.0; }
};

// Groups of every kind: neighbours, few or many at random, one group, strided groups like pixels, tiles.
struct Partition {
  std::vector<int32_t> order, labels, offsets;
  Buffer weights;
  Groups groups;

  Partition(Random& random, const Case& c) : weights(c.state, 0) {
    const bool per_input = random.one_in(2);
    const int64_t rows = per_input ? c.batch : 1, n = c.features;
    const int64_t kind = n > 1000 && random.one_in(2) ? 0 : random.between(0, 5);
    // Sizes at which sums change their path or a chunk ends.
    const int64_t edges[] = {32, 33, 1024, 1025};
    const int64_t tile = random.one_in(2) ? random.between(1, 40) : edges[random.between(0, 3)];
    const bool skewed = random.one_in(2);  // many small groups and a few large ones
    const auto drawn = [&](int64_t most) {
      const double u = double(random.between(0, 1 << 20)) / ((1 << 20) + 1);
      return int64_t(double(most) * (skewed ? u * u * u * u : u));
    };
    const int64_t width = random.between(1, 60), third = (n + 2) / 3;
    const int64_t counts[] = {(n + tile - 1) / tile, random.between(1, 5), 1, third, random.between(1, n), 6};
    const int64_t count = counts[kind];
    // Labels at an address that is not a multiple of a vector.
    const int64_t off = random.one_in(3) ? 1 : 0;
    labels.resize(rows * n + off), order.resize(rows * n), offsets.assign(rows * (count + 1), 0);
    for (int64_t r = 0; r < rows; ++r) {
      int32_t *label = &labels[off + r * n], *sorted = &order[r * n], *offset = &offsets[r * (count + 1)];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t across = i % width * 3 / width, down = i / width / 40 % 2;
        const int64_t of[] = {i / tile, 0, 0, i % third, 0, across + 3 * down};
        label[i] = int32_t(kind == 1 || kind == 4 ? drawn(count) : of[kind]);
        ++offset[label[i] + 1];
      }
      std::partial_sum(offset, offset + count + 1, offset);
      std::iota(sorted, sorted + n, 0);
      std::stable_sort(sorted, sorted + n, [&](int32_t a, int32_t b) { return label[a] < label[b]; });
    }
    weights = Buffer(c.state, rows * count);
    for (int64_t i = 0; i < weights.count(); ++i) weights.set(i, 0.5 + std::fabs(random.normal()));
    groups = {order.data(), offsets.data(), labels.data() + off, weights.data(), count, per_input};
    described += ", groups of kind " + std::to_string(kind) + ", " + std::to_string(count);
  }
};

void check_prox_step(Random& random) {
  Case c(random, 6);
  const int64_t samples = random.one_in(10) ? 0 : random.between(1, 35);
  const int64_t m = random.one_in(8) ? 0 : random.between(1, 12);
  ProxStep a{};
  a.dtype = c.dtype, a.extents = c.extents, a.samples = samples, a.carry = samples == 0 || random.one_in(2);
  a.count = samples + (a.carry ? 3 : 0), a.penalty = Penalty(random.between(0, 2));
  a.total_of = Total(random.between(0, 2));
  std::ostringstream text;
  text << ", samples " << samples << ", penalty " << int(a.penalty) << ", carry " << a.carry << ", total "
       << int(a.total_of);
  described += text.str();
  const bool grouped = a.penalty == Penalty::group, per_feature = a.penalty == Penalty::l1 && random.one_in(2);

  const Buffer gradients = c.tensor(random, c.dtype, samples), x = c.tensor(random, c.dtype);
  const Buffer gradient = c.tensor(random, c.state), displacement = c.tensor(random, c.state);
  const Buffer total = c.tensor(random, c.state), noisy = c.tensor(random, c.dtype, m);
  Buffer rho(c.state, c.batch), step_size(c.state, c.batch), eta(c.state, per_feature ? c.count : c.batch);
  for (int64_t b = 0; b < c.batch; ++b) rho.set(b, 0.5 + std::fabs(random.normal())), step_size.set(b, 0.1);
  for (int64_t i = 0; i < eta.count(); ++i) eta.set(i, random.one_in(10) ? 0 : 0.3 * std::fabs(random.normal()));
  const Partition partition(random, c);
  const Bank bank(random, c, m);
  std::vector<double> factors(size_t(2 * partition.groups.count * c.batch));
  std::vector<int32_t> arrivals = no_arrivals(c.batch);
  a.gradients = gradients.data(), a.rho = rho.data(), a.step_size = step_size.data(), a.eta = eta.data();
  a.eta_input = per_feature ? c.features : 1, a.eta_feature = per_feature;
  if (grouped) a.groups = partition.groups;
  if (m) a.x = x.data(), a.noise = bank.noise;
  a.factors = factors.data(), a.arrivals = arrivals.data();

  struct Result {
    Buffer gradient, displacement, total, noisy;
    std::vector<double> statistics;
  };
  const auto run = [&](ProxStep a, int64_t partials, auto&& operation) {
    Result r{gradient.copy(), displacement.copy(), total.copy(), noisy.copy(), {}};
    r.noisy.poison();
    r.statistics.assign(size_t(a.extents.batch * kStatistics), NAN);
    std::vector<double> scratch(size_t(a.extents.batch * partials * kStatistics), NAN);
    a.gradient = r.gradient.data(), a.displacement = r.displacement.data(), a.total = r.total.data();
    a.noisy = m ? r.noisy.data() : nullptr, a.statistics = r.statistics.data(), a.partials = scratch.data();
    operation(a);
    all_zero(arrivals);
    return r;
  };
  const auto emulated = [](const ProxStep& a) { cuda::prox_step(a, 0, nullptr); };
  const Result gpu = run(a, cuda::prox_step_partials(a.extents), emulated);
  const Result cpu = run(a, cpu::prox_step_partials(a.extents), [](const ProxStep& a) { cpu::prox_step(a); });

  same_bits(gpu.gradient, cpu.gradient, "gradient");
  // A group's factor depends on a norm, whose terms are added in another order.
  const double factor_error = !grouped ? 0 : c.state == Dtype::f64 ? 1e-14 : 1e-6;
  if (grouped) {
    const auto tolerance = [=](double v) { return factor_error * std::max(1.0, std::fabs(v)); };
    close(gpu.displacement, cpu.displacement, c.count, "displacement", tolerance);
    close(gpu.total, cpu.total, c.count, "total", tolerance);
  } else {
    same_bits(gpu.displacement, cpu.displacement, "displacement");
    same_bits(gpu.total, cpu.total, "total");
  }
  close_sums(gpu.statistics, cpu.statistics, "statistics", grouped && c.state == Dtype::f32 ? 1e-5 : 1e-12);
  close_copies(gpu.noisy, cpu.noisy, c.dtype, bank.most(), 10 * factor_error);

  // The bits of an input depend neither on its batch, nor on addresses, nor on the threads of a quad or the blocks of a
  // launch.
  if (!random.one_in(4)) return;
  const Buffer moved = gradients.head(c.features * samples, !gradients.off());
  ProxStep one = a;
  one.extents.batch = 1, one.gradients = moved.data();
  emulator::limits.busy = int64_t(1) << random.between(0, 17);
  emulator::limits.grid = random.between(1, 100);
  const Result alone = run(one, cuda::prox_step_partials(one.extents), emulated);
  if (!std::equal(alone.statistics.begin(), alone.statistics.end(), gpu.statistics.begin()))
    fail("statistics: other bits alone");
  same_bits(alone.displacement.head(c.features, false), gpu.displacement.head(c.features, false), "displacement alone");
  if (m) same_bits(alone.noisy.head(c.features * m, false), gpu.noisy.head(c.features * m, false), "noisy alone");
}

void check_perturb(Random& random) {
  Case c(random, 3);
  const int64_t m = random.between(1, 12);
  const Buffer x = c.tensor(random, c.dtype), displacement = c.tensor(random, c.state);
  const bool noisy_off = c.tensor(random, c.dtype, 0).off();
  const Bank bank(random, c, m);
  Perturb a{c.dtype, c.extents, x.data(), random.one_in(4) ? nullptr : displacement.data(), bank.noise, nullptr};
  const auto run = [&](Perturb a, auto&& operation) {
    Buffer noisy(c.dtype, c.count * a.noise.samples, noisy_off);
    noisy.poison();
    a.noisy = noisy.data();
    operation(a);
    return noisy;
  };
  const auto emulated = [](const Perturb& a) { cuda::perturb(a, 0, nullptr); };
  const Buffer whole = run(a, emulated);
  close_copies(whole, run(a, [](const Perturb& a) { cpu::perturb(a); }), c.dtype, bank.most());

  // Two chunks of samples give the same copies as one, wherever they are cut.
  const int64_t cut = random.between(0, m);
  for (const bool second : {false, true}) {
    Perturb part = a;
    part.noise.sample_offset += second ? cut : 0, part.noise.samples = second ? m - cut : cut;
    if (part.noise.samples == 0) continue;
    const Buffer noisy = run(part, emulated);
    const size_t row = size_t(c.features) * size_of(c.dtype), rows = size_t(part.noise.samples);
    for (size_t b = 0; b < size_t(c.batch); ++b) {
      const char* expected = whole.data() + (b * size_t(m) + (second ? size_t(cut) : 0)) * row;
      if (std::memcmp(noisy.data() + b * rows * row, expected, rows * row) != 0) fail("noisy: other bits in chunks");
    }
  }
}

void check_accumulate(Random& random) {
  Case c(random, 2);
  const int64_t samples = random.between(0, 35);
  const Buffer gradients = c.tensor(random, c.dtype, samples), sum = c.tensor(random, c.state);
  Buffer gpu = sum.copy(), cpu = sum.copy();
  Accumulate a{c.dtype, c.extents, gradients.data(), samples, gpu.data(), random.one_in(2)};
  described += ", samples " + std::to_string(samples) + ", carry " + std::to_string(a.carry);
  cuda::accumulate(a, 0, nullptr);
  a.sum = cpu.data();
  cpu::accumulate(a);
  same_bits(gpu, cpu, "sum");
}

void check_group_norms(Random& random) {
  Case c(random, 1, false);
  const Buffer v = c.tensor(random, c.dtype);
  const Partition partition(random, c);
  std::vector<double> gpu(size_t(c.batch * partition.groups.count), NAN), cpu = gpu;
  cuda::group_norms({c.dtype, c.extents, v.data(), partition.groups, gpu.data()}, 0, nullptr);
  cpu::group_norms({c.dtype, c.extents, v.data(), partition.groups, cpu.data()});
  close_sums(gpu, cpu, "norms", 1e-13);
}

void check_momentum_step(Random& random) {
  Case c(random, 10, false);
  std::vector<Buffer> tensors;
  for (int i = 0; i < 10; ++i) tensors.push_back(c.tensor(random, c.dtype));
  const bool first = random.one_in(3), squares = !first && random.one_in(2), window = random.one_in(2);
  const bool sums_too = !random.one_in(4);
  const double samples = double(random.between(1, 32));
  std::vector<double> statistics(size_t(c.batch * kStatistics)), sums(size_t(c.batch * kSums));
  for (double& value : statistics) value = std::fabs(random.normal());
  for (double& value : sums) value = random.normal();
  std::ostringstream text;
  text << ", first " << first << ", squares " << squares << ", window " << window << ", sums " << sums_too;
  described += text.str();

  struct Result {
    std::vector<Buffer> tensors;
    std::vector<double> products, sums;
  };
  const auto run = [&](int64_t batch, int64_t partials, auto&& operation) {
    Result r{{}, std::vector<double>(size_t(batch * kProducts), NAN), sums};
    // A single input gets other addresses too.
    for (const Buffer& tensor : tensors)
      r.tensors.push_back(batch == c.batch ? tensor.copy() : tensor.head(batch * c.features, !tensor.off()));
    std::vector<double> scratch(size_t(batch * partials * kProducts), NAN);
    std::vector<int32_t> arrivals = no_arrivals(batch);
    MomentumStep a{};
    a.phases = Phases::both, a.dtype = c.dtype, a.batch = batch, a.features = c.features;
    a.y = r.tensors[0].data(), a.y_prev = r.tensors[1].data(), a.x = r.tensors[2].data();
    a.x_prev = r.tensors[3].data(), a.gradient = r.tensors[4].data(), a.last_gradient = r.tensors[5].data();
    a.last_step = r.tensors[6].data(), a.squares = squares ? r.tensors[7].data() : nullptr;
    a.points = window ? r.tensors[8].data() : nullptr, a.gradients = window ? r.tensors[9].data() : nullptr;
    a.products = r.products.data(), a.sums = sums_too ? r.sums.data() : nullptr, a.statistics = statistics.data();
    a.samples = samples, a.momentum = 0.4, a.first = first;
    a.partials = scratch.data(), a.arrivals = arrivals.data();
    operation(a);
    all_zero(arrivals);
    return r;
  };
  const auto emulated = [](const MomentumStep& a) { cuda::momentum_step(a, 0, nullptr); };
  const Result gpu = run(c.batch, cuda::momentum_step_partials(c.features), emulated);
  // The CPU runs the phases one by one, as a tuple of tensors does.
  const Result cpu = run(c.batch, cpu::momentum_step_partials(c.features), [](MomentumStep a) {
    for (const Phases phase : {Phases::products, Phases::update}) a.phases = phase, cpu::momentum_step(a);
  });
  close_sums(gpu.products, cpu.products, "products", 1e-12, 1e-13 * double(c.features));
  close_sums(gpu.sums, cpu.sums, "sums", 1e-12, 1e-11 * double(c.features));
  // Both sides share momentum_step.h, so the set of sums that change is checked on its own.
  const bool added[kSums] = {!first, !first, squares, squares, squares, window, window, window};
  for (size_t i = 0; i < sums.size(); ++i)
    if ((gpu.sums[i] != sums[i]) != (sums_too && added[i % kSums])) fail("sums: not those that should change");
  for (size_t i = 0; i < tensors.size(); ++i)
    same_bits(gpu.tensors[i], cpu.tensors[i], ("tensor " + std::to_string(i)).c_str());

  if (c.batch == 1) return;
  emulator::limits.grid = random.between(1, 100);
  const Result alone = run(1, cuda::momentum_step_partials(c.features), emulated);
  if (!std::equal(alone.products.begin(), alone.products.end(), gpu.products.begin()))
    fail("products: other bits alone");
  if (!std::equal(alone.sums.begin(), alone.sums.begin() + kSums, gpu.sums.begin())) fail("sums: other bits alone");
  for (size_t i = 0; i < tensors.size(); ++i)
    same_bits(gpu.tensors[i].head(c.features, false), alone.tensors[i].head(c.features, false), "tensor alone");
}

// Runs a fault that the emulator must end the program at; `leftovers` passes if there are none. Returns false for an
// unknown name.
bool fault(const std::string& name) {
  if (name == "barrier") {
    emulator::launch(1, 64, 0, [] {
      if (threadIdx.x % 2) __syncthreads();
    });
  } else if (name == "warp") {
    emulator::launch(1, 64, 0, [] {
      if (threadIdx.x != 40) __any_sync(0xffffffffu, true);
    });
  } else if (name == "crossed") {
    emulator::launch(1, 64, 0, [] { threadIdx.x < 16 ? __syncthreads() : void(__any_sync(0xffffffffu, true)); });
  } else if (name == "vector") {
    alignas(16) static float memory[8];
    emulator::launch(1, 32, 0, [] { __ldcs(reinterpret_cast<const float4*>(memory + 1)); });
  } else if (name == "pack") {
    alignas(16) static float memory[8];
    struct alignas(16) Pack {
      float v[4];
    };
    emulator::launch(1, 32, 0, [] { *reinterpret_cast<Pack*>(memory + 1) = Pack{}; });
  } else if (name == "large") {
    emulator::launch(1, 32, 49153, [] {});
  } else if (name == "leftovers") {
    emulator::launch(2, 32, sizeof(double), [] {
      __shared__ double fixed;
      auto& dynamic = *static_cast<double*>(emulator::dynamic_memory());
      if (threadIdx.x == 0) {
        if (!std::isnan(fixed) || !std::isnan(dynamic)) emulator::die("shared memory of another block");
        fixed = dynamic = 1;
      }
    });
  } else {
    return false;
  }
  return true;
}

struct Operation {
  const char* name;
  void (*check)(Random&);
};
const Operation operations[] = {{"prox_step", check_prox_step},
                                {"perturb", check_perturb},
                                {"accumulate", check_accumulate},
                                {"group_norms", check_group_norms},
                                {"momentum_step", check_momentum_step}};

void check(const Operation& operation, int64_t index, int64_t seed) {
  Random random;
  random.engine.seed(uint64_t(seed * 1000003 + index));
  emulator::reseed(random.engine());
  described = std::string(operation.name) + " " + std::to_string(index) + " " + std::to_string(seed);
  operation.check(random);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.size() == 2 && arguments[0] == "fault") return fault(arguments[1]) ? 0 : 2;
  if (arguments.size() != 2 && arguments.size() != 3) return 2;
  emulator::last_words = print_case;
  __sanitizer_set_death_callback(print_case);
  std::signal(SIGSEGV, [](int) {
    std::printf("segmentation fault\n");
    print_case();
    std::_Exit(1);
  });
  if (arguments.size() == 3) {
    for (const Operation& operation : operations)
      if (arguments[0] == operation.name) {
        check(operation, std::stoll(arguments[1]), std::stoll(arguments[2]));
        return 0;
      }
    return 2;
  }
  const int64_t count = std::stoll(arguments[0]), seed = std::stoll(arguments[1]);
  for (const Operation& operation : operations) {
    for (int64_t i = 0; i < count; ++i) check(operation, i, seed);
    std::printf("%s %lld\n", operation.name, static_cast<long long>(count));
  }
}
