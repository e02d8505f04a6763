// Holds the numeric helpers of csrc/common to their stated errors, and the lane
// types to each other's bits. Compiled by test_numerics.py for the machine it
// runs on.
//
//   numerics [stride]       every stride-th of the 2^32 words (default 1: all)
//
//   numerics lanes stride   the lane types alone
//
//   numerics float32        reads floats, as bytes, and writes what the functions of a scale
//   numerics float64        make of them: all values of one function, then all of the next
//
// Otherwise prints one line a result: a name and the largest error in ULP (or, where the name says
// so, absolute), or the number of lanes whose bits differ.
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "lanes.h"

#include "../../csrc/common/terms.h"
#include "../../csrc/cuda/root.h"

using namespace reparam_fused;

namespace {

#if defined(__AVX512F__)
using Wide = Twice<Avx512>;
#elif defined(__AVX2__)
using Wide = Twice<Avx2>;
#elif defined(__aarch64__)
using Wide = Twice<Neon>;
#else
using Wide = Twice<Scalar>;
#endif

template <class T>
bool same_bits(T a, T b) {
  return (a != a && b != b) || Scalar::bits(a) == Scalar::bits(b);
}

// The distance from `exact` in units of the last place that T has there. An
// infinite result is right where `exact` rounds to infinity.
template <class T, class Exact>
double ulps(T got, Exact exact) {
  using Limits = std::numeric_limits<T>;
  constexpr double kWrong = 1e30;
  if (got != got || exact != exact) return (got != got) == (exact != exact) ? 0 : kWrong;
  int exponent = Limits::min_exponent;
  if (exact != 0) std::frexp(exact, &exponent);
  if (std::isinf(got) || std::isinf(exact)) {
    const Exact overflow =
        std::ldexp(Exact(2 - std::ldexp(1.0, -Limits::digits)), Limits::max_exponent - 1);
    return std::isinf(got) && std::signbit(got) == std::signbit(exact) &&
                   std::fabs(exact) >= overflow
               ? 0
               : kWrong;
  }
  if (exponent < Limits::min_exponent) exponent = Limits::min_exponent;
  return static_cast<double>(std::fabs(got - exact) *
                             std::ldexp(Exact(1), Limits::digits - exponent));
}

double larger(double a, double b) { return a > b ? a : b; }
double sum(double a, double b) { return a + b; }

// Runs `work(begin, end)` over [0, n) on all cores and joins the results.
double parallel(uint64_t n, double (*join)(double, double),
                const std::function<double(uint64_t, uint64_t)>& work) {
  const unsigned cores = std::thread::hardware_concurrency();
  std::vector<double> results(cores);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < cores; ++t) {
    threads.emplace_back([&, t] { results[t] = work(n * t / cores, n * (t + 1) / cores); });
  }
  for (auto& thread : threads) thread.join();
  double result = 0;
  for (const double r : results) result = join(result, r);
  return result;
}

uint64_t stride = 1;
uint64_t words() { return (uint64_t{1} << 32) / stride; }
uint32_t word(uint64_t i) { return static_cast<uint32_t>(i * stride); }

void report(const char* name, double value) {
  std::printf("%s %.9g\n", name, value);
  std::fflush(stdout);
}

template <class Error>
void largest_error(const char* name, Error error) {
  report(name, parallel(words(), larger, [&](uint64_t begin, uint64_t end) {
           double worst = 0;
           for (uint64_t i = begin; i < end; ++i) worst = larger(worst, error(word(i)));
           return worst;
         }));
}

// The same of a fixed random sample, for what has too many inputs for all of them.
template <class Error>
void largest_error_of_some(const char* name, Error error) {
  report(name, parallel((uint64_t{1} << 26) / stride, larger, [&](uint64_t begin, uint64_t end) {
           std::mt19937_64 random(begin + 1);
           double worst = 0;
           for (uint64_t i = begin; i < end; ++i) worst = larger(worst, error(random));
           return worst;
         }));
}

constexpr double kPi = 3.141592653589793238462643;

// (e^x - 1 - x) / 2, by its series where the terms would cancel.
template <class Exact>
Exact exact_half_excess(Exact x) {
  if (std::isinf(x)) return std::numeric_limits<Exact>::infinity();
  if (std::fabs(x) > Exact(0.03)) return (std::expm1(x) - x) / 2;
  Exact sum = 0;
  for (int n = 12; n > 1; --n) sum = (sum + 1) * x / n;
  return sum * x / 2;
}

