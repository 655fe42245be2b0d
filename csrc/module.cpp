// fastmtl._C: what was built. Tensors go through torch's dispatcher only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"

#define FASTMTL_TEXT_(x) #x
#define FASTMTL_TEXT(x) FASTMTL_TEXT_(x)

namespace fastmtl::cuda {
#if defined(FASTMTL_WITH_CUDA)
std::vector<int> architectures();
std::vector<std::string> kernels();
#else
inline std::vector<int> architectures() { return {}; }
inline std::vector<std::string> kernels() { return {}; }
#endif
}  // namespace fastmtl::cuda

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastmtl.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["cpu_levels"] = fastmtl::cpu::compiled_levels();
        info["cuda_architectures"] = fastmtl::cuda::architectures();
        info["cuda_kernels"] = fastmtl::cuda::kernels();
        info["compiler"] = __VERSION__;
        info["torch_target"] = FASTMTL_TEXT(TORCH_TARGET_VERSION);
        return info;
      },
      "What was compiled: CPU vector levels (best first), CUDA architectures (80: sm_80) and kernels, compiler, torch "
      "ABI.");
  m.def("cpu_level", [] { return std::string(fastmtl::cpu::kernels().name); }, "The vector level in use.");
  m.def("available_cpu_levels", &fastmtl::cpu::available_levels, "The compiled levels that this CPU can run.");
  m.def("set_cpu_level", &fastmtl::cpu::set_level, pybind11::arg("name"),
        "Chooses the vector level for this process; ValueError if this CPU can't run it.");
}
