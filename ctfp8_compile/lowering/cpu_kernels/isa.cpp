// Chooses the instruction set when the library is loaded: the best this CPU has, or the one CTFP8_CPU_ISA names.
#include <cstdlib>

#include "matmul.h"

namespace ctfp8 {
namespace {

bool has_amx() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

std::vector<Isa> available() {
  std::vector<Isa> found;
  if (const Bf16Kernels* bf16 = avx512_bf16_kernels())
    found.push_back({avx512_kernels(), bf16, has_amx(), has_amx() ? "avx512-vbmi-bf16+amx" : "avx512-vbmi-bf16"});
  for (const FloatKernels* floats : {avx512_kernels(), avx2_kernels(), portable_kernels()})
    if (floats) found.push_back({floats, nullptr, false, floats->name});
  return found;
}

Isa& chosen() {
  static Isa isa = [] {
    const char* wanted = std::getenv("CTFP8_CPU_ISA");
    for (const Isa& one : available())
      if (!wanted || !*wanted || one.name == wanted) return one;
    return available().front();  // a CPU without it: build.py says so, a C++ process goes on with the best
  }();
  return isa;
}

}  // namespace

const Isa& isa() { return chosen(); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& one : available()) names.push_back(one.name);
  return names;
}

bool choose_isa(const std::string& name) {
  for (const Isa& one : available())
    if (name.empty() || one.name == name) {
      chosen() = one;
      return true;
    }
  return false;
}

}  // namespace ctfp8