// (s^2 - 1 - ln s^2) / 2, by the series of ln(1 + d) where the terms would cancel.
template <class Exact>
Exact exact_half_excess_of_sigma(Exact s) {
  s = std::fabs(s);
  const Exact d = s - 1;
  if (std::isinf(s) || s == 0) return std::numeric_limits<Exact>::infinity();
  if (std::fabs(d) > Exact(0.03)) return (d * (s + 1) / 2) - std::log(s);
  Exact sum = 0;
  for (int n = 14; n > 1; --n) sum = -sum * d + 1 / Exact(n);
  return d * d * (sum + Exact(0.5));
}
template <class Exact>
Exact exact_half_excess_slope(Exact s) {
  return std::isinf(s) ? s : s == 0 ? -1 / s : (s - 1) * (s + 1) / s;
}
template <class Exact>
Exact exact_softplus(Exact x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}
template <class Exact>
Exact exact_sigmoid(Exact x) {
  return x > 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}

template <class Exact>
Exact exact_log_sigma(Exact s) {
  return std::log(std::fabs(s));
}
template <class Exact>
Exact exact_minus_inverse_of_sum(Exact t) {
  return -1 / (1 + t);
}
// 1 - tanh^2 z
template <class Exact>
Exact exact_tanh_slope(Exact z) {
  const Exact t = std::exp(-2 * std::fabs(z));
  return 4 * t / ((1 + t) * (1 + t));
}
// -ln(1 - tanh^2 z)
template <class Exact>
Exact exact_tanh_correction(Exact z) {
  const Exact size = std::fabs(z);
  return 2 * (size + std::log1p(std::exp(-2 * size)) - std::log(Exact(2)));
}

// A result of an op of terms.h
template <class Op, class V, class R, class... In>
R made_by(V, int result, R first, In... rest) {
  const R in[] = {first, rest...};
  R out[Op::kResults];
  Op::template apply<V>(in, first, Unbounded{}, out);
  return out[result];
}
template <class V, class R>
R tanh_slope(V v, R z) {
  return made_by<TanhBackward>(v, 0, constant<V, R>(1.0), z, constant<V, R>(0));
}
template <class V, class R>
R tanh_correction(V v, R z) {
  return made_by<Tanh>(v, 1, z, constant<V, R>(0));
}

template <class V, class R>
R excess_of_ratio(V, R s, R t) {
  const auto ratio = BySigma::ratio<V>(s, s, t, t);
  return BySigma::excess<V>(ratio, s, t);
}

// Of two Gaussians: the operands of a PriorTerm, with scales that differ little, by a factor up to
// 20, by more or, as the bits of both fall, by any; and the same for those whose scales are
// log_var.
template <class T>
struct Pair {
  static constexpr double kFar = sizeof(T) == 4 ? 20 : 150;
  T mu, scale, loc, prior;

  Pair(std::mt19937_64& random, bool log) {
    const uint64_t r = random();
    const auto between = [&](double low, double high) {
      return std::uniform_real_distribution<double>(low, high)(random);
    };
    const double at = between(-kFar, kFar);
    const double apart = r & 1   ? std::ldexp(between(-1, 1), -static_cast<int>(r >> 8 & 31))
                         : r & 2 ? between(-3, 3)
                                 : between(-kFar, kFar) - at;
    prior = static_cast<T>(log ? 2 * at : std::exp(at));
    scale = static_cast<T>(log ? prior + 2 * apart : prior * std::exp(apart));
    loc = static_cast<T>(between(-3, 3));
    // In units of the prior's sigma, from where the means do not matter to where nothing else does
    const double distance = std::ldexp(between(-4, 4), 8 - static_cast<int>(r >> 16 & 31));
    mu = static_cast<T>(loc + distance * std::exp(at));
    if (!log && (r >> 32 & 3) == 0) {
      for (T* x : {&scale, &prior}) {
        do *x = std::fabs(Scalar::from_bits(static_cast<decltype(Scalar::bits(T()))>(random())));
        while (*x != *x);
      }
    }
  }
  bool near() const {
    const T ratio = scale / prior;
    return ratio >= T(0.7071067811865475244L) && ratio < T(1.414213562373095049L);
  }
  bool near_by_log() const { return std::fabs(scale - prior) < T(0.69); }
};

// (s^2 - 1 - ln s^2) / 2 of a ratio
template <class T>
long double exact_half_excess_of_ratio(T sigma, T prior) {
  const long double s = sigma, t = prior;
  // As in exact_half_excess_of_sigma, of a d that does not cancel
  const long double d = (s - t) / t;
  if (std::isinf(t)) return t;
  if (std::fabs(d) > 0.03L) return d * (d + 2) / 2 - std::log(s / t);
  long double sum = 0;
  for (int n = 14; n > 1; --n) sum = -sum * d + 1 / static_cast<long double>(n);
  return d * d * (sum + 0.5L);
}
long double half_square(long double x) { return x * x / 2; }

