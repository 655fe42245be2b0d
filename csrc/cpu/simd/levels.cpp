#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/simd/kernels.h"

namespace fastmtl::cpu {
namespace {

bool runs_here(const Kernels& k) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (&k == &kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&k == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  return &k == &kPortable;
}

// best first
std::vector<const Kernels*> all() {
#if defined(__x86_64__)
  return {&kAvx512, &kAvx2, &kPortable};
#else
  return {&kPortable};
#endif
}

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
  for (const Kernels* k : all())
    if (runs_here(*k)) found.push_back(k);
  return found;
}

std::vector<std::string> names(const std::vector<const Kernels*>& levels) {
  std::vector<std::string> result;
  for (const Kernels* k : levels) result.emplace_back(k->name);
  return result;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* k : runnable())
    if (name == k->name) return k;
  std::string list;
  for (const Kernels* k : runnable()) list += std::string(list.empty() ? "" : ", ") + k->name;
  throw std::invalid_argument("CPU level: expected one of " + list + ", got '" + name + "'");
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> level = [] {
    const char* wanted = std::getenv("FASTMTL_CPU_LEVEL");
    return wanted && *wanted ? find(wanted) : runnable().front();
  }();
  return level;
}

}  // namespace

std::vector<std::string> compiled_levels() { return names(all()); }
std::vector<std::string> available_levels() { return names(runnable()); }
const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }
const PairKernels* pair_kernels() {
#if defined(__x86_64__)
  static const bool here = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") != 0;
  }();
  return here ? kernels().pairs : nullptr;
#else
  return nullptr;
#endif
}
void set_level(const std::string& name) { active() = find(name); }

}  // namespace fastmtl::cpu
