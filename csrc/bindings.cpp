// The Python module _core. It turns addresses into the structs of kernels.h and runs an operation on them with the GIL
// released. Nothing is checked here; moreau_ext/ops is the only caller. _core.pyi declares the same names and types.
#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "check.h"
#include "kernels.h"

namespace py = pybind11;
using namespace moreau;

namespace {

using Address = uintptr_t;

// --- keywords --------------------------------------------------------------------------------------------------------
//
// pybind11's own functions look for each keyword by comparing strings from the first one on, and build a dictionary for
// a constructor: 3 us for the 26 keywords of prox_step. Callers pass keywords in the order of the struct and Python
// interns their names, so here one comparison of pointers finds each.

template <class Struct, class Member>
struct Field {
  const char* name;
  Member Struct::* member;
};

// all_fields<Struct, n>(): whether the struct has no more than n fields.
struct Anything {
  template <class T>
  operator T() const;
};
template <class Struct, size_t... kIndices>
auto takes(std::index_sequence<kIndices...>) -> decltype(Struct{(void(kIndices), Anything())...}, std::true_type());
template <class Struct>
std::false_type takes(...);
template <class Struct, size_t kCount>
constexpr bool all_fields() {
  return !decltype(takes<Struct>(std::make_index_sequence<kCount + 1>()))::value;
}

// The Python object of a struct of kernels.h that other structs contain.
template <class Struct>
struct Record {
  PyObject_HEAD Struct value;
  static inline PyTypeObject* type = nullptr;
};

// Pointers are passed as addresses.
template <class Member>
Member from_python(py::handle value) {
  if constexpr (std::is_pointer_v<Member>)
    return reinterpret_cast<Member>(py::cast<Address>(value));
  else if constexpr (std::is_class_v<Member>)
    return Py_TYPE(value.ptr()) == Record<Member>::type ? reinterpret_cast<Record<Member>*>(value.ptr())->value
                                                        : throw py::cast_error();
  else
    return py::cast<Member>(value);
}

// Fills a struct from a call in which every field is a keyword.
template <class Struct, class... Members>
class Keywords {
 public:
  Keywords(const char* name, const Field<Struct, Members>&... fields)
      : name_(name),
        fields_(fields...),
        names_{PyUnicode_InternFromString(fields.name)...},
        signature_(std::string(name) + "(*") {
    ((signature_ += std::string(", ") + fields.name), ...);
    signature_ += ")\n--\n\n";
  }

  const char* name() const { return name_; }
  // As inspect.signature reads it.
  const char* signature() const { return signature_.c_str(); }

  Struct parse(PyObject* const* values, size_t positional, PyObject* keywords) const {
    return parse(values, positional, keywords, std::index_sequence_for<Members...>());
  }

 private:
  static constexpr size_t kCount = sizeof...(Members);

  template <size_t... kIndices>
  Struct parse(PyObject* const* values, size_t positional, PyObject* keywords, std::index_sequence<kIndices...>) const {
    if (positional || !keywords || PyTuple_GET_SIZE(keywords) != Py_ssize_t(kCount))
      throw py::type_error(std::string(name_) + ": expected " + std::to_string(kCount) + " keywords and nothing else");
    Struct made{};
    ((made.*std::get<kIndices>(fields_).member = take<Members>(values[find(keywords, kIndices)], kIndices)), ...);
    return made;
  }

  // Where the i-th name is among the keywords.
  size_t find(PyObject* keywords, size_t i) const {
    if (PyTuple_GET_ITEM(keywords, i) == names_[i]) return i;
    for (size_t k = 0; k < kCount; ++k)
      if (PyUnicode_Compare(PyTuple_GET_ITEM(keywords, k), names_[i]) == 0) return k;
    throw py::type_error(std::string(name_) + ": missing keyword " + PyUnicode_AsUTF8(names_[i]));
  }

  template <class Member>
  Member take(py::handle value, size_t i) const {
    try {
      return from_python<Member>(value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name_) + ": wrong type or range of " + PyUnicode_AsUTF8(names_[i]));
    }
  }

  const char* name_;
  std::tuple<Field<Struct, Members>...> fields_;
  std::array<PyObject*, kCount> names_;
  std::string signature_;
};