template <class T>
double error_of_ratio(const Pair<T>& p) {
  const auto ratio = BySigma::ratio<Scalar>(p.mu, p.scale, p.loc, p.prior);
  return ulps(BySigma::excess<Scalar>(ratio, p.scale, p.prior),
              exact_half_excess_of_ratio(p.scale, p.prior));
}
template <class By, class T>
double error_of_prior(const Pair<T>& p) {
  const T term = made_by<PriorTerm<By>>(Scalar{}, 0, p.mu, p.scale, p.loc, p.prior);
  const long double apart = static_cast<long double>(p.mu) - p.loc, prior = p.prior;
  if (std::is_same<By, BySigma>::value) {
    return ulps(term, half_square(apart / prior) + exact_half_excess_of_ratio(p.scale, p.prior));
  }
  return ulps(term, half_square(apart * std::exp(-prior / 2)) +
                        exact_half_excess<long double>(p.scale - prior));
}

template <class T>
void errors_of_pairs(const std::string& dtype) {
  const auto sample = [&](const char* name, bool log, auto error) {
    largest_error_of_some((name + dtype).c_str(),
                          [&](std::mt19937_64& random) { return error(Pair<T>(random, log)); });
  };
  using P = Pair<T>;
  sample("half_excess_of_ratio near 1", false,
         [](const P& p) { return p.near() ? error_of_ratio(p) : 0; });
  sample("half_excess_of_ratio", false, [](const P& p) { return error_of_ratio(p); });
  sample("prior by sigma", false,
         [](const P& p) { return p.near() ? error_of_prior<BySigma>(p) : 0; });
  sample("prior by log_var", true,
         [](const P& p) { return p.near_by_log() ? error_of_prior<ByLogVar>(p) : 0; });
}

void float_errors() {
  largest_error("radius", [](uint32_t w) {
    const float u = uniform<Scalar>(w);
    const double exact = u == 1.0f ? 0x1p-30 : std::sqrt(-2 * std::log(static_cast<double>(u)));
    return ulps(radius<Scalar>(u), exact);
  });
  largest_error("uniform", [](uint32_t w) {
    const float u = uniform<Scalar>(w);
    return u >= 0x1p-33f && u <= 1.0f ? ulps(u, (w + 0.5) * 0x1p-32) : 1e30;
  });
  const auto exact_angle = [](uint32_t w) {
    const uint32_t folded = w << 1;  // modulo half a turn
    return kPi * static_cast<int32_t>(folded) * 0x1p-32;
  };
  largest_error("half_turn sin", [&](uint32_t w) {
    float cos, sin;
    const uint32_t flips = half_turn<Scalar>(w, cos, sin) >> 31;
    const bool odd = w >= 0x40000000u && w < 0xc0000000u;
    return flips == odd ? ulps(sin, std::sin(exact_angle(w))) : 1e30;
  });
  largest_error("half_turn cos absolute", [&](uint32_t w) {
    float cos, sin;
    half_turn<Scalar>(w, cos, sin);
    return std::fabs(cos - std::cos(exact_angle(w)));
  });
  largest_error("sigma", [](uint32_t w) {
    const float log_var = Scalar::from_bits(w);
    return ulps(sigma<Scalar>(log_var), std::exp(0.5 * static_cast<double>(log_var)));
  });
  largest_error("half_excess", [](uint32_t w) {
    const float x = Scalar::from_bits(w);
    return ulps(half_excess<Scalar>(x), exact_half_excess<double>(x));
  });
  largest_error("half_expm1", [](uint32_t w) {
    const float x = Scalar::from_bits(w);
    return ulps(half_expm1<Scalar>(x), std::expm1(static_cast<double>(x)) / 2);
  });
  largest_error("half_excess_of_sigma", [](uint32_t w) {
    const float s = Scalar::from_bits(w);
    return ulps(half_excess_of_sigma<Scalar>(s), exact_half_excess_of_sigma<double>(s));
  });
  largest_error("half_excess_slope", [](uint32_t w) {
    const float s = Scalar::from_bits(w);
    return ulps(half_excess_slope<Scalar>(s), exact_half_excess_slope<double>(s));
  });
  largest_error("softplus", [](uint32_t w) {
    const float rho = Scalar::from_bits(w);
    return ulps(softplus<Scalar>(rho), exact_softplus<double>(rho));
  });
  largest_error("sigmoid", [](uint32_t w) {
    const float rho = Scalar::from_bits(w);
    return ulps(sigmoid<Scalar>(rho), exact_sigmoid<double>(rho));
  });
  largest_error("log_sigma", [](uint32_t w) {
    const float s = Scalar::from_bits(w);
    return ulps(BySigma::log_sigma<Scalar>(s), exact_log_sigma<double>(s));
  });
  largest_error("minus_inverse_of_sum", [](uint32_t w) {
    const float t = Scalar::from_bits(w);
    return t >= 0 && t <= 1
               ? ulps(minus_inverse_of_sum<Scalar>(t), exact_minus_inverse_of_sum<double>(t))
               : 0;
  });
  largest_error("tanh", [](uint32_t w) {
    const float z = Scalar::from_bits(w);
    return ulps(tanh_parts<Scalar>(z).tanh, std::tanh(static_cast<double>(z)));
  });
  largest_error("tanh t", [](uint32_t w) {
    const float z = Scalar::from_bits(w);
    return ulps(tanh_parts<Scalar>(z).t, std::exp(-2 * std::fabs(static_cast<double>(z))));
  });
  largest_error("tanh slope", [](uint32_t w) {
    const float z = Scalar::from_bits(w);
    return ulps(tanh_slope(Scalar{}, z), exact_tanh_slope<double>(z));
  });
  largest_error("tanh correction absolute", [](uint32_t w) {
    const float z = Scalar::from_bits(w);
    const double exact = exact_tanh_correction<double>(z);
    return std::fabs(z) <= 1 ? std::fabs(tanh_correction(Scalar{}, z) - exact) : 0;
  });
  largest_error("tanh correction", [](uint32_t w) {
    const float z = Scalar::from_bits(w);
    const double exact = exact_tanh_correction<double>(z);
    return std::fabs(z) <= 1 ? 0 : ulps(tanh_correction(Scalar{}, z), exact);
  });
  // With a unit of 2 it is the sigma of the double, which is exact or inf.
  largest_error("differ: sigma in units of 2", [](uint32_t w) {
    const float x = Scalar::from_bits(w);
    return !same_bits(sigma<Scalar>(x, 0.5f, 2.0f), sigma<Scalar>(2 * x, 0.5f)) +
           !same_bits(sigma<Scalar>(double{x}, 0.5f, 2.0f), sigma<Scalar>(2.0 * x, 0.5f));
  });
}

