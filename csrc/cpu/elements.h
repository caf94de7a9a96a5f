// What is done to a block of data where its elements have something of their own: a σ, a weight, or an activation
// before them. Whatever is read with them is converted first, into scratch that stays in the first-level cache.
#pragma once

#include "elbo.h"
#include "results.h"
#include "tasks.h"

namespace elbo {

// Calls f(lanes' x̂ and ∂x̂/∂y) for each vector of y.
template <class A, class F>
inline void for_activated(int64_t activation, const A* y, int64_t n, F f) {
  if (activation == kSigmoid) {
    for_lanes<A, kAbreast<A>>(n, [&](int64_t i, auto lanes) { f(i, lanes, sigmoid(load(y + i, lanes))); });
  } else {
    for_lanes<A, kAbreast<A>>(n, [&](int64_t i, auto lanes) { f(i, lanes, hyperbolic_tangent(load(y + i, lanes))); });
  }
}

// x̂ of a block; and to `slopes`, where there is an activation, ∂x̂/∂y, if it is not null.
template <class A>
inline const A* read_recon(const Data& data, int64_t sample, int64_t first, int64_t n, A* scratch, A* slopes) {
  const A* y = read(data.recon, sample, first, n, scratch);
  if (data.activation == kNoActivation) return y;
  if (slopes == nullptr) {
    for_activated<A>(data.activation, y, n, [&](int64_t i, auto lanes, auto x) { store(scratch + i, x.value, lanes); });
  } else {
    for_activated<A>(data.activation, y, n, [&](int64_t i, auto lanes, auto x) {
      store(scratch + i, x.value, lanes);
      store(slopes + i, x.slope, lanes);
    });
  }
  return scratch;
}

template <class A>
inline const A* read_target(const Data& data, int64_t sample, int64_t first, int64_t n, A* scratch) {
  const A* x = read(data.target, sample, first, n, scratch);
  if (data.target.dtype != ScalarType::Byte) return x;
  const A step = static_cast<A>(data.target_step), low = static_cast<A>(data.target_low);
  for_lanes<A>(n, [&](int64_t i, auto lanes) {
    store(scratch + i, scaled_byte<Vector<A>>(load(x + i, lanes), step, low), lanes);
  });
  return scratch;
}

// Whether a block is more than two arrays of numbers to compare.
inline bool has_elements(const Data& data) {
  return data.has_log_sigma || data.has_weight;
}

inline bool has_factors(const Data& data) {
  return data.has_weight || data.activation != kNoActivation;
}

// n elements of a sample, of at most kBlock. log_sigma, weight and slope (∂x̂/∂y) are null where all are alike.
template <class A>
struct DataBlock {
  A scratch[5][kBlock];
  const A *recon, *target, *log_sigma, *weight, *slope;

  DataBlock(const Data& data, int64_t sample, int64_t first, int64_t n, bool with_slope)
      : recon(read_recon(data, sample, first, n, scratch[0], with_slope ? scratch[4] : nullptr)),
        target(read_target(data, sample, first, n, scratch[1])),
        log_sigma(data.has_log_sigma ? read_broadcast(data.log_sigma, sample, first, n, scratch[2]) : nullptr),
        weight(data.has_weight ? read_broadcast(data.weight, sample, first, n, scratch[3]) : nullptr),
        slope(with_slope && data.activation != kNoActivation ? scratch[4] : nullptr) {}

  DataBlock(const DataBlock&) = delete;

  template <class N>
  ELBO_INLINE auto error(int64_t i, N lanes) const {
    return difference(load(recon + i, lanes), load(target + i, lanes));
  }
};

// Σ of a block: of |e|^q, or q times the distortion where σ is an element's own; and of the weights.
struct BlockSums {
  double a = 0, weights = 0;

  void operator+=(const BlockSums& other) {
    a += other.a;
    weights += other.weights;
  }
};

template <class A, int Q>
inline BlockSums block_sums(const DataBlock<A>& block, int64_t n) {
  const auto of = [&](int64_t i, auto lanes) {
    const auto e = block.error(i, lanes);
    return block.log_sigma ? scaled_error<Q>(e, load(block.log_sigma + i, lanes)) : power<Q>(e);
  };
  BlockSums sums;
  if (block.weight == nullptr) {
    sums.a = sum_lanes<A, kAbreast<A>>(n, of);
  } else {
    sums.a = sum_lanes<A, kAbreast<A>>(
        n, [&](int64_t i, auto lanes) { return weighted(load(block.weight + i, lanes), of(i, lanes)); });
    sums.weights = sum_lanes<A>(n, [&](int64_t i, auto lanes) { return load(block.weight + i, lanes); });
  }
  return sums;
}

template <class A, int Q>
inline BlockSums element_sums(const Data& data, int64_t sample, int64_t chunk) {
  BlockSums sums;
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    sums += block_sums<A, Q>(DataBlock<A>(data, sample, first, n, false), n);
  });
  return sums;
}

// The gradients of a block, a being its sample's factor. Own: σ is an element's own. Factors: there may be weights, and
// ∂x̂/∂y. `log_sigma(first, n, block)` is given the gradient of a block of log σ where no tensor takes it.
template <class A, int Q, bool Own, bool Factors, class F>
inline void block_gradient(
    const DataBlock<A>& block, A a, int64_t sample, int64_t first, int64_t n, const Gradients& out, F log_sigma) {
  using V = Vector<A>;
  const Span* const wanted[] = {&out.recon, &out.target, &out.element_log_sigma};
  A results[3][kBlock];
  const V factor = V{} + a;
  const auto lie = write_block<kAbreast<A>>(
      wanted, results, sample, first, n, out.past_caches, [&](int64_t i, auto lanes, auto places) {
        const auto e = block.error(i, lanes);
        const auto factors = repeated(factor, lanes);
        DistortionGrad<std::decay_t<decltype(e)>> g;
        if constexpr (Own) {
          g = distortion_grad<Q>(factors, e, load(block.log_sigma + i, lanes));
        } else {
          g.recon = scaled_slope<Q>(factors, e);
        }
        auto y = g.recon;
        if constexpr (Factors) {
          if (block.slope) y = y * load(block.slope + i, lanes);
          if (block.weight) {
            const auto m = load(block.weight + i, lanes);
            y = weighted(m, y);
            g.recon = weighted(m, g.recon);
            if constexpr (Own) g.log_sigma = weighted(m, g.log_sigma);
          }
        }
        places.put(0, i, y, lanes);
        places.put(1, i, -g.recon, lanes);
        if constexpr (Own) places.put(2, i, g.log_sigma, lanes);
      });
  if constexpr (Own) {
    if (!out.element_log_sigma.base) log_sigma(first, n, lie.at[2]);
  }
}

template <class A, int Q, class F>
inline void element_gradient(const Data& data, A a, int64_t sample, int64_t chunk, const Gradients& out, F log_sigma) {
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    const DataBlock<A> block(data, sample, first, n, true);
    const auto gradient = [&](auto own, auto factors) {
      block_gradient<A, Q, decltype(own)::value, decltype(factors)::value>(block, a, sample, first, n, out, log_sigma);
    };
    if (!data.has_log_sigma) return gradient(std::false_type{}, std::true_type{});
    has_factors(data) ? gradient(std::true_type{}, std::true_type{}) : gradient(std::true_type{}, std::false_type{});
  });
}

}  // namespace elbo
