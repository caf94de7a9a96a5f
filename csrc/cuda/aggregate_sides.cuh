// The two sides of the aggregate posterior, points and components: what is read of an element, and what the loops are
// told of it.
#pragma once

#include <limits>

#include "aggregate.h"
#include "device.cuh"

namespace elbo {

struct AggregateArguments {
  MixtureOf mixture;
  SumsGiven given;  // for the gradients
  AggregateCut cut;
  void* fields;    // what a lane has of each latent, where it does not fit on chip
  void* partials;  // of each segment
};

// In fp32 by one instruction after a product, with a relative error of 2^-22, and 0 for what is below 2^-126.
__device__ inline float exp_of_negative(float x) {
  const float bits = x * 1.44269504088896340736f;
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(bits));
  return y;
#else
  return ::exp2f(bits);
#endif
}

__device__ inline double exp_of_negative(double x) {
  return ::exp(x);
}

// --------------------------------------------------------------------------------------- what is known of an element

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// row: where it begins, in elements
template <class T, class A>
__device__ inline A value(const Matrix& m, int64_t row, int column) {
  return static_cast<A>(reinterpret_cast<const T*>(m.span.base)[row + column * m.stride]);
}

// In pairs, so that few wait for one another.
template <int Step, int N, class A, class F>
__device__ inline A in_pairs(A (&x)[N], F f) {
  if constexpr (Step > 0) {
#pragma unroll
    for (int k = 0; k < Step; ++k) x[k] = f(x[k], x[k + Step]);
    return in_pairs<Step / 2>(x, f);
  } else {
    return x[0];
  }
}

template <int N, class A>
__device__ inline A sum_of(A (&x)[N]) {
  return in_pairs<N / 2>(x, [](A a, A b) { return a + b; });
}

template <int N, class A>
__device__ inline A most_of(A (&x)[N]) {
  return in_pairs<N / 2>(x, [](A a, A b) { return max(a, b); });
}

// A log-sum without the log-weight that most components have.
template <class A>
__device__ inline A less_weight(A log_sum, const MixtureOf& mixture) {
  return log_sum - static_cast<A>(mixture.log_weights.others);
}

// One latent of a z: its gradient, and its log-sum without that weight.
template <class A>
struct Point {
  A z, grad, log_sum;
};

// The sides: where an element's latents begin, what is read of one, and what the loops are told of it.
template <class A>
struct Points {
  using Record = Point<A>;
  const AggregateArguments& args;
  bool with_marginals;  // else z alone is read

  struct Row {
    int64_t z, grad, log_sum;
  };
  struct Read {
    A z, grad, log_sum;
  };

  __device__ int64_t count() const {
    return args.mixture.z.rows;
  }

  __device__ Row row(int64_t i) const {
    const auto from = [&](const Matrix& m) { return i * m.span.batch_stride; };
    return {from(args.mixture.z), from(args.given.grad_marginals), from(args.given.marginals)};
  }

  template <class T>
  __device__ Read read(const Row& at, int k) const {
    const A z = value<T, A>(args.mixture.z, at.z, k);
    if (!with_marginals) return {z, A(0), A(0)};
    return {z, value<A, A>(args.given.grad_marginals, at.grad, k), value<A, A>(args.given.marginals, at.log_sum, k)};
  }

  __device__ Record record(const Read& read) const {
    return {read.z, read.grad, less_weight(read.log_sum, args.mixture)};
  }

  // Of no weight with any component.
  static __device__ Record none() {
    return {A(0), A(0), kInfinity<A>};
  }
};

template <class A>
struct Components {
  using Record = Component<A>;
  const AggregateArguments& args;

  struct Row {
    int64_t mu, logvar;
  };
  struct Read {
    A mu, logvar;
  };

  __device__ int64_t count() const {
    return args.mixture.mu.rows;
  }

  __device__ Row row(int64_t j) const {
    return {j * args.mixture.mu.span.batch_stride, j * args.mixture.logvar.span.batch_stride};
  }

  template <class T>
  __device__ Read read(const Row& at, int k) const {
    return {value<T, A>(args.mixture.mu, at.mu, k), value<T, A>(args.mixture.logvar, at.logvar, k)};
  }

  __device__ Record record(const Read& read) const {
    return component(read.mu, read.logvar);
  }

  // Of density 0, for an infinite z too.
  static __device__ Record none() {
    return {A(0), A(1), -kInfinity<A>};
  }
};

template <class Side>
__device__ inline typename Side::Record record_of(const Side& side, int64_t i, int k) {
  if (i >= side.count()) return Side::none();
  typename Side::Read read;
  with_floating(side.args.mixture.z.span.dtype, [&](auto* type) {
    read = side.template read<std::remove_pointer_t<decltype(type)>>(side.row(i), k);
  });
  return side.record(read);
}

// Of a lane's record and another's, in whichever order.
template <class A>
__device__ inline const Point<A>& point_of(const Point<A>& p, const Component<A>&) {
  return p;
}

template <class A>
__device__ inline const Point<A>& point_of(const Component<A>&, const Point<A>& p) {
  return p;
}

template <class A>
__device__ inline LogNormalGrad<A> log_normal_grad(const Point<A>& p, const Component<A>& c) {
  return log_normal_grad(p.z, c);
}

template <class A>
__device__ inline LogNormalGrad<A> log_normal_grad(const Component<A>& c, const Point<A>& p) {
  return log_normal_grad(p.z, c);
}

}  // namespace elbo