void double_errors() {
  const auto sample = [](const char* name, auto error) { largest_error_of_some(name, error); };
  sample("uniform double", [](std::mt19937_64& random) {
    const uint64_t w = random() >> (random() & 63);
    const double u = uniform<Scalar>(static_cast<uint32_t>(w >> 32), static_cast<uint32_t>(w));
    return u >= 0x1p-65 && u <= 1 ? ulps(u, (w + 0.5L) * 0x1p-64L) : 1e30;
  });
  sample("radius double", [](std::mt19937_64& random) {
    // Half of them near 1, where the radius is small.
    const uint64_t r = random();
    const uint64_t w = r & 1 ? random() : ~(random() >> (r >> 58));
    const double u = uniform<Scalar>(static_cast<uint32_t>(w >> 32), static_cast<uint32_t>(w));
    return ulps(radius<Scalar>(u), std::sqrt(-2 * std::log(static_cast<long double>(u))));
  });
  const auto turn = [](uint64_t w, double& cos, double& sin) {
    half_turn<Scalar>(static_cast<uint32_t>(w >> 32), static_cast<uint32_t>(w), cos, sin);
    return 3.14159265358979323846264338327950288L * static_cast<int64_t>(w << 1) * 0x1p-64L;
  };
  sample("half_turn double sin", [&](std::mt19937_64& random) {
    double cos, sin;
    const long double angle = turn(random(), cos, sin);
    return ulps(sin, std::sin(angle));
  });
  sample("half_turn double cos absolute", [&](std::mt19937_64& random) {
    double cos, sin;
    const long double angle = turn(random(), cos, sin);
    return static_cast<double>(std::fabs(cos - std::cos(angle)));
  });
  sample("sigma double", [](std::mt19937_64& random) {
    const double log_var = std::uniform_real_distribution<double>(-1500, 1430)(random);
    return ulps(sigma<Scalar>(log_var), std::exp(0.5L * log_var));
  });
  // Half of them far out, half near 0.
  const auto argument = [](std::mt19937_64& random) {
    const uint64_t r = random();
    return r & 1 ? std::uniform_real_distribution<double>(-720, 712)(random)
                 : std::ldexp(std::uniform_real_distribution<double>(-4, 4)(random),
                              -static_cast<int>(r >> 1 & 63));
  };
  // Any magnitude, as the bits fall; and half of them where the functions are not simple.
  const auto rho = [](std::mt19937_64& random) {
    const uint64_t r = random();
    return r & 1 ? std::uniform_real_distribution<double>(-750, 40)(random)
                 : Scalar::from_bits(random());
  };
  const auto std_of = [](std::mt19937_64& random) {
    const uint64_t r = random();
    const double near = std::uniform_real_distribution<double>(-2, 2)(random);
    return r & 1 ? 1 + std::ldexp(near, -static_cast<int>(r >> 1 & 63))
                 : Scalar::from_bits(random());
  };
  sample("half_excess double", [&](std::mt19937_64& random) {
    const double x = argument(random);
    return ulps(half_excess<Scalar>(x), exact_half_excess<long double>(x));
  });
  sample("half_expm1 double", [&](std::mt19937_64& random) {
    const double x = argument(random);
    return ulps(half_expm1<Scalar>(x), std::expm1(static_cast<long double>(x)) / 2);
  });
  sample("softplus double", [&](std::mt19937_64& random) {
    const double x = rho(random);
    return ulps(softplus<Scalar>(x), exact_softplus<long double>(x));
  });
  sample("sigmoid double", [&](std::mt19937_64& random) {
    const double x = rho(random);
    return ulps(sigmoid<Scalar>(x), exact_sigmoid<long double>(x));
  });
  sample("half_excess_of_sigma double", [&](std::mt19937_64& random) {
    const double s = std_of(random);
    return ulps(half_excess_of_sigma<Scalar>(s), exact_half_excess_of_sigma<long double>(s));
  });
  sample("half_excess_slope double", [&](std::mt19937_64& random) {
    const double s = std_of(random);
    return ulps(half_excess_slope<Scalar>(s), exact_half_excess_slope<long double>(s));
  });
  sample("log_sigma double", [&](std::mt19937_64& random) {
    const double s = std_of(random);
    return ulps(BySigma::log_sigma<Scalar>(s), exact_log_sigma<long double>(s));
  });
  sample("minus_inverse_of_sum double", [](std::mt19937_64& random) {
    const double t = std::uniform_real_distribution<double>(0, 1)(random);
    return ulps(minus_inverse_of_sum<Scalar>(t), exact_minus_inverse_of_sum<long double>(t));
  });
  // Any magnitude; where t is a denormal; and half of them where the functions are not simple
  const auto z_of = [](std::mt19937_64& random) {
    const uint64_t r = random();
    return r & 1   ? std::uniform_real_distribution<double>(-4, 4)(random)
           : r & 2 ? std::uniform_real_distribution<double>(-380, 380)(random)
                   : Scalar::from_bits(random());
  };
  sample("tanh double", [&](std::mt19937_64& random) {
    const double z = z_of(random);
    return ulps(tanh_parts<Scalar>(z).tanh, std::tanh(static_cast<long double>(z)));
  });
  sample("tanh t double", [&](std::mt19937_64& random) {
    const double z = z_of(random);
    return ulps(tanh_parts<Scalar>(z).t, std::exp(-2 * std::fabs(static_cast<long double>(z))));
  });
  sample("tanh slope double", [&](std::mt19937_64& random) {
    const double z = z_of(random);
    return ulps(tanh_slope(Scalar{}, z), exact_tanh_slope<long double>(z));
  });
  sample("tanh correction double absolute", [&](std::mt19937_64& random) {
    const double z = std::uniform_real_distribution<double>(-1, 1)(random);
    return static_cast<double>(
        std::fabs(tanh_correction(Scalar{}, z) - exact_tanh_correction<long double>(z)));
  });
  sample("tanh correction double", [&](std::mt19937_64& random) {
    const double z = z_of(random);
    const long double exact = exact_tanh_correction<long double>(z);
    return std::fabs(z) <= 1 ? 0 : ulps(tanh_correction(Scalar{}, z), exact);
  });
}

