// The CUDA kernels, compiled for the CPU, as a Python module: registration like that of divqat._C,
// and what the tests turn and look at.
#include <c10/core/DispatchKey.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "../../csrc/cuda/launchers.h"
#include "../../csrc/register.h"
#include "emulator.h"
#include "probes.h"

namespace py = pybind11;

namespace {

// The CUDA kernels under another device's dispatch key, whose tensors they then get.
class Registration {
 public:
  explicit Registration(const std::string& device) {
    if (device != "cpu") throw py::value_error("device: wanted cpu, got " + device);
    library_ = std::make_unique<torch::Library>(torch::Library::IMPL, "divqat",
                                                c10::DispatchKey::CPU, __FILE__, __LINE__);
    divqat::register_cuda(*library_);
  }
  void remove() { library_.reset(); }

 private:
  std::unique_ptr<torch::Library> library_;
};

}  // namespace

PYBIND11_MODULE(cuda_emulated, m) {
  py::class_<Registration>(m, "Registration", "The kernels in the dispatcher while this lives.")
      .def(py::init<const std::string&>(), py::arg("device"))
      .def("remove", &Registration::remove, "Take the kernels out again.");
  m.def("launch_count", &divqat::cuda::launch_count, "Kernels launched so far.");
  m.def("set_capturing", &emulator::set_capturing, py::arg("capturing"),
        "Whether the stream says that a graph is being captured.");
  m.def("set_cooperative", &emulator::set_cooperative, py::arg("cooperative"),
        "Whether the device has cooperative launches.");
  m.def("set_crowded", &emulator::set_crowded, py::arg("crowded"),
        "Whether cooperative launches are too large, as others hold multiprocessors.");
  m.def("set_seed", &emulator::set_seed, py::arg("seed"),
        "Start the orders of blocks and threads over.");
  m.def("counters_are_zero", &emulator::symbols_are_zero,
        "Whether the launches left device variables as they found them.");
  m.def("probe", &probe, py::arg("name"), "Run one of the emulator's own kernels.");
}
