// The surface of the core: every operation, declared once for cpu:: and cuda::.
//
// Kernels see addresses, extents and a stream; never a tensor. Everything here is unchecked:
// moreau_ext/ops/ validates device, dtype, shape, layout and overlap before it calls.
// No kernel allocates or synchronises; scratch memory comes from the caller.
#pragma once

#include <cstdint>

namespace moreau {

// Storage type of inputs, gradients and noisy copies. State (displacement, averaged gradient, per-input
// scalars) is float, or double for f64: `state_t` in dtype.h.
enum class Dtype : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

// A dense batch. Feature (c, s) of an input lies at memory offset s * channels + c and has the logical,
// row-major index c * positions + s. Contiguous memory is channels == 1; channels_last is channels > 1.
struct Extents {
  int64_t batch;
  int64_t channels;
  int64_t positions;
};

// Which normals: z(key of the input, step, sample, element). See philox.h.
struct Noise {
  const int64_t* keys;     // [batch], a mix of seed and input id
  const int64_t* step;     // [1], in device memory so that a captured graph can advance it
  const void* sigma;       // state_t [batch]; null: no noise is drawn, copies are x + displacement
  int64_t element_offset;  // logical index of this tensor's first feature within the input (tuples)
  int64_t sample_offset;   // number of the first sample
  int64_t samples;         // noisy copies to write per input
  bool antithetic;         // sample 2k+1 is minus sample 2k
};

// Features that belong together, as a partition of each input's memory offsets.
struct Groups {
  const int32_t* order;    // [rows, features], memory offsets sorted by group, ascending within one
  const int32_t* offsets;  // [rows, count + 1], where each group starts in `order`
  const int32_t* labels;   // [rows, features], group of each memory offset
  const void* weights;     // state_t [rows, count]
  int64_t count;
  bool per_input;  // rows == batch, else one row serves every input
};

// noisy[b, k] = x[b] + displacement[b] + sigma[b] * z(b, k)
struct Perturb {
  Dtype dtype;
  Extents extents;
  const void* x;             // T [batch, features]
  const void* displacement;  // state_t, or null for zero
  Noise noise;
  void* noisy;  // T [batch, noise.samples, features]
};

// sum[b] (+)= sum_k gradients[b, k], added in the order of k, so that chunking does not change it
struct Accumulate {
  Dtype dtype;
  Extents extents;
  const void* gradients;  // T [batch, samples, features]
  int64_t samples;
  void* sum;   // state_t [batch, features]
  bool carry;  // add to what is there, else overwrite
};

// norms[b, g] = ||v[b, members of g]||_2, summed in float64
struct GroupNorms {
  Dtype dtype;  // of v: f32 or f64
  Extents extents;
  const void* v;
  Groups groups;
  double* norms;  // [batch, count]; not rounded, so that factors made of them are those of prox_step
};

enum class Penalty : int { none = 0, l1 = 1, group = 2 };
enum class Total : int { none = 0, gradient = 1, displacement = 2 };

// What prox_step writes per input, float64. y is the KKT image -rho * S_eta(p) of the incoming displacement.
enum Statistic : int { residual2 = 0, displacement2 = 1, image2 = 2, gradient2 = 3, nonzero = 4 };
constexpr int kStatistics = 5;

// One step of the proximal gradient method, see prox_step in moreau_ext/ops/reference.py.
struct ProxStep {
  Dtype dtype;
  Extents extents;
  const void* gradients;  // T [batch, samples, features]; null when samples == 0
  int64_t samples;
  int64_t count;       // the sum is divided by this to give p
  bool carry;          // `gradient` holds the sum of earlier chunks
  void* gradient;      // state_t: the sum so far on entry (carry), p on return
  void* displacement;  // state_t, updated in place
  void* total;         // state_t running sum of p or of the new displacement
  Total total_of;
  const void* rho;        // state_t [batch]
  const void* step_size;  // state_t [batch]
  Penalty penalty;
  const void* eta;  // state_t; indexed by input * eta_input + offset * eta_feature
  int64_t eta_input;
  int64_t eta_feature;
  Groups groups;
  const void* x;       // T, read only when noisy copies are written
  Noise noise;         // samples == 0: no noisy copies
  void* noisy;         // T [batch, noise.samples, features]
  double* statistics;  // [batch, kStatistics]
  double* partials;    // scratch [batch, prox_step_partials(...), kStatistics]
  void* factors;       // scratch state_t [batch, count, 2] for groups
  int32_t* arrivals;   // scratch [batch], zero on entry and on return; CUDA only
};

// What a momentum step multiplies and adds up per input, float64: see PRODUCTS and SUMS of moreau_ext/ops/reference.py.
namespace product {
enum : int { uphill = 0, turned = 1, length = 2, way = 3, bend = 4, square = 5 };
}
constexpr int kProducts = 6;
namespace summed {
enum : int { turned = 0, length = 1, differences = 2, norms = 3, norms2 = 4, lengths = 5, weight = 6, steps = 7 };
}
constexpr int kSums = 8;

// Momentum after a proximal step, and what is kept of the step, see momentum_step in moreau_ext/ops/reference.py. All
// tensors are state_t [batch, features] of one memory layout.
struct Momentum {
  Dtype dtype;  // f32 or f64
  int64_t batch;
  int64_t features;
  void* point;
  void* previous;
  void* here;
  void* before;
  const void* gradient;
  void* last_gradient;
  void* change;
  void* squares;  // null: not summed
  void* points;   // null: not summed, nor gradients
  void* gradients;
  double* products;          // [batch, kProducts]: momentum_products writes, momentum_update reads
  double* sums;              // [batch, kSums]; null for all tensors of a tuple but one
  const double* statistics;  // [batch, kStatistics]
  double samples;
  double momentum;
  bool first;
  double* partials;   // scratch [batch, momentum_partials(...), kProducts]
  int32_t* arrivals;  // scratch [batch], zero on entry and on return; CUDA only
};

namespace cpu {
void perturb(const Perturb&);
void accumulate(const Accumulate&);
void group_norms(const GroupNorms&);
void prox_step(const ProxStep&);
int64_t prox_step_partials(const Extents&);
void momentum_products(const Momentum&);
void momentum_update(const Momentum&);
int64_t momentum_partials(int64_t features);
}  // namespace cpu

namespace cuda {
// `stream` is a cudaStream_t. Each launches once and checks the launch.
void perturb(const Perturb&, int device, void* stream);
void accumulate(const Accumulate&, int device, void* stream);
void group_norms(const GroupNorms&, int device, void* stream);
void prox_step(const ProxStep&, int device, void* stream);
int64_t prox_step_partials(const Extents&);
void momentum_products(const Momentum&, int device, void* stream);
void momentum_update(const Momentum&, int device, void* stream);
int64_t momentum_partials(int64_t features);

// A stream that nobody else has. Those of torch come from 32 per device, dealt out in turn.
void* make_stream(int device);
}  // namespace cuda

}  // namespace moreau
