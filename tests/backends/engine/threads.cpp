// Do threads that share a long item race, and does it have the same bits for any number of them? ThreadSanitizer does
// not know the synchronisation of OpenMP, so the threads are those of the standard library.
//
// The rows have whole hardware vectors. Others are read beyond their end, into the next row, where another thread may
// write: those numbers are never used (Solver::for_chunks).
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

using namespace otalign;

namespace {

int failures = 0;

struct Case {
  const char* name;
  int64_t n, m;
  double reg, rho_x, rho_y, tol;
  int64_t max_iter;
  bool accelerate, symmetric;
  double spread;  // of the costs
  bool zeros;     // some weights are zero
};

template <class T>
struct Outcome {
  std::vector<T> K, f, g, mass_x, mass_y;
  double value, linear, error;
  int32_t n_iter;
  bool operator==(const Outcome& other) const {
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
      return !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
    };
    return same(K, other.K) && same(f, other.f) && same(g, other.g) && same(mass_x, other.mass_x) &&
           same(mass_y, other.mass_y) && value == other.value && linear == other.linear && error == other.error &&
           n_iter == other.n_iter;
  }
};

template <class T>
Outcome<T> solve(const Case& c, int threads) {
  std::mt19937 generator(7);
  const auto uniform = [&] { return generator() / 4294967296.0; };
  Outcome<T> out;
  out.K.resize(c.n * c.m + kPlanGap);
  out.f.resize(c.n);
  out.g.resize(c.m);
  out.mass_x.resize(c.n);
  out.mass_y.resize(c.m);
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.m; ++j) out.K[i * c.m + j] = static_cast<T>(c.spread * uniform());
  if (c.symmetric)
    for (int64_t i = 0; i < c.n; ++i)
      for (int64_t j = 0; j <= i; ++j) out.K[i * c.m + j] = i == j ? T(0) : out.K[j * c.m + i];
  std::vector<T> a(c.n), b(c.m);
  for (auto* weights : {&a, &b}) {
    double sum = 0;
    for (size_t k = 0; k < weights->size(); ++k)
      sum += (*weights)[k] = c.zeros && k % 3 == 2 ? T(0) : static_cast<T>(0.2 + uniform());
    for (T& weight : *weights) weight = static_cast<T>(weight / sum);
  }
  Item<T> it{};
  it.n = c.n;
  it.m = c.m;
  it.K = out.K.data();
  it.a = a.data();
  it.b = c.symmetric ? a.data() : b.data();
  it.reg = c.reg;
  it.rho_x = c.rho_x;
  it.rho_y = c.rho_y;
  it.max_iter = c.max_iter;
  it.tol = c.tol;
  it.accelerate = c.accelerate;
  it.symmetric = c.symmetric;
  it.f = out.f.data();
  it.g = out.g.data();
  it.mass_x = out.mass_x.data();
  it.mass_y = out.mass_y.data();
  it.cost = Cost::given;
  const cpu::Buffer scratch(kernels<T>().scratch(c.n, c.m));
  cpu::Shared shared;
  shared.open({chunks_of(c.n, c.m).count, 0}, Poll{});
  std::atomic<int> ready{0};
  std::vector<std::thread> helpers;
  for (int k = 1; k < threads; ++k)
    helpers.emplace_back([&, k] {
      ++ready;
      // Every second one leaves early, as if it were stopped.
      int asked = 0;
      shared.help([&] { return k % 2 == 0 && ++asked > 500; });
    });
  while (ready < threads - 1) std::this_thread::yield();
  kernels<T>().solve(it, scratch.as<char>(), Poll{}, shared.crew());
  shared.close();
  for (std::thread& helper : helpers) helper.join();
  out.value = it.value;
  out.linear = it.linear;
  out.error = it.error;
  out.n_iter = it.n_iter;
  return out;
}

template <class T>
void check(const Case& c) {
  const char* const type = sizeof(T) == 8 ? "f64" : "f32";
  if (chunks_of(c.n, c.m).count < 2) {
    std::printf("FAILED %s: has one chunk\n", c.name);
    ++failures;
  }
  const Outcome<T> alone = solve<T>(c, 1);
  if (!(std::isfinite(alone.value) && alone.n_iter > 0)) {
    std::printf("FAILED %s, %s: no solution\n", c.name, type);
    ++failures;
  }
  for (int threads : {2, 3, 5})
    if (!(solve<T>(c, threads) == alone)) {
      std::printf("FAILED %s, %s: other bits with %d threads\n", c.name, type, threads);
      ++failures;
    }
}

}  // namespace

int main() {
  constexpr double strict = std::numeric_limits<double>::infinity();
  const Case cases[] = {
      {"strict", 700, 128, 0.05, strict, strict, 1e-6, 300, false, false, 1, false},
      {"mixed", 700, 128, 0.02, strict, strict, 1e-6, 300, true, false, 1, false},
      {"levels", 700, 128, 1e-3, strict, strict, 1e-5, 1000, true, false, 1, false},
      {"wide", 512, 512, 0.05, strict, strict, 1e-6, 100, true, false, 1, false},
      {"relaxed", 700, 128, 0.05, 1, strict, 1e-6, 300, true, false, 1, false},
      {"both relaxed, plain", 700, 128, 0.05, 2, 0.5, 0, 30, false, false, 1, true},
      {"weights of zero", 700, 128, 0.05, strict, strict, 1e-6, 300, true, false, 1, true},
      {"exact passes", 700, 128, 1e-3, strict, strict, 0, 40, false, false, 10, false},
      {"relaxed exact passes", 700, 128, 1e-3, 1, 2, 0, 40, false, false, 10, true},
      {"symmetric", 512, 512, 0.05, strict, strict, 1e-6, 100, true, true, 1, false},
      {"symmetric exact passes", 512, 512, 1e-3, strict, strict, 0, 10, true, true, 10, true},
  };
  for (const Case& c : cases) {
    check<float>(c);
    check<double>(c);
  }
  std::printf("%s, shared items: %s\n", isa().name, failures ? "failed" : "all agree");
  return failures != 0;
}
