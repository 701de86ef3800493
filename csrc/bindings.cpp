// The Python module _core: addresses in, kernels.h out, with the GIL released. Nothing is checked here:
// moreau_ext/ops/ is the only caller. Every function takes a device index, -1 for the CPU, and a stream.
#include <pybind11/pybind11.h>

#include "check.h"
#include "kernels.h"

namespace py = pybind11;
using namespace moreau;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// Runs an operation on the device it was asked for.
#ifdef MOREAU_CUDA
#define MOREAU_RUN(OPERATION, ARGUMENTS)                                                     \
  do {                                                                                       \
    py::gil_scoped_release release;                                                          \
    device < 0 ? cpu::OPERATION(ARGUMENTS) : cuda::OPERATION(ARGUMENTS, device, at(stream)); \
  } while (false)
#else
#define MOREAU_RUN(OPERATION, ARGUMENTS)                                                \
  do {                                                                                  \
    (void)stream;                                                                       \
    if (device >= 0) fail(#OPERATION ": this build of moreau_ext has no CUDA kernels"); \
    py::gil_scoped_release release;                                                     \
    cpu::OPERATION(ARGUMENTS);                                                          \
  } while (false)
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Unchecked kernels of moreau_ext on raw addresses; use moreau_ext.ops.";
#ifdef MOREAU_CUDA
  m.attr("cuda_architectures") = MOREAU_CUDA_ARCHITECTURES;
  m.attr("cuda_version") = MOREAU_CUDA_VERSION;
#else
  m.attr("cuda_architectures") = py::none();
  m.attr("cuda_version") = py::none();
#endif
  m.attr("compiler") = MOREAU_COMPILER;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  m.attr("cpu_capability") = __builtin_cpu_supports("avx512f") ? "AVX-512"
                             : __builtin_cpu_supports("avx2")  ? "AVX2"
                                                               : "SSE2";
#else
  m.attr("cpu_capability") = "portable";
#endif

  py::class_<Extents>(m, "Extents").def(py::init([](int64_t batch, int64_t channels, int64_t positions) {
    return Extents{batch, channels, positions};
  }));
  py::class_<Noise>(m, "Noise")
      .def(py::init([](Address keys, Address step, Address sigma, int64_t element_offset, int64_t sample_offset,
                       int64_t samples, bool antithetic) {
        return Noise{at<int64_t>(keys), at<int64_t>(step), at(sigma), element_offset,
                     sample_offset,     samples,           antithetic};
      }));
  py::class_<Groups>(m, "Groups")
      .def(py::init([](Address order, Address offsets, Address labels, Address weights, int64_t count, bool per_input) {
        return Groups{at<int32_t>(order), at<int32_t>(offsets), at<int32_t>(labels), at(weights), count, per_input};
      }));

#ifdef MOREAU_CUDA
  m.def("make_stream", [](int device) { return reinterpret_cast<Address>(cuda::make_stream(device)); });
#endif

  m.def("perturb", [](int dtype, const Extents& extents, Address x, Address displacement, const Noise& noise,
                      Address noisy, int device, Address stream) {
    const Perturb a{Dtype(dtype), extents, at(x), at(displacement), noise, at(noisy)};
    MOREAU_RUN(perturb, a);
  });
  m.def("accumulate", [](int dtype, const Extents& extents, Address gradients, int64_t samples, Address sum, bool carry,
                         int device, Address stream) {
    const Accumulate a{Dtype(dtype), extents, at(gradients), samples, at(sum), carry};
    MOREAU_RUN(accumulate, a);
  });
  m.def("group_norms", [](int dtype, const Extents& extents, Address v, const Groups& groups, Address norms, int device,
                          Address stream) {
    const GroupNorms a{Dtype(dtype), extents, at(v), groups, at<double>(norms)};
    MOREAU_RUN(group_norms, a);
  });
  m.def("prox_step_partials", [](const Extents& extents, bool cuda) {
#ifdef MOREAU_CUDA
    if (cuda) return cuda::prox_step_partials(extents);
#endif
    (void)cuda;
    return cpu::prox_step_partials(extents);
  });
  m.def("prox_step", [](int dtype, const Extents& extents, Address gradients, int64_t samples, int64_t count,
                        bool carry, Address gradient, Address displacement, Address total, int total_of, Address rho,
                        Address step_size, int penalty, Address eta, int64_t eta_input, int64_t eta_feature,
                        const Groups& groups, Address x, const Noise& noise, Address noisy, Address statistics,
                        Address partials, Address factors, Address arrivals, int device, Address stream) {
    ProxStep a{};
    a.dtype = Dtype(dtype), a.extents = extents;
    a.gradients = at(gradients), a.samples = samples, a.count = count, a.carry = carry;
    a.gradient = at(gradient), a.displacement = at(displacement);
    a.total = at(total), a.total_of = Total(total_of);
    a.rho = at(rho), a.step_size = at(step_size);
    a.penalty = Penalty(penalty), a.eta = at(eta), a.eta_input = eta_input, a.eta_feature = eta_feature;
    a.groups = groups, a.x = at(x), a.noise = noise, a.noisy = at(noisy);
    a.statistics = at<double>(statistics), a.partials = at<double>(partials);
    a.factors = at(factors), a.arrivals = at<int32_t>(arrivals);
    MOREAU_RUN(prox_step, a);
  });
  m.def("momentum_partials", [](int64_t features, bool cuda) {
#ifdef MOREAU_CUDA
    if (cuda) return cuda::momentum_partials(features);
#endif
    (void)cuda;
    return cpu::momentum_partials(features);
  });
  // phases: 1 for momentum_products, 2 for momentum_update, 3 for both.
  m.def("momentum",
        [](int phases, int dtype, int64_t batch, int64_t features, Address point, Address previous, Address here,
           Address before, Address gradient, Address last_gradient, Address change, Address squares, Address points,
           Address gradients, Address products, Address sums, Address statistics, double samples, double momentum,
           bool first, Address partials, Address arrivals, int device, Address stream) {
          Momentum a{};
          a.dtype = Dtype(dtype), a.batch = batch, a.features = features;
          a.point = at(point), a.previous = at(previous), a.here = at(here), a.before = at(before);
          a.gradient = at(gradient), a.last_gradient = at(last_gradient), a.change = at(change);
          a.squares = at(squares), a.points = at(points), a.gradients = at(gradients);
          a.products = at<double>(products), a.sums = at<double>(sums), a.statistics = at<double>(statistics);
          a.samples = samples, a.momentum = momentum, a.first = first;
          a.partials = at<double>(partials), a.arrivals = at<int32_t>(arrivals);
          if (phases & 1) MOREAU_RUN(momentum_products, a);
          if (phases & 2) MOREAU_RUN(momentum_update, a);
        });
}