using F = typename Wide::F;
using U = typename Wide::U;
constexpr int kTile = 4 * Wide::kLanes;

// Zeros, infinities, a NaN, units and denormals, which a stride would miss
constexpr uint32_t kEdges[] = {0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u,
                               0x3f800000u, 0xbf800000u, 0x00000001u, 0x80000001u};
constexpr int kEdgeCount = sizeof(kEdges) / sizeof(*kEdges);

// Wide against Scalar, lane by lane, for one function of a word.
template <class WideFunction, class ScalarFunction>
void lanes_differ(const char* name, WideFunction wide, ScalarFunction scalar) {
  report(name, parallel(words() / kTile, sum, [&](uint64_t begin, uint64_t end) {
           double differ = 0;
           for (uint64_t i = begin; i < end; ++i) {
             float in[kTile], out[kTile];
             for (int j = 0; j < kTile; ++j) in[j] = Scalar::from_bits(word(i * kTile + j));
             F tile[4];
             Wide::load_tile(in, tile);
             for (auto& x : tile) x = wide(Wide::bits(x));
             Wide::store_tile(out, tile);
             for (int j = 0; j < kTile; ++j) {
               differ += !same_bits(out[j], scalar(Scalar::bits(in[j])));
             }
           }
           return differ;
         }));
}

