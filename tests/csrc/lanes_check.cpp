// The element loops of csrc/cpu on made-up numbers, for whatever instruction set and compiler: conversions against
// PyTorch's own, exp against libm's, then a line for each loop with a hash of what it gave. The lines must be the same
// everywhere; tests/csrc/test_lanes.py compiles and runs this.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/latents.h"

namespace {

using namespace elbo;

template <class T>
T bits_of(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool same(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

[[noreturn]] void differs(const char* what, double at, double got, double expected) {
  std::printf("%s of %a is %a, not %a\n", what, at, got, expected);
  std::exit(1);
}

// ---------------------------------------------------------------------------------------------------- conversions, exp

// Every number of T, one vector and two at a time.
template <class T>
void check_widening(const char* name) {
  constexpr int64_t L = kLanes<float>;
  for (uint32_t first = 0; first < 65536; first += 2 * L) {
    T in[2 * L];
    for (int64_t k = 0; k < 2 * L; ++k) in[k] = bits_of<T>(first + k);
    float one[2 * L], two[2 * L];
    for (int64_t i = 0; i < 2 * L; i += L) store(one + i, load(in + i, AllLanes<float>{}), AllLanes<float>{});
    store_two<false>(two, in_order<T>(load_two(in)));
    for (int64_t k = 0; k < 2 * L; ++k) {
      const float expected = static_cast<float>(in[k]);
      if (!same(one[k], expected)) differs(name, first + k, one[k], expected);
      if (!same(two[k], expected)) differs(name, first + k, two[k], expected);
    }
  }
}

// Floats about every number of T: exact ones, halfway between two, and beside those.
template <class T>
void check_rounding(const char* name) {
  constexpr int64_t L = kLanes<float>;
  const uint32_t lower[] = {0,      1,      0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x5000,
                            0x7FFF, 0x8000, 0x8001, 0x9000, 0xB000, 0xD000, 0xF000, 0xFFFF};
  for (uint32_t upper = 0; upper < 65536; upper += 2 * L) {
    for (uint32_t low : lower) {
      float in[2 * L];
      T one[2 * L], two[2 * L];
      for (int64_t k = 0; k < 2 * L; ++k) in[k] = bits_of<float>((upper + k) << 16 | low);
      for (int64_t i = 0; i < 2 * L; i += L) store(one + i, load(in + i, AllLanes<float>{}), AllLanes<float>{});
      for (int64_t i = 0; i < 2 * L; ++i) {  // one number in all lanes, whose order then does not matter
        float all[L];
        std::fill_n(all, L, in[i]);
        T many[2 * L];
        store_two<false>(many, Two<Vector<float>>{load(all, L), load(all, L)});
        two[i] = many[i];
      }
      for (int64_t k = 0; k < 2 * L; ++k) {
        const float expected = static_cast<float>(T(in[k]));
        if (!same(one[k], expected)) differs(name, in[k], one[k], expected);
        if (!same(two[k], expected)) differs(name, in[k], two[k], expected);
      }
    }
  }
}

// A pair that is loaded and stored again is what it was.
template <class T>
void check_order(const char* name) {
  constexpr int64_t L = kLanes<float>;
  T in[2 * L], out[2 * L];
  for (int64_t k = 0; k < 2 * L; ++k) in[k] = T(static_cast<float>(k));
  store_two<false>(out, load_two(in));
  for (int64_t k = 0; k < 2 * L; ++k) {
    if (!same(out[k], in[k])) differs(name, k, out[k], in[k]);
  }
}

void check_bytes() {
  uint8_t in[256];
  for (int k = 0; k < 256; ++k) in[k] = static_cast<uint8_t>(k);
  for (int64_t first = 0; first < 256; ++first) {
    const int64_t lanes = std::min(kLanes<float>, 256 - first);
    const Vector<float> some = load(in + first, lanes);
    for (int64_t k = 0; k < kLanes<float>; ++k) {
      const float expected = k < lanes ? static_cast<float>(first + k) : 0;
      if (some[k] != expected) differs("byte", first + k, some[k], expected);
    }
  }
}

float lane(Vector<float> v) {
  return v[kLanes<float> - 1];
}

void check_exp() {
  for (float x = -110; x < 100; x += 0.00371f) {
    const float got = lane(Lanes<Vector<float>>::exp(Vector<float>{} + x)),
                expected = static_cast<float>(std::exp(double{x}));
    const bool right = expected < 1e-37f || std::isinf(expected)
                           ? std::fabs(got - expected) <= 1e-37f || got == expected
                           : std::fabs(got / expected - 1) < 2.5e-7f;
    if (!right) differs("exp", x, got, expected);
  }
  for (double x = -2; x < 2; x += 0.00037) {
    const float t = static_cast<float>(x);
    const double expected = std::expm1(double{t}), far = expected - t;
    if (std::fabs(lane(expm1(Vector<float>{} + t)) - expected) > 4e-7 * std::fabs(expected))
      differs("expm1", t, lane(expm1(Vector<float>{} + t)), expected);
    if (std::fabs(lane(expm1mx(Vector<float>{} + t)) - far) > 2e-6 * std::fabs(far) + 1e-14)
      differs("expm1mx", t, lane(expm1mx(Vector<float>{} + t)), far);
  }
  for (float x : {NAN, INFINITY, -INFINITY}) {
    const float got = lane(Lanes<Vector<float>>::exp(Vector<float>{} + x));
    if (!same(got, std::exp(x))) differs("exp", x, got, std::exp(x));
  }
}

// The same bits, whatever the numbers in the other lanes are, and whether two functions are computed at once or one.
void check_company() {
  using V = Vector<float>;
  for (float x = -86; x <= 86; x += 0.0137f) {
    const V a = V{} + x, plain = V{} + 0.7f;
    V with_large = a;
    with_large[0] = 500;
    const auto expect = [x](const char* what, V got, V expected) {
      if (!same(lane(got), lane(expected))) differs(what, x, lane(got), lane(expected));
    };
    expect("exp", Lanes<V>::exp(with_large), Lanes<V>::exp(a));
    expect("expm1", expm1(with_large), expm1(a));
    expect("expm1mx", expm1mx(with_large), expm1mx(a));
    for (const V& other : {plain, with_large}) {
      expect("exp beside expm1", exp_and_expm1(a, other).exp, Lanes<V>::exp(a));
      expect("exp beside expm1mx", exp_and_expm1mx(a, other).exp, Lanes<V>::exp(a));
      expect("expm1 beside exp", exp_and_expm1(other, a).other, expm1(a));
      expect("expm1mx beside exp", exp_and_expm1mx(other, a).other, expm1mx(a));
    }
  }
}

// Four vectors at once give what one gives, whatever the other three are.
void check_four() {
  using V = Vector<float>;
  for (float x = -86; x <= 86; x += 0.0137f) {
    const V a = V{} + x, large = V{} + 500.0f, plain = V{} + 0.7f;
    for (int k = 0; k < 4; ++k) {
      for (const V& other : {plain, large}) {
        const auto four = four_of([&](int j) { return j == k ? a : other; }), plains = repeated(plain, FourVectors{});
        const auto expect = [x, k](const char* what, const Four<V>& got, V expected) {
          if (!same(lane(got.of[k]), lane(expected))) differs(what, x, lane(got.of[k]), lane(expected));
        };
        expect("exp of four", Lanes<Four<V>>::exp(four), Lanes<V>::exp(a));
        expect("expm1 of four", expm1(four), expm1(a));
        expect("expm1mx of four", expm1mx(four), expm1mx(a));
        expect("exp beside expm1 of four", exp_and_expm1(four, plains).exp, Lanes<V>::exp(a));
        expect("expm1 of four beside exp", exp_and_expm1(plains, four).other, expm1(a));
        expect("exp beside expm1mx of four", exp_and_expm1mx(four, plains).exp, Lanes<V>::exp(a));
        expect("expm1mx of four beside exp", exp_and_expm1mx(plains, four).other, expm1mx(a));
      }
    }
  }
}

// f(x, y) over n elements four vectors at a time: the same results, and the same sum, as a vector at a time.
template <class F>
void check_abreast(const char* name, F f) {
  for (int64_t n : {1, 8, 31, 32, 33, 64, 95, 128, 129, 200, 1000}) {
    std::vector<float> x(n), y(n), each(n), four(n);
    for (int64_t i = 0; i < n; ++i) x[i] = (i * 37 % 101 - 50) * 0.04f, y[i] = i % 7 ? (i * 53 % 97 - 48) * 0.05f : 0;
    for (int64_t i = 3; n == 200 && i < n; i += 29) x[i] = i % 2 ? 90 : -95;  // beyond what is plain, in every place
    const auto at = [&](int64_t i, auto lanes) { return f(load(x.data() + i, lanes), load(y.data() + i, lanes)); };
    for_lanes<float>(n, [&](int64_t i, auto lanes) { store(each.data() + i, at(i, lanes), lanes); });
    for_lanes<float, true>(n, [&](int64_t i, auto lanes) { store(four.data() + i, at(i, lanes), lanes); });
    for (int64_t i = 0; i < n; ++i) {
      if (!same(each[i], four[i])) differs(name, x[i], four[i], each[i]);
    }
    const float sum = sum_lanes<float>(n, at), sum_of_fours = sum_lanes<float, true>(n, at);
    if (!same(sum, sum_of_fours)) differs(name, n, sum_of_fours, sum);
  }
}

void check_formulas_abreast() {
  check_abreast("kl", [](auto x, auto y) { return kl(y, x); });
  check_abreast("kl with prior", [](auto x, auto y) { return kl(y, x, x, y); });
  check_abreast("clamped kl", [](auto x, auto y) { return kl(y, clamped(x, -1, 1)); });
  check_abreast("kl_grad", [](auto x, auto y) { return kl_grad(x, y, x, y, x).prior_logvar; });
  check_abreast("clamped_grad", [](auto x, auto y) { return clamped_grad(x, y, -1, 1); });
  check_abreast("squares", [](auto x, auto y) { return scaled_error<2>(x, y); });
  check_abreast("magnitudes", [](auto x, auto y) { return scaled_error<1>(x, y); });
  check_abreast("square's gradient", [](auto x, auto y) { return distortion_grad<2>(x, y, y).log_sigma; });
  check_abreast("magnitude's gradient", [](auto x, auto y) { return distortion_grad<1>(x, y, y).recon; });
  check_abreast("weighted", [](auto x, auto y) { return weighted(y, x); });
  check_abreast("sigmoid", [](auto x, auto y) { return sigmoid(x).value * sigmoid(y).slope; });
  check_abreast("tanh", [](auto x, auto y) { return hyperbolic_tangent(x).value * hyperbolic_tangent(y).slope; });
}

// --------------------------------------------------------------------------------------------------------- the loops

struct Hash {
  uint64_t value = 14695981039346656037u;

  void add(const void* data, size_t bytes) {
    for (size_t k = 0; k < bytes; ++k) value = (value ^ static_cast<const unsigned char*>(data)[k]) * 1099511628211u;
  }
  void add(double x) {
    add(&x, sizeof x);
  }
};

template <class T>
struct Numbers {
  std::vector<T> values;
  int64_t dims;

  Numbers(int64_t batch, int64_t dims, uint32_t seed, float scale) : values(batch * dims), dims(dims) {
    for (T& value : values) {
      seed = seed * 1664525 + 1013904223;
      value = T(scale * (static_cast<float>(seed >> 8) * 0x1p-23f - 1));
    }
  }

  Span span() {
    return {reinterpret_cast<char*>(values.data()), kDtype<T>, sizeof(T), dims};
  }
};

constexpr int64_t kBatch = 2;

template <class T, int Q>
void of_data(const char* name) {
  Hash sums, gradients;
  for (int64_t dims : {1, 7, 15, 16, 17, 40, 63, 64, 65, 127, 200, 1023, 1024, 3333}) {
    Numbers<T> recon(kBatch, dims, 1, 1), target(kBatch, dims, 2, 1), g(kBatch, dims, 3, 0),
        g_target(kBatch, dims, 4, 0);
    Data data;
    data.dims = dims;
    data.recon = recon.span();
    data.target = target.span();
    Gradients out;
    out.recon = g.span();
    out.target = g_target.span();
    for (bool past_caches : {false, true}) {
      out.past_caches = past_caches;
      for (int64_t sample = 0; sample < kBatch; ++sample) {
        sums.add(chunk_sum<float, Q>(data, sample, 0));
        chunk_gradient<float, Q>(data, 0.3f, sample, 0, out);
      }
      gradients.add(g.values.data(), g.values.size() * sizeof(T));
      gradients.add(g_target.values.data(), g.values.size() * sizeof(T));
    }
  }
  std::printf(
      "data %s%s %016llx %016llx\n", name, Q == 1 ? " laplace" : "", static_cast<unsigned long long>(sums.value),
      static_cast<unsigned long long>(gradients.value));
}

template <class T, bool Prior, bool Range>
void of_latents(const char* name) {
  Hash sums, gradients;
  for (int64_t dims : {1, 7, 16, 17, 40, 64, 65, 200, 1024, 1500}) {
    for (double free_bits : {0.0, 0.4}) {
      Numbers<T> mu(kBatch, dims, 5, 2), logvar(kBatch, dims, 6, 3), prior_mu(kBatch, dims, 7, 2),
          prior_logvar(kBatch, dims, 8, 1);
      Numbers<T> g[4] = {{kBatch, dims, 0, 0}, {kBatch, dims, 0, 0}, {kBatch, dims, 0, 0}, {kBatch, dims, 0, 0}};
      Latents latents;
      latents.dims = dims;
      latents.mu = mu.span();
      latents.logvar = logvar.span();
      latents.has_prior = Prior;
      latents.prior_mu = prior_mu.span();
      latents.prior_logvar = prior_logvar.span();
      latents.has_free_bits = free_bits > 0;
      latents.free_bits = free_bits;
      latents.has_range = Range;
      latents.logvar_min = -1;
      latents.logvar_max = 2;
      Gradients out;
      out.mu = g[0].span();
      out.logvar = g[1].span();
      if (Prior) out.prior_mu = g[2].span();
      if (Prior) out.prior_logvar = g[3].span();
      for (bool past_caches : {false, true}) {
        out.latents_past_caches = past_caches;
        for (int64_t sample = 0; sample < kBatch; ++sample) {
          double rate, clamped;
          rates<float, Prior, Range>(latents, sample, 0, rate, clamped);
          sums.add(rate);
          sums.add(clamped);
          latent_gradient<float, Prior, Range>(latents, 0.7f, 0.2f, sample, 0, out);
        }
        for (auto& of : g) gradients.add(of.values.data(), of.values.size() * sizeof(T));
      }
    }
  }
  std::printf(
      "latents %s%s%s %016llx %016llx\n", name, Prior ? " prior" : "", Range ? " range" : "",
      static_cast<unsigned long long>(sums.value), static_cast<unsigned long long>(gradients.value));
}

template <class T>
void run(const char* name) {
  of_data<T, 2>(name);
  of_data<T, 1>(name);
  of_latents<T, false, false>(name);
  of_latents<T, true, false>(name);
  of_latents<T, true, true>(name);
}

}  // namespace

int main() {
  check_widening<BFloat16>("bf16 to float");
  check_widening<Half>("fp16 to float");
  check_rounding<BFloat16>("float to bf16");
  check_rounding<Half>("float to fp16");
  check_order<BFloat16>("bf16's order");
  check_order<Half>("fp16's order");
  check_bytes();
  check_exp();
  check_company();
  check_four();
  check_formulas_abreast();
  run<float>("fp32");
  run<BFloat16>("bf16");
  run<Half>("fp16");
}
