// Registers the operators of one instruction set, chosen when the library is loaded.
//
// Everything else in this folder is compiled once for each instruction set that the library is made for, and its
// namespace elbo renamed to elbo_baseline, elbo_avx2 or elbo_avx512. ELBO_LEVELS lists them, the narrowest first:
// LEVEL(baseline) LEVEL(avx2) …; fused_elbo/build/spec.py has the flags. This file is compiled for any machine.
#include "../errors.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

#define LEVEL(name)                                                    \
  namespace elbo_##name {                                              \
    void register_operators(torch::stable::detail::StableLibrary & m); \
  }
ELBO_LEVELS
#undef LEVEL

namespace {

using torch::stable::detail::StableLibrary;

struct Level {
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
Level chosen_level() {
  const char* allowed = std::getenv("ATEN_CPU_CAPABILITY");
#define LEVEL(name) Level{#name, name::capability, name::runs_here(), &elbo_##name::register_operators},
  const Level levels[] = {ELBO_LEVELS};
#undef LEVEL
  Level chosen = levels[0];
  for (const Level& level : levels) {
    if (level.runs_here) chosen = level;
    if (allowed && std::strcmp(allowed, level.capability) == 0) break;
  }
  return chosen;
}

const Level kChosen = chosen_level();

}  // namespace

// For the doctor.
extern "C" __attribute__((visibility("default"))) const char* fused_elbo_cpu_level() {
  return kChosen.name;
}

STABLE_TORCH_LIBRARY_IMPL(fused_elbo, CPU, m) {
  kChosen.register_operators(m);
}