// The same for a function of numbers of both precisions, which is told the lane type: of the
// edges, then of all words as floats; every other double has bits of its own.
template <class T, class Function>
double lanes_wrong(Function function) {
  using R = typename Element<Wide, T>::Register;
  constexpr int kRegisters = sizeof(T) == 4 ? 4 : 2;
  constexpr int kElements = kRegisters * Wide::kLanes;
  return parallel(words() / kElements, sum, [&](uint64_t begin, uint64_t end) {
    double differ = 0;
    for (uint64_t i = begin; i < end; ++i) {
      T in[kElements], out[kElements];
      for (int j = 0; j < kElements; ++j) {
        const uint64_t at = i * kElements + j;
        const uint32_t w = at < 2 * kEdgeCount ? kEdges[at / 2] : word(at);
        in[j] = Scalar::from_bits(w);
        if (sizeof(T) == 8 && j % 2) {
          const uint64_t mixed = w * 0x9E3779B97F4A7C15u;
          std::memcpy(in + j, &mixed, sizeof(T));
        }
      }
      R tile[kRegisters];
      Wide::load_tile(in, tile);
      for (auto& x : tile) x = function(Wide{}, x);
      Wide::store_tile(out, tile);
      for (int j = 0; j < kElements; ++j) differ += !same_bits(out[j], function(Scalar{}, in[j]));
    }
    return differ;
  });
}
template <class Function>
void lanes_of_both(const char* name, Function function) {
  std::printf("differ: %s %.9g\n", name, lanes_wrong<float>(function));
  std::printf("differ: %s double %.9g\n", name, lanes_wrong<double>(function));
}

template <class V, class Word>
auto normal(Word w0, Word w1, int lane) {
  typename V::F n0, n1;
  box_muller<V>(w0, w1, n0, n1);
  return lane ? n1 : n0;
}

// Every fp32 through a store of a half type: a tile of it comes in the order in
// which the lane type loads that half type, which small integers tell. The first tile
// is one of NaN that a carry would make a number.
template <class Half_>
void half_store_differs(const char* name) {
  Half_ small[kTile];
  for (int j = 0; j < kTile; ++j) Scalar::store(small + j, static_cast<float>(j));
  F tile[4];
  float order[kTile];
  Wide::load_tile(small, tile);
  Wide::store_tile(order, tile);
  report(name, parallel(words() / kTile, sum, [&](uint64_t begin, uint64_t end) {
           double differ = 0;
           for (uint64_t i = begin; i < end; ++i) {
             float in[kTile], ordered[kTile];
             for (int j = 0; j < kTile; ++j) {
               const uint64_t at = i * kTile + j;
               in[j] = Scalar::from_bits(i == 0 ? 0x7fffffffu - j : word(at));
             }
             for (int j = 0; j < kTile; ++j) ordered[j] = in[static_cast<int>(order[j])];
             F wide[4];
             Half_ out[kTile], one;
             Wide::load_tile(ordered, wide);
             Wide::store_tile(out, wide);
             for (int j = 0; j < kTile; ++j) {
               const bool nan = in[j] != in[j];
               if (nan && !(Scalar::bits(in[j]) & 0x00400000u))
                 continue;  // kernels make no such NaN
               Scalar::store(&one, in[j]);
               const float back = Scalar::load(&one);
               differ += out[j].bits != one.bits && !nan;
               const float wide_back = Scalar::load(out + j);
               differ += nan != (back != back) || nan != (wide_back != wide_back);
             }
           }
           return differ;
         }));
}