// Returns what f returns, or null with the Python error of its exception.
template <class F>
PyObject* guarded(F&& f) {
  try {
    return f();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// --- structs and functions -------------------------------------------------------------------------------------------

// Adds the class of a struct. What is created here and below is never destroyed: the interpreter uses it to its end.
template <class Struct, class... Members>
void add_struct(py::module_& m, const char* name, const Field<Struct, Members>&... fields) {
  static_assert(all_fields<Struct, sizeof...(Members)>(), "every field is a keyword");
  static const auto* const keywords = new Keywords<Struct, Members...>(name, fields...);
  PyType_Slot slots[] = {{Py_tp_doc, const_cast<char*>(keywords->signature())}, {0, nullptr}};
  static const std::string full_name = std::string("moreau_ext._core.") + name;
  PyType_Spec spec{full_name.c_str(), sizeof(Record<Struct>), 0, Py_TPFLAGS_DEFAULT, slots};
  auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
  if (!type) throw py::error_already_set();
  Record<Struct>::type = reinterpret_cast<PyTypeObject*>(type.ptr());
  Record<Struct>::type->tp_vectorcall = [](PyObject* self, PyObject* const* values, size_t flags, PyObject* names) {
    return guarded([&] {
      const Struct value = keywords->parse(values, size_t(PyVectorcall_NARGS(flags)), names);
      auto* made = PyObject_New(Record<Struct>, reinterpret_cast<PyTypeObject*>(self));
      if (!made) throw py::error_already_set();
      made->value = value;
      return reinterpret_cast<PyObject*>(made);
    });
  };
  m.add_object(name, type);
}

// Adds the function name(*, <fields of Struct>), which returns kRun(struct, name).
template <auto kRun, class Struct, class... Members>
void add_function(py::module_& m, const char* name, const Field<Struct, Members>&... fields) {
  static const auto* const keywords = new Keywords<Struct, Members...>(name, fields...);
  PyObject* (*const call)(PyObject*, PyObject* const*, Py_ssize_t,
                          PyObject*) = [](PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    return guarded([&] {
      py::object result = kRun(keywords->parse(values, size_t(positional), names), keywords->name());
      return result.release().ptr();
    });
  };
  static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                            METH_FASTCALL | METH_KEYWORDS, keywords->signature()};
  m.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, m.attr("__name__").ptr())));
}

// Arguments of an operation and the device that it runs on: -1 for the CPU.
template <class Arguments>
struct Call : Arguments {
  int device;
  void* stream;
};

template <auto kOnCpu, auto kOnCuda, class Arguments>
py::object run(const Call<Arguments>& a, const char* name) {
  constexpr bool has_cuda = !std::is_null_pointer_v<decltype(kOnCuda)>;
  if (a.device >= 0 && !has_cuda) fail(name, ": this build of moreau_ext has no CUDA kernels");
  {
    py::gil_scoped_release release;
    if constexpr (has_cuda)
      a.device < 0 ? kOnCpu(a) : kOnCuda(a, a.device, a.stream);
    else
      kOnCpu(a);
  }
  return py::none();
}

// Adds the function operation(*, <fields of Arguments>, device, stream).
template <auto kOnCpu, auto kOnCuda, class Arguments, class... Members>
void add_operation(py::module_& m, const char* name, const Field<Arguments, Members>&... fields) {
  static_assert(all_fields<Arguments, sizeof...(Members)>(), "every field is a keyword");
  using Both = Call<Arguments>;
  add_function<run<kOnCpu, kOnCuda, Arguments>>(m, name, Field<Both, Members>{fields.name, fields.member}...,
                                                Field<Both, int>{"device", &Both::device},
                                                Field<Both, void*>{"stream", &Both::stream});
}

// Arguments of the functions that count the rows of the scratch `partials` for each input.
template <class Size>
struct Partials {
  Size size;
  bool cuda;
};

template <auto kOnCpu, auto kOnCuda, class Size>
py::object count(const Partials<Size>& a, const char*) {
  if constexpr (!std::is_null_pointer_v<decltype(kOnCuda)>)
    if (a.cuda) return py::int_(kOnCuda(a.size));
  return py::int_(kOnCpu(a.size));
}

// Adds the function name(*, <argument>, cuda).
template <auto kOnCpu, auto kOnCuda, class Size>
void add_partials(py::module_& m, const char* name, const char* argument) {
  using Struct = Partials<Size>;
  add_function<count<kOnCpu, kOnCuda, Size>>(m, name, Field<Struct, Size>{argument, &Struct::size},
                                             Field<Struct, bool>{"cuda", &Struct::cuda});
}

#ifdef MOREAU_CUDA
#define MOREAU_ON_BOTH(NAME) cpu::NAME, cuda::NAME
#else
#define MOREAU_ON_BOTH(NAME) cpu::NAME, nullptr
#endif

// --- fields ----------------------------------------------------------------------------------------------------------

