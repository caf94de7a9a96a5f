// The aggregate posterior: log-sums over the components of a mixture, for every z and every dimension of it.
//
// The time goes into an exp for each (z, component, dimension). So the components lie side by side, dimension after
// dimension, and a vector has one dimension of several components: then any number of dimensions fills it, and the sum
// over dimensions, for the joint density, needs no sum over lanes. A block of components stays in the second-level
// cache while many z pass over it.
//
// All sums go by numbers that the sizes decide, and never by the threads.
#include "aggregate.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tasks.h"

namespace elbo {
namespace {

constexpr int64_t kColumns = 128;    // components of a block
constexpr int64_t kRows = 16;        // z of a task of the forward pass
constexpr int64_t kParts = 8;        // into which the z, and the blocks, are cut at most for the backward pass
constexpr int64_t kWorth = 1 << 14;  // of z × components × dimensions, a thread of their own

template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

int64_t up_to(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Calls f(task) for all of them.
template <class F>
void in_parallel(int64_t tasks, int64_t work, F f) {
  const int64_t shares = std::clamp<int64_t>(work / kWorth, 1, tasks);
  torch::stable::parallel_for(0, tasks, (tasks + shares - 1) / shares, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

template <class A>
std::vector<A> read_matrix(const Matrix& m) {
  std::vector<A> values(m.rows * m.columns);
  for (int64_t i = 0; i < m.rows; ++i) {
    A* row = values.data() + i * m.columns;
    if (m.stride == 1) {
      const A* direct = read(m.span, i, 0, m.columns, row);
      if (direct != row) std::copy_n(direct, m.columns, row);
    } else {
      for (int64_t k = 0; k < m.columns; ++k) row[k] = *read(m.span, i, k * m.stride, 1, row + k);
    }
  }
  return values;
}

// value(i, k), a double, into every place.
template <class F>
void write_matrix(const Matrix& m, F value) {
  with_floating(m.span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t k = 0; k < m.columns; ++k) {
        const double exact = value(i, k);
        convert(&exact, as<T>(m.span, i, k * m.stride), 1);
      }
    }
  });
}

// The components, transposed: [latents, padded]. What pads them has density 0 everywhere.
template <class A>
struct Components {
  int64_t count, latents, padded;
  std::vector<A> mu, half_precision, constant;

  Components(const Matrix& means, const Matrix& logvars)
      : count(means.rows),
        latents(means.columns),
        padded(up_to(count, kGroupBytes / sizeof(A))),
        mu(latents * padded, A(0)),
        half_precision(latents * padded, A(1)),
        constant(latents * padded, kMinusInfinity<A>) {
    const std::vector<A> m = read_matrix<A>(means), l = read_matrix<A>(logvars);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t k = 0; k < latents; ++k) {
        const Component<A> one = component(m[j * latents + k], l[j * latents + k]);
        const int64_t at = k * padded + j;
        mu[at] = one.mu, half_precision[at] = one.half_precision, constant[at] = one.constant;
      }
    }
  }

  template <class N>
  ELBO_INLINE auto at(int64_t k, int64_t j, N lanes) const {
    const int64_t i = k * padded + j;
    const auto m = load(mu.data() + i, lanes);
    return Component<std::decay_t<decltype(m)>>{
        m, load(half_precision.data() + i, lanes), load(constant.data() + i, lanes)};
  }

  // Calls f(first, n) for the blocks in [begin, end).
  template <class F>
  void for_blocks_in(int64_t begin, int64_t end, F f) const {
    for (int64_t first = begin; first < end; first += kColumns) f(first, std::min(kColumns, end - first));
  }
};

// All that both passes read, in the compute type.
template <class A>
struct Reading {
  std::vector<A> z;
  Components<A> components;
  int64_t batch, latents, own;
  double log_others;
  A own_excess;  // of a component's own weight, as a logarithm

  explicit Reading(const MixtureOf& of)
      : z(read_matrix<A>(of.z)),
        components(of.mu, of.logvar),
        batch(of.z.rows),
        latents(of.z.columns),
        own(of.own),
        log_others(of.log_weights.others),
        own_excess(static_cast<A>(of.log_weights.own - of.log_weights.others)) {}

  int64_t work() const {
    return batch * latents * components.padded;
  }

  // Log-weights of a block for one z, less log_others.
  ELBO_INLINE void weigh(int64_t i, int64_t first, int64_t n, A* weights) const {
    std::fill_n(weights, n, A(0));
    const int64_t j = own + i - first;
    if (own >= 0 && 0 <= j && j < n) weights[j] = own_excess;
  }
};

// Σ exp of what was added, as exp(most) · sum.
template <class A>
struct LogSum {
  A most = kMinusInfinity<A>;
  double sum = 0;

