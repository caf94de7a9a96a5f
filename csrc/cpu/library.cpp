// Registers the operators of one instruction set, chosen when the library is loaded.
//
// Everything else in this folder is compiled once for each instruction set that the library is made for, and its
// namespace elbo renamed to elbo_baseline, elbo_avx2 or elbo_avx512. ELBO_ISAS lists them, the narrowest first:
// ISA(baseline) ISA(avx2) …; fused_elbo/build/spec.py has the flags. This file is compiled for any machine.
#include "../errors.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

#define ISA(name)                                                      \
  namespace elbo_##name {                                              \
    void register_operators(torch::stable::detail::StableLibrary & m); \
  }
ELBO_ISAS
#undef ISA

namespace {

using torch::stable::detail::StableLibrary;

struct Isa {
  const char* name;
  const char* capability;  // what ATEN_CPU_CAPABILITY, PyTorch's switch, calls it
  bool runs_here;
  void (*register_operators)(StableLibrary&);
};

namespace baseline {
constexpr const char* capability = "default";
bool runs_here() {
  return true;
}
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2 {
constexpr const char* capability = "avx2";
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // what has these has f16c
}
}  // namespace avx2

namespace avx512 {
constexpr const char* capability = "avx512";
bool runs_here() {
  return avx2::runs_here() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace avx512
#endif

// The widest that runs here and that PyTorch's switch allows. A library for one instruction set is made for its
// machine.
Isa chosen_isa() {
  const char* allowed = std::getenv("ATEN_CPU_CAPABILITY");
#define ISA(name) Isa{#name, name::capability, name::runs_here(), &elbo_##name::register_operators},
  const Isa isas[] = {ELBO_ISAS};
#undef ISA
  Isa chosen = isas[0];
  for (const Isa& isa : isas) {
    if (isa.runs_here) chosen = isa;
    if (allowed && std::strcmp(allowed, isa.capability) == 0) break;
  }
  return chosen;
}

const Isa kChosen = chosen_isa();

}  // namespace

// For the doctor.
extern "C" __attribute__((visibility("default"))) const char* fused_elbo_cpu_isa() {
  return kChosen.name;
}

STABLE_TORCH_LIBRARY_IMPL(fused_elbo, CPU, m) {
  kChosen.register_operators(m);
}
