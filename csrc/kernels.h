// The interface of the core: every operation, declared once for cpu:: and once for cuda::.
//
// Kernels take addresses, extents and a stream, never a tensor. Nothing is checked here: moreau_ext/ops validates
// device, dtype, shape, layout and overlap before it calls. Tensors that an operation writes share no memory with any
// other tensor of the call. No kernel allocates or synchronises; the caller provides scratch memory.
//
// bindings.cpp exposes every struct to Python under its own name, with the names of its fields as keywords.
#pragma once

#include <cstdint>

namespace moreau {

// Storage type of inputs, gradients and noisy copies, `T` below. The state (displacement, averaged gradient, scalars of
// an input) is float, or double for f64: `state_t` in dtype.h.
enum class Dtype : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// A dense batch. Feature (c, s) of an input lies at memory offset s * channels + c and has the logical, row-major index
// c * positions + s. Contiguous memory has channels == 1; channels_last has channels > 1.
struct Extents {
  int64_t batch;
  int64_t channels;
  int64_t positions;
};

// A selection of the noise bank: z(key of the input, step, sample, element). See philox.h.
struct Noise {
  const int64_t* keys;     // [batch], a hash of seed and input id
  const int64_t* step;     // [1], in device memory so that a captured graph can advance it
  const void* sigma;       // state_t [batch]; null: the copies are x + displacement, without noise
  int64_t element_offset;  // logical index of this tensor's first feature within the input (for tuples)
  int64_t sample_offset;   // number of the first sample
  int64_t samples;         // noisy copies to write per input
  bool antithetic;         // sample 2k+1 is minus sample 2k
};

// A partition of the memory offsets of each input into groups.
struct Groups {
  const int32_t* order;    // [rows, features], memory offsets sorted by group, ascending within one
  const int32_t* offsets;  // [rows, count + 1], start of each group in `order`
  const int32_t* labels;   // [rows, features], group of each memory offset
  const void* weights;     // state_t [rows, count]
  int64_t count;
  bool per_input;  // rows == batch; otherwise rows == 1, and that row serves every input
};

// noisy[b, k] = x[b] + displacement[b] + sigma[b] * z(b, k)
struct Perturb {
  Dtype dtype;
  Extents extents;
  const void* x;             // T [batch, features]
  const void* displacement;  // state_t [batch, features]; null: 0
  Noise noise;
  void* noisy;  // T [batch, noise.samples, features]
};

// sum[b] (+)= sum_k gradients[b, k], added in the order of k, so that the sum does not depend on chunks
struct Accumulate {
  Dtype dtype;
  Extents extents;
  const void* gradients;  // T [batch, samples, features]
  int64_t samples;
  void* sum;   // state_t [batch, features]
  bool carry;  // add to `sum`; otherwise overwrite it
};

// norms[b, g] = ||v[b, members of g]||_2, summed in float64
struct GroupNorms {
  Dtype dtype;  // of v: f32 or f64
  Extents extents;
  const void* v;  // [batch, features]
  Groups groups;
  double* norms;  // [batch, count]; not rounded, so that factors computed from them equal those of prox_step
};

enum class Penalty : int { none = 0, l1 = 1, group = 2 };
enum class Total : int { none = 0, gradient = 1, displacement = 2 };

// Statistics of prox_step for each input, float64. y is the KKT image of the incoming displacement.
enum Statistic : int { residual2 = 0, displacement2 = 1, image2 = 2, gradient2 = 3, nonzero = 4 };
constexpr int kStatistics = 5;
static_assert(kStatistics == nonzero + 1, "one number for each statistic");

// One step of the proximal gradient method; prox_step in moreau_ext/ops/reference.py is its specification.
//
//   p     = sum_k gradients[k] / count
//   y     = -rho S_eta(p)                              for the statistics
//   delta = S_{gamma eta}((1 - gamma / rho) delta - gamma p),   gamma = step_size
//   noisy[k] = x + delta + sigma z(k)
struct ProxStep {
  Dtype dtype;
  Extents extents;
  const void* gradients;  // T [batch, samples, features]; null when samples == 0
  int64_t samples;
  int64_t count;       // divisor of the sum
  bool carry;          // `gradient` holds the sum of earlier chunks
  void* gradient;      // state_t: the sum so far on entry (carry), p on return
  void* displacement;  // state_t, delta: updated in place
  void* total;         // state_t: running sum of p or of the new delta; null with Total::none
  Total total_of;
  const void* rho;        // state_t [batch]
  const void* step_size;  // state_t [batch]
  Penalty penalty;
  const void* eta;  // state_t, at [input * eta_input + offset * eta_feature]
  int64_t eta_input;
  int64_t eta_feature;
  Groups groups;
  const void* x;       // T; read only when noisy copies are written
  Noise noise;         // samples == 0: no noisy copies
  void* noisy;         // T [batch, noise.samples, features]
  double* statistics;  // [batch, kStatistics]
  double* partials;    // scratch [batch, prox_step_partials(...), kStatistics]
  void* factors;       // scratch state_t [batch, groups.count, 2], for Penalty::group
  int32_t* arrivals;   // scratch [batch], zero on entry and on return; CUDA only
};

// Inner products of momentum_step for each input, float64; PRODUCTS in moreau_ext/ops/reference.py. With
// step = y_{t+1} - y_t, last = y_t - y_{t-1}, dx = x_t - x_{t-1} and dg = p_t - p_{t-1}.
namespace product {
enum : int {
  restart_product = 0,  // <x_t - y_{t+1}, step>
  step_dot_last = 1,    // <step, last>
  last_sq = 2,          // ||last||^2
  dx_dx = 3,            // ||dx||^2
  dx_dg = 4,            // <dx, dg>
  dg_dg = 5,            // ||dg||^2
};
}
constexpr int kProducts = 6;
static_assert(kProducts == product::dg_dg + 1, "one number for each product");

// Running sums of momentum_step for each input, float64; SUMS in moreau_ext/ops/reference.py. m = samples.
namespace summed {
enum : int {
  step_dot_last = 0,
  last_sq = 1,
  differences = 2,  // 1
  norms = 3,        // m/2 ||dg||^2
  norms2 = 4,       // (m/2 ||dg||^2)^2
  lengths = 5,      // m ||x_t||^2
  weight = 6,       // m
  steps = 7,        // 1
};
}
constexpr int kSums = 8;
static_assert(kSums == summed::steps + 1, "one number for each sum");

// momentum_step has two phases, since the update needs products summed over all tensors of a tuple.
enum class Phases : int { products = 1, update = 2, both = 3 };

constexpr bool includes(Phases phases, Phases one) { return (int(phases) & int(one)) != 0; }

// Nesterov's momentum after a proximal step, with gradient restart (O'Donoghue and Candès, 2015), and running sums of
// the iteration; momentum_step in moreau_ext/ops/reference.py is its specification.
//
//   y_{t+1} = prox step from x_t                                             (prox_step, before this call)
//   beta    = 0 where <x_t - y_{t+1}, y_{t+1} - y_t> > 0, else `momentum`
//   x_{t+1} = y_{t+1} + beta (y_{t+1} - y_t)
//
// Every tensor is state_t [batch, features]; all have one memory layout.
//
//   field          on entry                            on return
//   y              y_{t+1}                             x_{t+1}, where the next proximal step starts
//   y_prev         y_t                                 y_{t+1}
//   x              x_t, where gradients were taken     x_{t+1}
//   x_prev         x_{t-1}                             x_t
//   gradient       p_t, average gradient at x_t        unchanged
//   last_gradient  p_{t-1}                             p_t
//   last_step      y_t - y_{t-1}                       y_{t+1} - y_t
//   squares        sum of m/2 (p - p_prev)^2           one term more; null: not summed
//   points         sum of m x                          one term more; null: not summed
//   gradients      sum of m p                          one term more; null exactly where `points` is
struct MomentumStep {
  Phases phases;
  Dtype dtype;  // f32 or f64
  int64_t batch;
  int64_t features;
  void* y;
  void* y_prev;
  void* x;
  void* x_prev;
  const void* gradient;
  void* last_gradient;
  void* last_step;
  void* squares;
  void* points;
  void* gradients;
  double* products;          // [batch, kProducts]: written by Phases::products, read by Phases::update
  double* sums;              // [batch, kSums]; null for all tensors of a tuple but one
  const double* statistics;  // [batch, kStatistics] of the proximal step
  double samples;            // m, gradients in an average
  double momentum;           // beta
  bool first;                // there is no last step: last_gradient, last_step and x_prev hold zeros
  double* partials;          // scratch [batch, momentum_step_partials(...), kProducts], for Phases::products
  int32_t* arrivals;         // scratch [batch], zero on entry and on return; CUDA only
};

namespace cpu {
void perturb(const Perturb&);
void accumulate(const Accumulate&);
void group_norms(const GroupNorms&);
void prox_step(const ProxStep&);
int64_t prox_step_partials(const Extents&);
void momentum_step(const MomentumStep&);
int64_t momentum_step_partials(int64_t features);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t. Every operation launches one kernel (momentum_step one for each phase) and checks the
// launch.
void perturb(const Perturb&, int device, void* stream);
void accumulate(const Accumulate&, int device, void* stream);
void group_norms(const GroupNorms&, int device, void* stream);
void prox_step(const ProxStep&, int device, void* stream);
int64_t prox_step_partials(const Extents&);
void momentum_step(const MomentumStep&, int device, void* stream);
int64_t momentum_step_partials(int64_t features);

// A new stream. torch hands out 32 streams per device in turn, so two users can get the same one.
void* make_stream(int device);
}  // namespace cuda

}  // namespace moreau
