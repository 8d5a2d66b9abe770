// pybind11: turns integers into memory, and nothing else. Arguments are validated in Python (otalign/problem.py). The
// CPU engine checks the sizes of its memory before it reads or writes (cpu/batch.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "cpu/blas.h"
#include "cpu/engine.h"
#include "cpu/fork.h"
#include "cpu/pool.h"
#include "cuda/arguments.h"
#include "problem.h"
#ifdef OTALIGN_WITH_CUDA
#include "cuda/launch.h"
#include "cuda/query.h"
#endif

namespace py = pybind11;
using namespace otalign;
using cuda::Adjoints;
using cuda::CudaProblem;
using cuda::CudaSide;

namespace {

// Memory as a pair: its address, 0 = null, and its size in bytes. Nothing checks the address.
template <class Class, class... Base, class T>
void memory(py::class_<Class, Base...>& type, const char* name, Span<T> Class::* field) {
  type.def_property(
      name,
      [field](const Class& self) {
        return py::make_tuple(reinterpret_cast<uintptr_t>((self.*field).data), (self.*field).bytes);
      },
      [field](Class& self, const std::pair<uintptr_t, int64_t>& value) {
        self.*field = {reinterpret_cast<T*>(value.first), value.second};
      });
}

// An enumeration as the index of its member.
template <class Class, class... Base, class Enum>
void choice(py::class_<Class, Base...>& type, const char* name, Enum Class::* field, Enum last) {
  type.def_property(
      name, [field](const Class& self) { return static_cast<int>(self.*field); },
      [name, field, last](Class& self, int value) {
        if (value < 0 || value > static_cast<int>(last))
          throw py::value_error(std::string(name) + ": no member has the index " + std::to_string(value));
        self.*field = static_cast<Enum>(value);
      });
}

bool interrupted(void*) {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Calls without the GIL; Ctrl-C stops the call.
template <class F>
void run(F call) {
  bool finished;
  {
    const py::gil_scoped_release release;
    finished = call(Poll{&interrupted, nullptr});
  }
  if (!finished) throw py::error_already_set();
}

#ifdef OTALIGN_WITH_CUDA
void check(const char* error) {
  if (error) throw std::runtime_error(error);
}
#endif

}  // namespace

// The static methods `new` do what constructors do. If a constructor has no memory to register its object, pybind11
// throws a C++ exception through the interpreter.
PYBIND11_MODULE(_C, module) {
  py::class_<Options>(module, "Options")
      .def_readwrite("rho_x", &Options::rho_x)
      .def_readwrite("rho_y", &Options::rho_y)
      .def_readwrite("max_iter", &Options::max_iter)
      .def_readwrite("tol", &Options::tol)
      .def_readwrite("accelerate", &Options::accelerate);

  py::class_<Side> side(module, "Side");
  side.def(py::init([] { return Side{}; })).def_static("new", [] { return Side{}; });
  memory(side, "lengths", &Side::lengths);
  memory(side, "starts", &Side::starts);
  side.def_readwrite("size", &Side::size).def_readwrite("rows", &Side::rows);
  memory(side, "points", &Side::points);
  choice(side, "points_type", &Side::points_type, Scalar::f16);
  side.def_readwrite("item_stride", &Side::item_stride).def_readwrite("row_stride", &Side::row_stride);
  memory(side, "weights", &Side::weights);
  memory(side, "potential", &Side::potential);
  memory(side, "mass", &Side::mass);
  memory(side, "scale", &Side::scale);
  memory(side, "exponent", &Side::exponent);

  py::class_<Problem, Options> problem(module, "Problem");
  problem.def(py::init([] { return Problem{}; }))
      .def_static("new", [] { return Problem{}; })
      .def_readwrite("items", &Problem::items)
      .def_readwrite("dim", &Problem::dim)
      .def_readwrite("is_double", &Problem::is_double)
      .def_readwrite("x", &Problem::x)
      .def_readwrite("y", &Problem::y)
      .def_property(
          "given_strides",
          [](const Problem& p) { return py::make_tuple(p.given_strides[0], p.given_strides[1], p.given_strides[2]); },
          [](Problem& p, const py::tuple& strides) {
            for (int k = 0; k < 3; ++k) p.given_strides[k] = strides[k].cast<int64_t>();
          })
      .def_property(
          "prior_parameters",
          [](const Problem& p) { return py::make_tuple(p.prior_parameters[0], p.prior_parameters[1]); },
          [](Problem& p, const py::tuple& parameters) {
            for (int k = 0; k < 2; ++k) p.prior_parameters[k] = parameters[k].cast<double>();
          })
      .def_readwrite("symmetric", &Problem::symmetric)
      .def_readwrite("capacity", &Problem::capacity)
      .def_readwrite("threads", &Problem::threads);
  choice(problem, "cost", &Problem::cost, Cost::given);
  choice(problem, "given_type", &Problem::given_type, Scalar::f16);
  choice(problem, "prior", &Problem::prior, PriorKind::band);
  memory(problem, "given", &Problem::given);
  memory(problem, "reg", &Problem::reg);
  memory(problem, "init", &Problem::init);
  memory(problem, "plan", &Problem::plan);
  memory(problem, "distance", &Problem::distance);
  memory(problem, "value", &Problem::value);
  memory(problem, "linear", &Problem::linear);
  memory(problem, "error", &Problem::error);
  memory(problem, "n_iter", &Problem::n_iter);

  py::class_<Gradients> gradients(module, "Gradients");
  gradients.def(py::init([] { return Gradients{}; })).def_static("new", [] { return Gradients{}; });
  memory(gradients, "value", &Gradients::value);
  memory(gradients, "linear", &Gradients::linear);
  memory(gradients, "plan", &Gradients::plan);
  memory(gradients, "x", &Gradients::x);
  memory(gradients, "y", &Gradients::y);
  memory(gradients, "given", &Gradients::given);
  memory(gradients, "a", &Gradients::a);
  memory(gradients, "b", &Gradients::b);

  py::class_<CudaSide> cuda_side(module, "CudaSide");
  memory(cuda_side, "lengths", &CudaSide::lengths);
  memory(cuda_side, "starts", &CudaSide::starts);
  cuda_side.def_readwrite("size", &CudaSide::size).def_readwrite("rows", &CudaSide::rows);
  memory(cuda_side, "weights", &CudaSide::weights);
  memory(cuda_side, "potential", &CudaSide::potential);

  py::class_<CudaProblem, Options> cuda_problem(module, "CudaProblem");
  cuda_problem.def(py::init([] { return CudaProblem{}; }))
      .def_readwrite("items", &CudaProblem::items)
      .def_readonly("x", &CudaProblem::x)
      .def_readonly("y", &CudaProblem::y)
      .def_readwrite("reg_of_all", &CudaProblem::reg_of_all)
      .def_readwrite("pitch", &CudaProblem::pitch);
  memory(cuda_problem, "costs", &CudaProblem::costs);
  memory(cuda_problem, "reg", &CudaProblem::reg);
  memory(cuda_problem, "init", &CudaProblem::init);
  memory(cuda_problem, "value", &CudaProblem::value);
  memory(cuda_problem, "linear", &CudaProblem::linear);
  memory(cuda_problem, "error", &CudaProblem::error);
  memory(cuda_problem, "n_iter", &CudaProblem::n_iter);
  memory(cuda_problem, "scratch", &CudaProblem::scratch);

  py::class_<Adjoints> adjoints(module, "Adjoints");
  adjoints.def(py::init([] { return Adjoints{}; })).def_readwrite("linear_step", &Adjoints::linear_step);
  memory(adjoints, "linear", &Adjoints::linear);
  memory(adjoints, "plan", &Adjoints::plan);
  memory(adjoints, "x", &Adjoints::x);
  memory(adjoints, "y", &Adjoints::y);

  module.def("cpu_forward", [](const Problem& p) { run([&](Poll poll) { return cpu::forward(p, poll); }); });
  module.def("cpu_backward",
             [](const Problem& p, const Gradients& g) { run([&](Poll poll) { return cpu::backward(p, g, poll); }); });
  using Memory = std::pair<uintptr_t, int64_t>;
  module.def("cpu_unpack", [](const Problem& p, const Memory& dense) {
    run([&](Poll poll) { return cpu::unpack(p, {reinterpret_cast<void*>(dense.first), dense.second}, poll); });
  });
  module.def("cpu_pack", [](const Problem& p, const Memory& dense) {
    run([&](Poll poll) { return cpu::pack(p, {reinterpret_cast<const void*>(dense.first), dense.second}, poll); });
  });

  py::class_<PooledMemory>(module, "PooledMemory", py::buffer_protocol())
      .def_static("new", [](size_t size) { return PooledMemory(size); })
      .def_buffer([](PooledMemory& memory) {
        return py::buffer_info(static_cast<uint8_t*>(memory.data()), static_cast<py::ssize_t>(memory.size()));
      });

  module.def("use_blas", [](const std::string& name, uintptr_t sgemm, uintptr_t dgemm, uintptr_t limit,
                            uintptr_t threads, uintptr_t set_threads) {
    use_blas(name.c_str(), reinterpret_cast<void*>(sgemm), reinterpret_cast<void*>(dgemm),
             reinterpret_cast<void*>(limit), reinterpret_cast<void*>(threads), reinterpret_cast<void*>(set_threads));
  });
  module.def("set_forked", [] { is_child = true; });
  module.def("blas", [] { return std::string(blas_name()); });
  module.attr("simd") = isa().name;
  module.attr("compiler") = OTALIGN_COMPILER;
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
#ifndef OTALIGN_WITH_CUDA
  module.attr("cuda_reason") = OTALIGN_CUDA_REASON;
#else
  module.attr("cuda_reason") = "";
  module.attr("cuda_architectures") = OTALIGN_CUDA_ARCHS;
  module.def("cuda_versions", [] { return py::make_tuple(cuda::runtime_version(), cuda::driver_version()); });
  module.def("cuda_reason_missing", [](int device) -> std::optional<std::string> {
    const py::gil_scoped_release release;
    const char* reason = cuda::reason_missing(device);
    return reason ? std::optional<std::string>(reason) : std::nullopt;
  });
  module.def("cuda_scratch", [](const CudaProblem& p, bool adjoint, int device) {
    cuda::LaunchConfig config;
    int64_t scratch = 0;
    check(cuda::configure(p, adjoint, device, &config, &scratch));
    return scratch;
  });
  module.def("cuda_solve", [](const CudaProblem& p, int device, uintptr_t stream, bool wait) {
    const py::gil_scoped_release release;
    check(cuda::solve(p, device, reinterpret_cast<void*>(stream), wait));
  });
  module.def("cuda_adjoint",
             [](const CudaProblem& p, const Adjoints& adjoints, int device, uintptr_t stream, bool wait) {
               const py::gil_scoped_release release;
               check(cuda::solve_adjoint(p, adjoints, device, reinterpret_cast<void*>(stream), wait));
             });
#endif

  py::module_ testing = module.def_submodule("testing", "Hooks for tests and benchmarks only.");
  testing.def("address", [](const CudaProblem& p) { return reinterpret_cast<uintptr_t>(&p); });
  testing.def("address", [](const Adjoints& a) { return reinterpret_cast<uintptr_t>(&a); });
  testing.def("pool_idle", &pool_idle);
#ifdef OTALIGN_WITH_CUDA
  testing.def("cuda_config", [](const CudaProblem& p, bool adjoint, int device) {
    cuda::LaunchConfig config;
    int64_t scratch = 0;
    check(cuda::configure(p, adjoint, device, &config, &scratch));
    const cuda::TileShape& shape = cuda::kTileShapes[config.shape];
    py::dict out;
    out["shape"] = py::make_tuple(shape.width, shape.lanes, shape.rows, shape.warps);
    out["cluster"] = config.cluster;
    out["in_flight"] = config.in_flight;
    out["shared"] = config.shared;
    out["off_chip"] = cuda::off_chip_rows(config, p.x.size);
    out["bytes"] = config.bytes;
    return out;
  });
  testing.def("cuda_force", [](int shape, int cluster) { check(cuda::force(shape, cluster)); });
  testing.def("cuda_allow_early_launch", &cuda::allow_early_launch);
#endif
}
