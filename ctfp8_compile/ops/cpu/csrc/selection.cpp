// The instruction set that runs: the best that this CPU has, or the one asked for; and torch's brgemm, where it has AMX tiles.
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>
#include <vector>

#include "dispatch.h"

namespace ctfp8 {
namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  for (const auto get : kAll) {
    if (const Kernels* kernels = get()) found.push_back(kernels);
  }
  return found;
}

Selection select(const std::string& name) {
  std::string names;
  const Kernels* chosen = nullptr;
  for (const Kernels* kernels : available()) {
    if (!chosen && (name.empty() || name == kernels->name)) chosen = kernels;
    if (chosen && kernels->item == 4) return {chosen, kernels};
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  TORCH_CHECK(false, "ctfp8: this CPU has no instruction set called '", name, "'; choose one of: ", names);
}

}  // namespace

Selection& selection() {
  static Selection chosen = select(std::getenv("CTFP8_CPU_ISA") ? std::getenv("CTFP8_CPU_ISA") : "");
  return chosen;
}

namespace {

// torch's brgemm multiplies with AMX tiles where they exist; elsewhere our own kernel is no slower.
void torch_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, const void* a, const void* b,
                  float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, false, static_cast<const at::BFloat16*>(a),
                              static_cast<const at::BFloat16*>(b), c);
}

bool brgemm_used = false;

bool has_brgemm() {
  try {
    const uint16_t a[32] = {}, b[32 * 16] = {};
    float c[16];
    torch_brgemm(1, 16, 32, 32, 16, 16, a, b, c);
    at::native::cpublas::brgemm_release();
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

// False where torch has no such brgemm for this CPU.
bool use_brgemm(bool use) {
  brgemm_used = use && avx512_bf16() && has_brgemm();
  set_brgemm(brgemm_used ? &torch_brgemm : nullptr);
  return brgemm_used == use;
}

}  // namespace

void release_brgemm() {
  if (brgemm_used) at::native::cpublas::brgemm_release();
}

namespace {

// Asks the CPU, then the system for the permission to use tiles.
bool has_amx() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile) && at::cpu::init_amx();
#else
  return false;
#endif
}

const bool amx = has_amx() && use_brgemm(true);

void set_isa(std::string name) { selection() = select(name); }
std::string isa() { return selection().bf16->name + std::string(brgemm_used && selection().bf16->item == 2 ? "+amx" : ""); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace
}  // namespace ctfp8

TORCH_LIBRARY(ctfp8_cpu, m) {
  m.def("isa() -> str", &ctfp8::isa);
  m.def("isas() -> str[]", &ctfp8::isas);
  m.def("threads() -> int", &ctfp8::threads);
  m.def("set_isa(str name) -> ()", &ctfp8::set_isa);
  m.def("use_brgemm(bool use) -> bool", &ctfp8::use_brgemm);
}