// All 2^16 values, in whatever order the tile has them: loaded, and stored back.
template <class Half_>
double half_load_differs() {
  double differ = 0;
  for (uint32_t i = 0; i < 65536; i += kTile) {
    Half_ in[kTile], out[kTile];
    for (int j = 0; j < kTile; ++j) in[j].bits = static_cast<uint16_t>(i + j);
    F tile[4];
    Wide::load_tile(in, tile);
    Wide::store_tile(out, tile);
    for (int j = 0; j < kTile; ++j) {
      const float x = Scalar::load(in + j);
      differ += x == x ? in[j].bits != out[j].bits : !(Scalar::load(out + j) != x);
    }
  }
  return differ;
}

// How many lanes of a tile of normals, as elements of T, are not what Scalar makes of their
// counters and seeds.
template <class T, class R, int n>
double lanes_wrong(const R (&eps)[n], const uint64_t* counters, const uint64_t* seeds) {
  typename Element<Scalar, T>::Register scalar[n];
  T out[n * Wide::kLanes], one[n];
  double wrong = 0;
  Wide::store_tile(out, eps);
  for (int j = 0; j < Wide::kLanes; ++j) {
    normals<Scalar, T>(counters[j], seeds[j], scalar);
    Scalar::store_tile(one, scalar);
    wrong += std::memcmp(one, out + n * j, sizeof(one)) != 0;
  }
  return wrong;
}

// From counters in a row, about a carry, under one seed; and from any, each under its own.
template <class T, class R, int n>
double normals_differ(R (&eps)[n]) {
  double differ = 0;
  std::mt19937_64 random(n);
  uint64_t counters[Wide::kLanes], seeds[Wide::kLanes];
  for (uint64_t first = 0xffffff00u; first < 0x100000100u; first += 7) {
    const uint64_t seed = first * 0x9E3779B97F4A7C15u;
    for (int j = 0; j < Wide::kLanes; ++j) {
      counters[j] = first + j;
      seeds[j] = seed;
    }
    normals<Wide, T>(first, seed, eps);
    differ += lanes_wrong<T>(eps, counters, seeds);
    for (int j = 0; j < Wide::kLanes; ++j) {
      counters[j] = random();
      seeds[j] = random();
    }
    normals<Wide, T>(counters, seeds, eps);
    differ += lanes_wrong<T>(eps, counters, seeds);
  }
  return differ;
}

// Every float of two binades, outside of which a root is the same but for a power of
// two, with every estimate of 1 / sqrt(a) within 2^-22.9.
void root_from_every_estimate() {
  const double bound = std::exp2(-22.9);
  double wrong = 0;
  for (float a = 1.0f; a < 4.0f; a = std::nextafterf(a, 4.0f)) {
    const double exact = 1.0 / std::sqrt(static_cast<double>(a));
    for (auto y = static_cast<float>(exact * (1 - bound)); y <= exact * (1 + bound);
         y = std::nextafterf(y, 2.0f)) {
      if (y >= exact * (1 - bound)) wrong += root<Scalar>(a, y) != std::sqrt(a);
    }
  }
  report("root, wrong", wrong);
}