  // n values, of which these lanes hold the greatest.
  ELBO_INLINE void add(const A* values, int64_t n, Vector<A> greatest) {
    const A shift = raise(greatest);
    sum += sum_lanes<A, kAbreast<A>>(
        n, [&](int64_t j, auto lanes) { return exp_of_negative(load(values + j, lanes) - shift); });
  }

  // Makes `most` as great as any of these lanes, and returns what is subtracted from what is added then. Apart from the
  // loops, like `log`, for it compares single numbers.
  __attribute__((noinline)) A raise(Vector<A> lanes) {
    A next = most;
    for (int64_t k = 0; k < kLanes<A>; ++k) next = lanes[k] > next ? lanes[k] : next;
    if (next != most && sum != 0) sum *= std::exp(static_cast<double>(most - next));
    most = next;
    return next == kMinusInfinity<A> ? A(0) : next;
  }

  // NaN is no number's maximum, but it is in the sum.
  __attribute__((noinline)) double log(double log_weight) const {
    if (most == kMinusInfinity<A> && !std::isnan(sum)) return most;
    return log_weight + most + std::log(sum);
  }
};

// What one z adds to its log-sums in one block.
template <class A>
void add_block(const Reading<A>& in, int64_t i, int64_t first, int64_t n, LogSum<A>& joint, LogSum<A>* marginals) {
  using V = Vector<A>;
  A weights[kColumns], of_all[kColumns], of_one[kColumns];
  in.weigh(i, first, n, weights);
  std::copy_n(weights, n, of_all);
  for (int64_t k = 0; k < in.latents; ++k) {
    const V z = V{} + in.z[i * in.latents + k];
    V most = V{} + kMinusInfinity<A>;
    for_lanes<A>(n, [&](int64_t j, auto lanes) {
      const V one = log_normal<V>(z, in.components.at(k, first + j, lanes)), weighted = one + load(weights + j, lanes);
      store(of_all + j, load(of_all + j, lanes) + one, lanes);
      store(of_one + j, weighted, lanes);
      most = weighted > most ? weighted : most;
    });
    marginals[k].add(of_one, n, most);
  }
  V most = V{} + kMinusInfinity<A>;
  for_lanes<A>(n, [&](int64_t j, auto lanes) {
    const V v = load(of_all + j, lanes);
    most = v > most ? v : most;
  });
  joint.add(of_all, n, most);
}

// Sums of gradients over a part of the z, or of the components.
template <class A>
struct Parts {
  int64_t rows, columns;      // into how many parts the z and the components are cut
  std::vector<double> z;      // [columns, batch, latents]
  std::vector<A> mu, logvar;  // [rows, latents, padded]

  explicit Parts(const Reading<A>& in)
      : rows(std::min(kParts, (in.batch + kRows - 1) / kRows)),
        columns(std::min(kParts, (in.components.padded + kColumns - 1) / kColumns)),
        z(columns * in.z.size(), 0.0),
        mu(rows * in.components.mu.size(), A(0)),
        logvar(rows * in.components.mu.size(), A(0)) {}
};

// Of one z: what comes in, and its log-sums less log_others.
template <class A>
struct Incoming {
  std::vector<A> joint, marginals, grad_joint, grad_marginals;

  Incoming(const Reading<A>& in, const SumsGiven& given)
      : joint(read_matrix<A>(given.joint)), marginals(read_matrix<A>(given.marginals)) {
    for (A& value : joint) value = static_cast<A>(value - in.log_others);
    for (A& value : marginals) value = static_cast<A>(value - in.log_others);
    if (given.grad_joint) grad_joint = read_matrix<A>(given.grad_joint);
    if (given.grad_marginals) grad_marginals = read_matrix<A>(given.grad_marginals);
  }
};

// What one z, in one block, adds to the gradients: to those of the block's components at mu and logvar, [latents,
// padded] from the block's first one on, and to its own.
template <bool Joint, bool Marginals, class A>
void add_gradients(
    const Reading<A>& in, const Incoming<A>& coming, int64_t i, int64_t first, int64_t n, double* of_z, A* of_mu,
    A* of_logvar) {
  using V = Vector<A>;
  const int64_t latents = in.latents, padded = in.components.padded;
  A weights[kColumns], factors[kColumns];
  in.weigh(i, first, n, weights);
  if constexpr (Joint) {
    std::copy_n(weights, n, factors);
    for (int64_t k = 0; k < latents; ++k) {
      const V z = V{} + in.z[i * latents + k];
      for_lanes<A>(n, [&](int64_t j, auto lanes) {
        store(factors + j, load(factors + j, lanes) + log_normal<V>(z, in.components.at(k, first + j, lanes)), lanes);
      });
    }
    for_lanes<A, kAbreast<A>>(n, [&](int64_t j, auto lanes) {
      store(factors + j, coming.grad_joint[i] * exp_of_negative(load(factors + j, lanes) - coming.joint[i]), lanes);
    });
  }
  for (int64_t k = 0; k < latents; ++k) {
    const int64_t at = i * latents + k;
    const V z = V{} + in.z[at];
    const A log_sum = coming.marginals[at], grad = Marginals ? coming.grad_marginals[at] : A(0);
    A *const to_mu = of_mu + k * padded, *const to_logvar = of_logvar + k * padded;
    of_z[k] -= sum_lanes<A, kAbreast<A>>(n, [&](int64_t j, auto lanes) {
      const auto d = log_normal_grad(repeated(z, lanes), in.components.at(k, first + j, lanes));
      auto factor = Joint ? load(factors + j, lanes) : repeated(V{}, lanes);
      if constexpr (Marginals) {
        factor = factor + grad * exp_of_negative(d.log_normal + load(weights + j, lanes) - log_sum);
      }
      const auto half = factor * d.half_mu, of_mean = half + half;
      store(to_mu + j, load(to_mu + j, lanes) + of_mean, lanes);
      store(to_logvar + j, load(to_logvar + j, lanes) + factor * d.logvar, lanes);
      return of_mean;
    });
  }
}

