// The operators of fused_elbo/operators/levels.py: how they are called, what the kernels see of their tensors, and the
// tensors that they return.
#pragma once

#include <vector>

#include "inputs.h"
#include "operators.h"

namespace elbo {

// What both begin with.
struct LevelsInputs {
  std::vector<OptTensor> tensors;  // mu, logvar, prior_mu and prior_logvar of each level
  double free_bits;

  explicit LevelsInputs(Arguments& in) : tensors(in.next<std::vector<OptTensor>>()), free_bits(in.next<double>()) {}
};

struct LevelsCall : LevelsInputs {
  bool per_level;

  explicit LevelsCall(Arguments& in) : LevelsInputs(in), per_level(in.next<bool>()) {}
};

struct LevelsGradsCall : LevelsInputs {
  Tensor grad;                  // [batch], or [batch, levels]
  std::vector<int64_t> wanted;  // places in `tensors`

  explicit LevelsGradsCall(Arguments& in)
      : LevelsInputs(in), grad(in.next<Tensor>()), wanted(in.next<std::vector<int64_t>>()) {}

  // ∂L/∂ the rates of each level.
  std::vector<Number> grads() const {
    Number of_level;
    of_level.tensor = span_of(grad);
    std::vector<Number> all;
    for (size_t i = 0; i < tensors.size(); i += 4) {
      all.push_back(of_level);
      if (grad.dim() == 2) of_level.tensor.base += grad.stride(1) * of_level.tensor.itemsize;
    }
    return all;
  }
};

// The latents of each level, in an order in which they can be walked together.
struct Levels {
  std::vector<LatentInputs> inputs;
  std::vector<Latents> latents;
  int64_t batch;
  bool has_double = false;  // then all is computed in double

  explicit Levels(const LevelsInputs& call) : batch(call.tensors[0]->size(0)) {
    const auto& t = call.tensors;
    inputs.reserve(t.size() / 4);
    latents.reserve(t.size() / 4);
    for (size_t i = 0; i < t.size(); i += 4) {
      ElementOptions options;
      options.free_bits = call.free_bits;
      inputs.emplace_back(*t[i], *t[i + 1], t[i + 2], t[i + 3], options);
      latents.push_back(inputs.back().latents);
    }
    for (const OptTensor& one : t) has_double |= is_double(one);
  }

  int64_t count() const {
    return static_cast<int64_t>(latents.size());
  }

  Tensor empty(IntArrayRef sizes, IntArrayRef strides) const {
    return empty_strided(sizes, strides, has_double ? ScalarType::Double : ScalarType::Float, *inputs[0].mu);
  }

  // What `levels` returns.
  Tensor empty_rates(bool per_level) const {
    const int64_t each[] = {batch, count()}, strides[] = {count(), 1}, one = 1;
    return per_level ? empty({each, 2}, {strides, 2}) : empty({&batch, 1}, {&one, 1});
  }
};

// The gradients that are wanted: memory that the kernels write to, then the tensors to return.
class LevelsGradients {
 public:
  std::vector<Gradients> of_levels;

  LevelsGradients(const Levels& in, const LevelsGradsCall& call, MakeEmpty empty) : of_levels(in.latents.size()) {
    outputs_.reserve(call.wanted.size());
    for (int64_t i : call.wanted) {
      const Tensor& input = *call.tensors[i];
      outputs_.emplace_back(input, *in.inputs[i / 4].mu, input.scalar_type(), empty);
      Gradients& level = of_levels[i / 4];
      Span* const spans[] = {&level.mu, &level.logvar, &level.prior_mu, &level.prior_logvar};
      *spans[i % 4] = span_of(outputs_.back().written_to());
    }
  }

  std::vector<Tensor> finish() {
    std::vector<Tensor> results;
    results.reserve(outputs_.size());
    for (Output& output : outputs_) results.push_back(output.finish());
    return results;
  }

 private:
  std::vector<Output> outputs_;
};

}  // namespace elbo
