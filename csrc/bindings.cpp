// pybind11: integers to pointers, nothing else. Arguments are validated in Python (otalign/problem.py).
#include <pybind11/pybind11.h>

#include "cpu/blas.h"
#include "cpu/engine.h"
#include "cpu/pool.h"
#include "problem.h"
#ifdef OTALIGN_WITH_CUDA
#include "cuda/device.h"
#include "cuda/resident.h"
#endif

namespace py = pybind11;
using namespace otalign;

namespace {

// A pointer field as an integer attribute; 0 is null.
template <class Class, class Owner, class Pointer>
void address(py::class_<Class>& type, const char* name, Pointer Owner::* field) {
  type.def_property(
      name, [field](const Class& self) { return reinterpret_cast<uintptr_t>(self.*field); },
      [field](Class& self, uintptr_t value) { self.*field = reinterpret_cast<Pointer>(value); });
}

template <class Class, class Enum>
void choice(py::class_<Class>& type, const char* name, Enum Class::* field) {
  type.def_property(
      name, [field](const Class& self) { return static_cast<int>(self.*field); },
      [field](Class& self, int value) { self.*field = static_cast<Enum>(value); });
}

bool interrupted(void*) {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

// Runs without the GIL; a Ctrl-C stops it between items.
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

PYBIND11_MODULE(_C, module) {
  py::class_<Side> side(module, "Side");
  side.def(py::init([] { return Side{}; }));
  address(side, "lengths", &Side::lengths);
  address(side, "starts", &Side::starts);
  side.def_readwrite("size", &Side::size).def_readwrite("rows", &Side::rows);
  address(side, "points", &Side::points);
  choice(side, "points_type", &Side::points_type);
  side.def_readwrite("item_stride", &Side::item_stride).def_readwrite("row_stride", &Side::row_stride);
  address(side, "weights", &Side::weights);
  address(side, "potential", &Side::potential);
  address(side, "mass", &Side::mass);
  address(side, "scale", &Side::scale);

  py::class_<Problem> problem(module, "Problem");
  problem.def(py::init([] { return Problem{}; }))
      .def_readwrite("items", &Problem::items)
      .def_readwrite("dim", &Problem::dim)
      .def_readwrite("is_double", &Problem::is_double)
      .def_readonly("x", &Problem::x)
      .def_readonly("y", &Problem::y)
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
      .def_readwrite("rho_x", &Problem::rho_x)
      .def_readwrite("rho_y", &Problem::rho_y)
      .def_readwrite("max_iter", &Problem::max_iter)
      .def_readwrite("tol", &Problem::tol)
      .def_readwrite("symmetric", &Problem::symmetric)
      .def_readwrite("capacity", &Problem::capacity)
      .def_readwrite("threads", &Problem::threads)
      .def_readwrite("reg_of_all", &Problem::reg_of_all)
      .def_readwrite("pitch", &Problem::pitch)
      .def_property_readonly("itself", [](const Problem& p) { return reinterpret_cast<uintptr_t>(&p); });
  choice(problem, "cost", &Problem::cost);
  choice(problem, "given_type", &Problem::given_type);
  choice(problem, "prior", &Problem::prior);
  address(problem, "given", &Problem::given);
  address(problem, "reg", &Problem::reg);
  address(problem, "init", &Problem::init);
  address(problem, "plan", &Problem::plan);
  address(problem, "distance", &Problem::distance);
  address(problem, "value", &Problem::value);
  address(problem, "linear", &Problem::linear);
  address(problem, "error", &Problem::error);
  address(problem, "n_iter", &Problem::n_iter);
  address(problem, "scratch", &Problem::scratch);

  py::class_<Gradients> gradients(module, "Gradients");
  gradients.def(py::init([] { return Gradients{}; }));
  address(gradients, "value", &Gradients::value);
  address(gradients, "linear", &Gradients::linear);
  address(gradients, "plan", &Gradients::plan);
  address(gradients, "x", &Gradients::x);
  address(gradients, "y", &Gradients::y);
  address(gradients, "given", &Gradients::given);
  address(gradients, "a", &Gradients::a);
  address(gradients, "b", &Gradients::b);

  py::class_<Lifts> lifts(module, "Lifts");
  lifts.def(py::init([] { return Lifts{}; }))
      .def_readwrite("linear_step", &Lifts::linear_step)
      .def_property_readonly("itself", [](const Lifts& l) { return reinterpret_cast<uintptr_t>(&l); });
  address(lifts, "linear", &Lifts::linear);
  address(lifts, "plan", &Lifts::plan);
  address(lifts, "x", &Lifts::x);
  address(lifts, "y", &Lifts::y);

  module.def("cpu_forward", [](const Problem& p) { run([&](Poll poll) { return cpu::forward(p, poll); }); });
  module.def("cpu_backward",
             [](const Problem& p, const Gradients& g) { run([&](Poll poll) { return cpu::backward(p, g, poll); }); });
  module.def("cpu_unpack", [](const Problem& p, uintptr_t packed, uintptr_t dense) {
    const py::gil_scoped_release release;
    cpu::unpack(p, reinterpret_cast<const void*>(packed), reinterpret_cast<void*>(dense));
  });
  module.def("cpu_pack", [](const Problem& p, uintptr_t dense, uintptr_t packed) {
    const py::gil_scoped_release release;
    cpu::pack(p, reinterpret_cast<const void*>(dense), reinterpret_cast<void*>(packed));
  });

  py::class_<Block>(module, "Block", py::buffer_protocol()).def(py::init<size_t>()).def_buffer([](Block& block) {
    return py::buffer_info(static_cast<uint8_t*>(block.data()), static_cast<py::ssize_t>(block.size()));
  });
  module.def("pool_idle", &pool_idle);

  module.def("use_blas", [](const std::string& name, uintptr_t sgemm, uintptr_t dgemm, uintptr_t limit,
                            uintptr_t threads, uintptr_t set_threads) {
    use_blas(name.c_str(), reinterpret_cast<void*>(sgemm), reinterpret_cast<void*>(dgemm),
             reinterpret_cast<void*>(limit), reinterpret_cast<void*>(threads), reinterpret_cast<void*>(set_threads));
  });
  module.def("blas", [] { return std::string(blas_name()); });
  module.attr("simd") = isa().name;
  module.attr("compiler") = OTALIGN_COMPILER;
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
#ifdef OTALIGN_WITH_CUDA
  module.attr("cuda_reason") = "";
#else
  module.attr("cuda_reason") = OTALIGN_CUDA_REASON;
#endif
#ifdef OTALIGN_WITH_CUDA
  module.def("cuda_scratch", [](const Problem& p, bool lift, int device) {
    cuda::Choice choice;
    int64_t scratch = 0;
    check(cuda::plan(p, lift, device, &choice, &scratch));
    return scratch;
  });
  module.def("cuda_choice", [](const Problem& p, bool lift, int device) {
    cuda::Choice choice;
    int64_t scratch = 0;
    check(cuda::plan(p, lift, device, &choice, &scratch));
    const cuda::Form& form = cuda::kForms[choice.form];
    py::dict out;
    out["form"] = py::make_tuple(form.width, form.lanes, form.rows, form.warps);
    out["cluster"] = choice.cluster;
    out["in_flight"] = choice.in_flight;
    out["shared"] = choice.shared;
    out["far"] = cuda::far_rows(choice, p.x.size);
    out["bytes"] = choice.bytes;
    return out;
  });
  module.def("cuda_solve", [](const Problem& p, int device, uintptr_t stream, bool wait) {
    const py::gil_scoped_release release;
    check(cuda::solve(p, device, reinterpret_cast<void*>(stream), wait));
  });
  module.def("cuda_lift", [](const Problem& p, const Lifts& lifts, int device, uintptr_t stream, bool wait) {
    const py::gil_scoped_release release;
    check(cuda::lift(p, lifts, device, reinterpret_cast<void*>(stream), wait));
  });
#endif
  module.def("cuda_devices", [] {
    py::list out;
#ifdef OTALIGN_WITH_CUDA
    int runtime = 0, driver = 0, count = 0;
    check(cuda::versions(&runtime, &driver, &count));
    for (int index = 0; index < count; ++index) {
      cuda::Device device;
      check(cuda::device(index, &device));
      out.append(py::make_tuple(std::string(device.name), device.major, device.minor, device.memory));
    }
#endif
    return out;
  });
}
