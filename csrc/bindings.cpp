// The module divqat._C. The ops themselves go through the dispatcher: a Registration registers this
// build's kernels for one device, and removes them when it is destroyed.
#include <ATen/Parallel.h>
#include <c10/core/DispatchKey.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "cpu/fake_quantize_weights_plan.h"
#include "cpu/instruction_set.h"
#include "register.h"
#ifdef DIVQAT_CUDA
#include "cuda/launchers.h"
#endif

namespace py = pybind11;

namespace divqat {
namespace {

class Registration {
 public:
  explicit Registration(const std::string& device)
      : library_(std::make_unique<torch::Library>(torch::Library::IMPL, "divqat", key(device),
                                                  __FILE__, __LINE__)) {
    if (device == "cpu") register_cpu(*library_);
#ifdef DIVQAT_CUDA
    if (device == "cuda") register_cuda(*library_);
#endif
  }
  void remove() { library_.reset(); }

 private:
  static c10::DispatchKey key(const std::string& device) {
    if (device == "cpu") return c10::DispatchKey::CPU;
#ifdef DIVQAT_CUDA
    if (device == "cuda") return c10::DispatchKey::CUDA;
#endif
    throw py::value_error("device: this build has no kernels for " + device);
  }
  std::unique_ptr<torch::Library> library_;
};

// Copies with the threads of the CPU kernels: the benchmark of their bandwidth.
void copy_cpu(uintptr_t to, uintptr_t from, int64_t bytes) {
  py::gil_scoped_release release;
  at::parallel_for(0, bytes, 1 << 16, [&](int64_t begin, int64_t end) {
    std::memcpy((char*)to + begin, (const char*)from + begin, size_t(end - begin));
  });
}

// The number of threads that run a parallel loop of this module.
int threads() {
  std::set<std::thread::id> ids;
  std::mutex mutex;
  py::gil_scoped_release release;
  at::parallel_for(0, 1024, 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  return int(ids.size());
}

// The per-tensor loop alone, without allocation, dispatcher and autograd.
void bench_fake_quantize(uintptr_t x, uintptr_t y, uintptr_t mask, int64_t n, float scale,
                       float zero_point, float quant_min, float quant_max) {
  py::gil_scoped_release release;
  const float inv_scale = 1.0f / scale;
  const QuantizeParams params{&scale, &inv_scale, &zero_point, 1, n, quant_min, quant_max, true};
  const auto kernel = instruction_set().f32.fake_quantize;
  at::parallel_for(0, (n + kMaskWord - 1) / kMaskWord, 256, [&](int64_t begin, int64_t end) {
    kernel((const float*)x, (float*)y, (uint8_t*)mask, begin * kMaskWord,
           std::min(end * kMaskWord, n), params, QuantizeMode::kPropagateNan);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of divqat: registration, how they were built, hooks for tests.";
  m.attr("torch_version") = TORCH_VERSION;
#ifdef DIVQAT_CUDA
  m.attr("cuda_version") = DIVQAT_CUDA;
  m.attr("cuda_architectures") = DIVQAT_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_architectures") = "";
#endif

  py::class_<Registration>(m, "Registration",
                           "Kernels for a device, in the dispatcher while this lives.")
      .def(py::init<const std::string&>(), py::arg("device"))
      .def("remove", &Registration::remove, "Take the kernels out again.");

  m.def("instruction_sets", &instruction_sets,
        "Names of the CPU kernels that this machine runs, best first.");
  m.def("instruction_set", [] { return instruction_set().name; }, "The CPU kernels in use.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"),
        "Take other CPU kernels from now on, in every thread.");

  py::class_<WeightTask>(m, "WeightTask")
      .def_readonly("weight", &WeightTask::weight)
      .def_readonly("row_begin", &WeightTask::row_begin)
      .def_readonly("row_end", &WeightTask::row_end);
  py::class_<WeightsPlan>(m, "WeightsPlan", "How the rows of many weights are split into tasks.")
      .def(py::init([](const std::vector<std::pair<int64_t, int64_t>>& shapes, int64_t elements) {
             std::vector<WeightShape> weights;
             for (const auto& [rows, columns] : shapes) weights.push_back({rows, columns});
             return WeightsPlan(weights, elements);
           }),
           py::arg("shapes"), py::arg("elements"))
      .def_property_readonly("tasks", &WeightsPlan::tasks);

  m.def("threads", &threads,
        "Threads of the CPU kernels' parallel loops; torch.set_num_threads sets them.");
  m.def("copy_cpu", &copy_cpu, py::arg("to"), py::arg("from_"), py::arg("bytes"),
        "Copy between two addresses with the kernels' threads.");
  m.def("fake_quantize_cpu", &bench_fake_quantize, py::arg("x"), py::arg("y"), py::arg("mask"),
        py::arg("n"), py::arg("scale"), py::arg("zero_point"), py::arg("quant_min"),
        py::arg("quant_max"), "The bare loop over float32 addresses.");
#ifdef DIVQAT_CUDA
  m.def("launch_count", &cuda::launch_count, "CUDA kernels launched by this module so far.");
  m.def("copy_cuda", [](uintptr_t to, uintptr_t from, int64_t bytes, uintptr_t stream) {
          cuda::copy((void*)to, (const void*)from, bytes, (cudaStream_t)stream);
        }, py::arg("to"), py::arg("from_"), py::arg("bytes"), py::arg("stream"),
        "Copy on the device with this build's loads and stores.");
#endif
}

}  // namespace divqat
