#include "aggregate.cuh"

#include "aggregate_grads.cuh"

namespace elbo {

namespace {

// fields: of a lane and a latent. sums: of one of the lanes' side's elements.
template <class A>
AggregateLaunch launch_of(int64_t lanes, int64_t others, int64_t latents, int64_t fields, int64_t sums) {
  AggregateLaunch l = {aggregate_cut(lanes, others, latents, kAggregateTile<A>), 0, 0, 0};
  l.partials = l.cut.segments * lanes * sums;
  const int64_t of_block = l.cut.groups * fields * latents * kPitch, size = sizeof(A);
  const int64_t room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_cast<int64_t>(sizeof(Shared<A>));
  if (of_block * size <= room) {
    l.shared_bytes = of_block * size;
  } else {
    l.fields = of_block * l.cut.blocks();
  }
  return l;
}

// For a function of a null pointer of the compute type.
template <class F>
auto with_compute_type(bool is_double, F f) {
  return is_double ? f(static_cast<double*>(nullptr)) : f(static_cast<float*>(nullptr));
}

template <class A>
void run(
    const char* name, void (*kernel)(AggregateArguments), AggregateArguments args, const AggregateLaunch& l,
    A* workspace, cudaStream_t stream) {
  args.cut = l.cut;
  args.partials = workspace;
  args.fields = l.fields ? workspace + l.partials : nullptr;
  allow_shared(kernel, l.shared_bytes);
  launch(name, kernel, args, l.cut.blocks(), l.cut.threads(), stream, l.shared_bytes);
}

// As many for a sum as have some eight of its parts each.
int32_t lanes_for(int64_t parts) {
  int32_t lanes = 1;
  while (lanes < kWarpSize && parts > lanes * 8) lanes *= 2;
  return lanes;
}

template <class Arguments>
void run_sums(const char* name, void (*kernel)(Arguments), const Arguments& args, int64_t rows, cudaStream_t stream) {
  launch(name, kernel, args, blocks_for(rows, blocks_at_once(kernel, kThreads, 0)), kThreads, stream);
}

}  // namespace

AggregateLaunch aggregate_launch(const MixtureOf& mixture, bool is_double) {
  const int64_t latents = mixture.z.columns;
  return with_compute_type(is_double, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    return launch_of<A>(mixture.z.rows, mixture.mu.rows, latents, kLogSumFields, 2 * (latents + 1));
  });
}

AggregateGradsLaunches aggregate_grads_launches(
    const MixtureOf& mixture, bool is_double, const MixtureGradients& wanted) {
  const int64_t latents = mixture.z.columns, batch = mixture.z.rows, components = mixture.mu.rows;
  return with_compute_type(is_double, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    AggregateGradsLaunches launches = {};
    if (wanted.z) {
      launches.of_points = launch_of<A>(batch, components, latents, fields_of<OfPoints<A>>, latents);
    }
    if (wanted.mu || wanted.logvar) {
      launches.of_components = launch_of<A>(components, batch, latents, fields_of<OfComponents<A>>, 2 * latents);
    }
    return launches;
  });
}

void aggregate(
    const MixtureOf& mixture, bool is_double, const AggregateLaunch& l, void* workspace, const Matrix& joint,
    const Matrix& marginals, cudaStream_t stream) {
  with_compute_type(is_double, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    A* const partials = static_cast<A*>(workspace);
    run("aggregate", aggregate_kernel<A>, {mixture, {}, {}, nullptr, nullptr}, l, partials, stream);
    const int64_t segments = l.cut.segments;
    const LogSumsArguments sums = {segments, lanes_for(segments), mixture.log_weights.others, partials, joint,
                                   marginals};
    run_sums("aggregate_sums", aggregate_sums_kernel<A>, sums, marginals.rows, stream);
  });
}

void aggregate_grads(
    const MixtureOf& mixture, const SumsGiven& given, bool is_double, const AggregateGradsLaunches& launches,
    void* workspace, const MixtureGradients& gradients, cudaStream_t stream) {
  if (launches.workspace() == 0) return;
  with_compute_type(is_double, [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const AggregateLaunch &of_points = launches.of_points, &of_components = launches.of_components;
    const AggregateArguments args = {mixture, given, {}, nullptr, nullptr};
    A* const points = static_cast<A*>(workspace);
    A* const components = points + of_points.workspace();
    GradSumsArguments sums = {};
    int64_t most = 0;
    if (gradients.z) {
      const auto kernel = aggregate_grads_kernel<A, OfPoints<A>>;
      run("aggregate_grads of z", kernel, args, of_points, points, stream);
      sums.each[0] = {points, of_points.cut.segments, -2, gradients.z};
      most = of_points.cut.segments;
    }
    if (gradients.mu || gradients.logvar) {
      const auto kernel = aggregate_grads_kernel<A, OfComponents<A>>;
      run("aggregate_grads of mu and logvar", kernel, args, of_components, components, stream);
      const int64_t segments = of_components.cut.segments;
      const A* const of_logvar = components + of_components.partials / 2;
      if (gradients.mu) sums.each[1] = {components, segments, 2, gradients.mu};
      if (gradients.logvar) sums.each[2] = {of_logvar, segments, 1, gradients.logvar};
      most = std::max(most, segments);
    }
    sums.lanes = lanes_for(most);
    const int64_t rows = std::max(gradients.z.rows, std::max(gradients.mu.rows, gradients.logvar.rows));
    run_sums("aggregate_grad_sums", aggregate_grad_sums_kernel<A>, sums, rows, stream);
  });
}

}  // namespace elbo
