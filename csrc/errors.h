// How a failure of PyTorch's C functions reaches the user: in PyTorch's words.
//
// PyTorch's headers check what these functions return by a macro that, for the oldest release that we are compiled for,
// throws its own source text. This file puts another in its place. It comes before PyTorch's other headers, whose
// inline functions use the macro too.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// The message of the calling thread's last failure. Only torch 2.13 and newer have it; else it is null when we are
// loaded.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace elbo_errors {

inline bool has_message() {
  return torch_exception_get_what_without_backtrace != nullptr;
}

// `call` is the source text of the call, which begins with the function's name.
[[noreturn]] __attribute__((noinline)) inline void failed(const char* call) {
  if (has_message()) throw std::runtime_error(torch_exception_get_what_without_backtrace());
  const std::string text = call;
  throw std::runtime_error(
      "PyTorch's " + text.substr(0, text.find('(')) + " failed; it wrote why to the standard error stream");
}

// Calls f, which takes so much memory and can fail for want of it alone. Trainers know such a failure by these words,
// as PyTorch has them.
template <class F>
auto taking(int64_t bytes, bool on_cpu, F f) {
  try {
    return f();
  } catch (const std::runtime_error&) {
    if (has_message()) throw;
    const std::string what =
        on_cpu ? "DefaultCPUAllocator: can't allocate memory: you tried" : "CUDA out of memory. Tried";
    throw std::runtime_error(what + " to allocate " + std::to_string(bytes) + " bytes.");
  }
}

}  // namespace elbo_errors

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    elbo_errors::failed(#call);      \
  }
