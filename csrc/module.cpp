// fastmtl._C: what was built, and the few calls that small layers make past torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/gradients/straight.h"
#include "cpu/python_tensors.h"
#include "cpu/simd/kernels.h"
#include "cpu/task_weights/straight.h"
#include "cuda/gradients/plan.h"
#include "cuda/task_weights/launcher.h"

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

namespace {

// as plain functions of C: pybind11's call takes longer than some of them
template <auto function>
PyCFunction fast() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
PyMethodDef straight_calls[] = {
    {"has_variable", &fastmtl::cpu::has_variable, METH_O, nullptr},
    {"all_closed", fast<&fastmtl::cpu::all_closed>(), METH_FASTCALL, nullptr},
    {"task_batch_norm_given", fast<&fastmtl::cpu::task_batch_norm_given>(), METH_FASTCALL, nullptr},
    {"gram_bank", fast<&fastmtl::cpu::gram_bank>(), METH_FASTCALL, nullptr},
    {"combine_bank", fast<&fastmtl::cpu::combine_bank>(), METH_FASTCALL, nullptr},
    {"pcgrad_bank", fast<&fastmtl::cpu::pcgrad_bank>(), METH_FASTCALL, nullptr},
    {"task_conv_few", fast<&fastmtl::cpu::task_conv_few>(), METH_FASTCALL, nullptr},
    {"task_conv_few_backward", fast<&fastmtl::cpu::task_conv_few_backward>(), METH_FASTCALL, nullptr},
    {"task_conv_launch", fast<&fastmtl::cuda::task_conv_launch>(), METH_FASTCALL, nullptr},
    {"task_conv_launch_backward", fast<&fastmtl::cuda::task_conv_launch_backward>(), METH_FASTCALL, nullptr},
    {"task_layer_fits", fast<&fastmtl::cuda::task_layer_fits>(), METH_FASTCALL, nullptr},
    {"task_conv_refusal", fast<&fastmtl::cuda::task_conv_refusal>(), METH_FASTCALL, nullptr},
    {"use_conv_functions", &fastmtl::cuda::use_conv_functions, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastmtl.";
  fastmtl::cpu::set_up_tensors();
  if (PyModule_AddFunctions(m.ptr(), straight_calls) != 0) throw pybind11::error_already_set();
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
  m.def(
      "multiplies_pairs", [] { return fastmtl::cpu::pair_kernels() != nullptr; },
      "Whether that level and this CPU multiply bfloat16 in pairs (AVX512-BF16).");
  m.def("available_cpu_levels", &fastmtl::cpu::available_levels, "The compiled levels that this CPU can run.");
  m.def("set_cpu_level", &fastmtl::cpu::set_level, pybind11::arg("name"),
        "Chooses the vector level for this process; ValueError if this CPU can't run it.");
  m.def(
      "cuda_plan",
      [](int64_t columns, int num_tasks, int num_out) {
        namespace cuda = fastmtl::cuda;
        if (columns < 1 || num_tasks < 1 || num_tasks > 128 || num_out < 1)
          throw pybind11::value_error("expected at least one column and one result, and 1 to 128 tasks");
        const cuda::Slots gram = cuda::gram_slots(columns, num_tasks);
        const cuda::CombineCut combine = cuda::combine_cut(columns, num_tasks, num_out);
        pybind11::dict plan;
        plan["gram_columns"] = gram.columns;
        plan["gram_slots"] = gram.count;
        plan["blocks_per_slot"] = cuda::blocks_per_slot(num_tasks);
        plan["slots_per_group"] = cuda::slots_per_group(num_tasks, gram.count);
        plan["combine_columns"] = combine.slots.columns;
        plan["combine_slots"] = combine.slots.count;
        plan["combine_split"] = combine.split;
        return plan;
      },
      pybind11::arg("columns"), pybind11::arg("num_tasks"), pybind11::arg("num_out"),
      "How the CUDA kernels cut one launch of a call, with or without CUDA: columns of a slot and number of slots, of "
      "both kernels.");
}