template <bool Joint, bool Marginals, class A>
void add_all(const Reading<A>& in, const Incoming<A>& coming, Parts<A>& parts) {
  const int64_t padded = in.components.padded, latents = in.latents;
  const int64_t blocks = (padded + kColumns - 1) / kColumns;
  in_parallel(parts.rows * parts.columns, in.work(), [&](int64_t task) {
    const int64_t row = task / parts.columns, column = task % parts.columns;
    const int64_t begin = blocks * column / parts.columns * kColumns;
    const int64_t end = std::min(padded, blocks * (column + 1) / parts.columns * kColumns);
    in.components.for_blocks_in(begin, end, [&](int64_t first, int64_t n) {
      const int64_t to = row * latents * padded + first;
      for (int64_t i = in.batch * row / parts.rows; i < in.batch * (row + 1) / parts.rows; ++i) {
        double* const of_z = parts.z.data() + (column * in.batch + i) * latents;
        add_gradients<Joint, Marginals>(in, coming, i, first, n, of_z, parts.mu.data() + to, parts.logvar.data() + to);
      }
    });
  });
}

}  // namespace

template <class A>
void aggregate(const MixtureOf& mixture, const Matrix& joint, const Matrix& marginals) {
  const Reading<A> in(mixture);
  in_parallel((in.batch + kRows - 1) / kRows, in.work(), [&](int64_t task) {
    const int64_t begin = task * kRows, rows = std::min(kRows, in.batch - begin), latents = in.latents;
    std::vector<LogSum<A>> of_all(rows), of_each(rows * latents);
    in.components.for_blocks_in(0, in.components.padded, [&](int64_t first, int64_t n) {
      for (int64_t i = 0; i < rows; ++i) {
        add_block(in, begin + i, first, n, of_all[i], of_each.data() + i * latents);
      }
    });
    A* const to_joint = as<A>(joint.span, begin, 0);
    A* const to_marginals = as<A>(marginals.span, begin, 0);
    for (int64_t i = 0; i < rows; ++i) to_joint[i] = static_cast<A>(of_all[i].log(in.log_others));
    for (int64_t i = 0; i < rows * latents; ++i) to_marginals[i] = static_cast<A>(of_each[i].log(in.log_others));
  });
}

template <class A>
void aggregate_grads(const MixtureOf& mixture, const SumsGiven& given, const MixtureGradients& gradients) {
  const Reading<A> in(mixture);
  const Incoming<A> coming(in, given);
  Parts<A> parts(in);
  if (given.grad_joint && given.grad_marginals) {
    add_all<true, true>(in, coming, parts);
  } else if (given.grad_joint) {
    add_all<true, false>(in, coming, parts);
  } else if (given.grad_marginals) {
    add_all<false, true>(in, coming, parts);
  }
  const auto total = [](const auto& of_parts, int64_t count, int64_t at) {
    const int64_t size = static_cast<int64_t>(of_parts.size()) / count;
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += of_parts[part * size + at];
    return sum;
  };
  const int64_t latents = in.latents, padded = in.components.padded;
  if (gradients.z) {
    write_matrix(gradients.z, [&](int64_t i, int64_t k) { return total(parts.z, parts.columns, i * latents + k); });
  }
  const auto write_components = [&](const Matrix& to, const std::vector<A>& of_parts) {
    if (to) write_matrix(to, [&](int64_t j, int64_t k) { return total(of_parts, parts.rows, k * padded + j); });
  };
  write_components(gradients.mu, parts.mu);
  write_components(gradients.logvar, parts.logvar);
}

template void aggregate<float>(const MixtureOf&, const Matrix&, const Matrix&);
template void aggregate<double>(const MixtureOf&, const Matrix&, const Matrix&);
template void aggregate_grads<float>(const MixtureOf&, const SumsGiven&, const MixtureGradients&);
template void aggregate_grads<double>(const MixtureOf&, const SumsGiven&, const MixtureGradients&);

}  // namespace elbo