// A field of `Struct` under its own name.
#define MOREAU_FIELD(NAME) \
  Field<Struct, decltype(Struct::NAME)> { #NAME, &Struct::NAME }

void add_enumerations(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("f32", Dtype::f32)
      .value("f64", Dtype::f64)
      .value("f16", Dtype::f16)
      .value("bf16", Dtype::bf16);
  py::enum_<Penalty>(m, "Penalty").value("none", Penalty::none).value("l1", Penalty::l1).value("group", Penalty::group);
  py::enum_<Total>(m, "Total")
      .value("none", Total::none)
      .value("gradient", Total::gradient)
      .value("displacement", Total::displacement);
  py::enum_<Phases>(m, "Phases")
      .value("products", Phases::products)
      .value("update", Phases::update)
      .value("both", Phases::both);
}

void add_extents(py::module_& m) {
  using Struct = Extents;
  add_struct(m, "Extents", MOREAU_FIELD(batch), MOREAU_FIELD(channels), MOREAU_FIELD(positions));
}

void add_noise(py::module_& m) {
  using Struct = Noise;
  add_struct(m, "Noise", MOREAU_FIELD(keys), MOREAU_FIELD(step), MOREAU_FIELD(sigma), MOREAU_FIELD(element_offset),
             MOREAU_FIELD(sample_offset), MOREAU_FIELD(samples), MOREAU_FIELD(antithetic));
}

void add_groups(py::module_& m) {
  using Struct = Groups;
  add_struct(m, "Groups", MOREAU_FIELD(order), MOREAU_FIELD(offsets), MOREAU_FIELD(labels), MOREAU_FIELD(weights),
             MOREAU_FIELD(count), MOREAU_FIELD(per_input));
}

void add_perturb(py::module_& m) {
  using Struct = Perturb;
  add_operation<MOREAU_ON_BOTH(perturb)>(m, "perturb", MOREAU_FIELD(dtype), MOREAU_FIELD(extents), MOREAU_FIELD(x),
                                         MOREAU_FIELD(displacement), MOREAU_FIELD(noise), MOREAU_FIELD(noisy));
}

void add_accumulate(py::module_& m) {
  using Struct = Accumulate;
  add_operation<MOREAU_ON_BOTH(accumulate)>(m, "accumulate", MOREAU_FIELD(dtype), MOREAU_FIELD(extents),
                                            MOREAU_FIELD(gradients), MOREAU_FIELD(samples), MOREAU_FIELD(sum),
                                            MOREAU_FIELD(carry));
}

void add_group_norms(py::module_& m) {
  using Struct = GroupNorms;
  add_operation<MOREAU_ON_BOTH(group_norms)>(m, "group_norms", MOREAU_FIELD(dtype), MOREAU_FIELD(extents),
                                             MOREAU_FIELD(v), MOREAU_FIELD(groups), MOREAU_FIELD(norms));
}

void add_prox_step(py::module_& m) {
  using Struct = ProxStep;
  add_operation<MOREAU_ON_BOTH(prox_step)>(
      m, "prox_step", MOREAU_FIELD(dtype), MOREAU_FIELD(extents), MOREAU_FIELD(gradients), MOREAU_FIELD(samples),
      MOREAU_FIELD(count), MOREAU_FIELD(carry), MOREAU_FIELD(gradient), MOREAU_FIELD(displacement), MOREAU_FIELD(total),
      MOREAU_FIELD(total_of), MOREAU_FIELD(rho), MOREAU_FIELD(step_size), MOREAU_FIELD(penalty), MOREAU_FIELD(eta),
      MOREAU_FIELD(eta_input), MOREAU_FIELD(eta_feature), MOREAU_FIELD(groups), MOREAU_FIELD(x), MOREAU_FIELD(noise),
      MOREAU_FIELD(noisy), MOREAU_FIELD(statistics), MOREAU_FIELD(partials), MOREAU_FIELD(factors),
      MOREAU_FIELD(arrivals));
  add_partials<MOREAU_ON_BOTH(prox_step_partials), Extents>(m, "prox_step_partials", "extents");
}

void add_momentum_step(py::module_& m) {
  using Struct = MomentumStep;
  add_operation<MOREAU_ON_BOTH(momentum_step)>(
      m, "momentum_step", MOREAU_FIELD(phases), MOREAU_FIELD(dtype), MOREAU_FIELD(batch), MOREAU_FIELD(features),
      MOREAU_FIELD(y), MOREAU_FIELD(y_prev), MOREAU_FIELD(x), MOREAU_FIELD(x_prev), MOREAU_FIELD(gradient),
      MOREAU_FIELD(last_gradient), MOREAU_FIELD(last_step), MOREAU_FIELD(squares), MOREAU_FIELD(points),
      MOREAU_FIELD(gradients), MOREAU_FIELD(products), MOREAU_FIELD(sums), MOREAU_FIELD(statistics),
      MOREAU_FIELD(samples), MOREAU_FIELD(momentum), MOREAU_FIELD(first), MOREAU_FIELD(partials),
      MOREAU_FIELD(arrivals));
  add_partials<MOREAU_ON_BOTH(momentum_step_partials), int64_t>(m, "momentum_step_partials", "features");
}

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
  add_enumerations(m);
  add_extents(m);
  add_noise(m);
  add_groups(m);
  add_perturb(m);
  add_accumulate(m);
  add_group_norms(m);
  add_prox_step(m);
  add_momentum_step(m);
#ifdef MOREAU_CUDA
  m.def(
      "make_stream", [](int device) { return reinterpret_cast<Address>(cuda::make_stream(device)); },
      py::arg("device"));
#endif
}