void lane_types_agree() {
  lanes_differ(
      "differ: radius", [](U w) { return radius<Wide>(uniform<Wide>(w)); },
      [](uint32_t w) { return radius<Scalar>(uniform<Scalar>(w)); });
  for (int lane = 0; lane < 2; ++lane) {
    lanes_differ(
        lane ? "differ: normal 1" : "differ: normal 0",
        [&](U w) { return normal<Wide>(Wide::set(0x12345678u), w, lane); },
        [&](uint32_t w) { return normal<Scalar>(0x12345678u, w, lane); });
  }
  const auto one = [](auto v, auto x) { return constant<decltype(v), decltype(x)>(1.0); };
  lanes_of_both("sigma", [](auto v, auto x) { return sigma<decltype(v)>(x); });
  lanes_of_both("half_excess", [](auto v, auto x) { return half_excess<decltype(v)>(x); });
  lanes_of_both("half_expm1", [](auto v, auto x) { return half_expm1<decltype(v)>(x); });
  lanes_of_both("half_excess_of_sigma",
                [](auto v, auto x) { return half_excess_of_sigma<decltype(v)>(x); });
  lanes_of_both("half_excess_slope",
                [](auto v, auto x) { return half_excess_slope<decltype(v)>(x); });
  lanes_of_both("softplus", [](auto v, auto x) { return softplus<decltype(v)>(x); });
  lanes_of_both("sigmoid", [](auto v, auto x) { return sigmoid<decltype(v)>(x); });
  lanes_of_both("log_sigma", [](auto v, auto x) { return BySigma::log_sigma<decltype(v)>(x); });
  lanes_of_both("minus_inverse_of_sum",
                [](auto v, auto x) { return minus_inverse_of_sum<decltype(v)>(x); });
  // Of both ends, and of ratios that are no number
  for (const double t : {1.0, 0x1.8p-100, 0x1.4p100}) {
    lanes_of_both(("half_excess_of_ratio " + std::to_string(std::ilogb(t))).c_str(),
                  [&](auto v, auto x) {
                    return excess_of_ratio(v, x, constant<decltype(v), decltype(x)>(t));
                  });
  }
  lanes_of_both("tanh", [](auto v, auto x) { return tanh_parts<decltype(v)>(x).tanh; });
  lanes_of_both("tanh t", [](auto v, auto x) { return tanh_parts<decltype(v)>(x).t; });
  lanes_of_both("tanh slope", [](auto v, auto x) { return tanh_slope(v, x); });
  lanes_of_both("tanh correction", [](auto v, auto x) { return tanh_correction(v, x); });
  lanes_of_both("div", [&](auto v, auto x) { return v.div(v.sub(x, one(v, x)), x); });
  lanes_of_both("at_least 0", [](auto v, auto x) { return v.at_least(x, 0); });
  lanes_of_both("at_least", [](auto v, auto x) { return v.at_least(x, -0.25f); });
  lanes_of_both("at_most 0", [](auto v, auto x) { return v.at_most(x, -0.0f); });
  lanes_of_both("at_most", [](auto v, auto x) { return v.at_most(x, 0.25f); });
  lanes_of_both("where_equal", [&](auto v, auto x) {
    return v.where_equal(x, magnitude<decltype(v)>(x), x, one(v, x));
  });
  half_store_differs<Half>("differ: store half");
  half_store_differs<BFloat16>("differ: store bfloat16");
  report("differ: load half", half_load_differs<Half>());
  report("differ: load bfloat16", half_load_differs<BFloat16>());
  F eps[4];
  typename Wide::D eps_double[2];
  report("differ: normals float", normals_differ<float>(eps));
  report("differ: normals half", normals_differ<Half>(eps));
  report("differ: normals bfloat16", normals_differ<BFloat16>(eps));
  report("differ: normals double", normals_differ<double>(eps_double));
}

template <class T>
void write_values() {
  std::vector<T> in, out;
  for (T x; std::fread(&x, sizeof(x), 1, stdin) == 1;) in.push_back(x);
  const auto write = [&](auto function) {
    for (const T x : in) out.push_back(function(x));
  };
  write([](T x) { return sigma<Scalar>(x, 0.5f, 2.0f); });
  write([](T x) { return softplus<Scalar>(x); });
  write([](T x) { return sigmoid<Scalar>(x); });
  write([](T x) { return half_excess_of_sigma<Scalar>(x); });
  write([](T x) { return half_excess_slope<Scalar>(x); });
  write([](T x) { return BySigma::log_sigma<Scalar>(x); });
  write([](T x) { return excess_of_ratio(Scalar{}, x, T(1)); });
  write([](T x) { return excess_of_ratio(Scalar{}, x, std::numeric_limits<T>::max()); });
  write([](T x) { return tanh_parts<Scalar>(x).tanh; });
  write([](T x) { return tanh_slope(Scalar{}, x); });
  write([](T x) { return tanh_correction(Scalar{}, x); });
  std::fwrite(out.data(), sizeof(T), out.size(), stdout);
}

// words of one counter and key, as Random123's known answers give them
void print_philox(char** words) {
  uint32_t in[6];
  for (int i = 0; i < 6; ++i) in[i] = static_cast<uint32_t>(std::strtoul(words[i], nullptr, 16));
  const uint64_t seed = in[4] | static_cast<uint64_t>(in[5]) << 32;
  const auto out = philox4x32_10<Scalar>({in[0], in[1], in[2], in[3]}, OneSeed<Scalar>(seed));
  std::printf("%08x %08x %08x %08x\n", out.w0, out.w1, out.w2, out.w3);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 7) {
    print_philox(argv + 1);
    return 0;
  }
  if (argc == 3) {
    stride = std::strtoull(argv[2], nullptr, 10);
    lane_types_agree();
    return 0;
  }
  if (argc == 2 && std::string(argv[1]) == "float32") {
    write_values<float>();
    return 0;
  }
  if (argc == 2 && std::string(argv[1]) == "float64") {
    write_values<double>();
    return 0;
  }
  if (argc > 1) stride = std::strtoull(argv[1], nullptr, 10);
  float_errors();
  double_errors();
  errors_of_pairs<float>("");
  errors_of_pairs<double>(" double");
  lane_types_agree();
  root_from_every_estimate();
}
