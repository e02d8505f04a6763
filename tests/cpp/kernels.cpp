// The kernels of one ISA, without torch, over a fixed list of problems. Compiled by
// test_aarch64.py for two architectures, which have to print the same. What the problems are
// of is made of integers and exact steps, so that no library's functions enter.
//
//   kernels isa                   the ISA that is taken; REPARAM_FUSED_ISA asks for one
//   kernels digests               a line for each group of problems: its name, the number of
//                                 elements computed, how many of them are no NaN, and a hash
//   kernels layouts [DTYPE]       compares calls that have to give the same bits: of one logical
//                                 problem in many layouts, aligned or not, of K samples and of
//                                 each alone. Says how many, and which differ
//   kernels edges                 few calls of each op, of the lengths about a tile's and a
//   block's,
//                                 for valgrind; a line as above for each dtype
//   kernels threads               the shares of large calls by a thread each, and several calls at
//                                 a time: compares with one after the other, and says as above
//   kernels run OP FORM DTYPE N   one call, whose instructions can be counted
//
// Every output starts as NaN; all NaN count as one value.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/common/forms.h"
#include "../../csrc/common/scalar.h"
#include "../../csrc/cpu/dispatch.h"

using namespace reparam_fused;

namespace {

constexpr const char* kNamedOps[] = {"sample",        "sample_backward",        "noise",
                                     "kl_divergence", "kl_divergence_backward", "samples_backward"};
constexpr int kNamed = sizeof(kNamedOps) / sizeof(*kNamedOps);  // heads have calls of their own
constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16"};
bool has_form(int op) { return op != kNoise; }
bool draws(int op) { return op <= kNoise || op == kSamplesBackward; }

using Numbers = std::vector<int64_t>;
struct Layout {
  Numbers sizes, x, scale, out;
  // Of the dimensions that segments are counted in: words from key to key, elements from
  // index to index
  Numbers keys = {}, index = {};
  int64_t first_index = 0;
  int64_t samples = 1, sample_stride = 0, sample_index = 0, sample_key = 0;
};

Layout row(int64_t n) { return {{n}, {1}, {1}, {1}}; }
int64_t numel(const Layout& layout) {
  return std::accumulate(layout.sizes.begin(), layout.sizes.end(), int64_t{1}, std::multiplies<>());
}
// The elements of memory that these strides reach, or those of all samples
int64_t extent(const Layout& layout, const Numbers& strides, bool sampled = false) {
  int64_t last = sampled && layout.samples > 0 ? (layout.samples - 1) * layout.sample_stride : 0;
  for (size_t d = 0; d < strides.size(); ++d) last += (layout.sizes[d] - 1) * strides[d];
  return last + 1;
}

uint64_t mixed(uint64_t n) {
  n = (n + 1) * 0x9E3779B97F4A7C15u;
  n = (n ^ n >> 30) * 0xBF58476D1CE4E5B9u;
  return n ^ n >> 29;
}

template <class T>
T element(double x) {
  T t;
  Scalar::store(&t, static_cast<typename Element<Scalar, T>::Register>(x));
  return t;
}
template <class T>
T pattern(uint64_t bits) {
  T t;
  std::memcpy(&t, &bits, sizeof(t));
  return t;
}

// What an operand holds: element i of operand 0 or 1.
template <class T>
using Values = std::function<T(uint64_t i, int operand)>;

// Within 16 of 0, with as many bits as float32 keeps.
template <class T>
T plain(uint64_t i, int operand) {
  return element<T>(static_cast<double>(mixed(2 * i + operand) >> 40) * 0x1p-19 - 16);
}

// Special values, those about each clamp, and then patterns of bits over the whole type: of the
// half types every one.
template <class T>
T extreme(uint64_t i) {
  constexpr int kBits = 8 * sizeof(T);
  constexpr double kInf = std::numeric_limits<double>::infinity();
  static const std::vector<T> special = [] {
    std::vector<T> values;
    // a quiet NaN of all ones, a signalling one, the denormals next to 0
    const uint64_t ones = ~uint64_t{0} >> (65 - kBits), sign = uint64_t{1} << (kBits - 1);
    uint64_t infinity = 0;
    const T inf = element<T>(kInf);
    std::memcpy(&infinity, &inf, sizeof(T));
    for (const uint64_t s : {uint64_t{0}, sign}) {
      for (const uint64_t bits :
           {ones, infinity + 1, infinity, infinity - 1, uint64_t{0}, uint64_t{1}})
        values.push_back(pattern<T>(bits | s));
    }
    for (const double about : {87.5, 88.75, 90.0, 104.0, 175.0, 207.0, 256.0, 709.75, 711.0, 745.0,
                               1418.0, 1490.0, 2048.0}) {
      for (const double x : {about - 0.5, about, about + 0.5}) {
        values.push_back(element<T>(x));
        values.push_back(element<T>(-x));
      }
    }
    return values;
  }();
  return i < special.size() ? special[i] : pattern<T>(i * 0x9E3779B97F4A7C15u);
}

struct Digest {
  uint64_t hash = 0xcbf29ce484222325u;
  int64_t elements = 0, numbers = 0;

  void add(uint64_t bits) { hash = (hash ^ bits) * 0x100000001b3u; }
  template <class T>
  void add(const std::vector<T>& out) {
    for (const T& x : out) {
      const auto value = Scalar::load(&x);
      uint64_t bits = 0;
      std::memcpy(&bits, &x, sizeof(x));
      add(value == value ? bits : 7);
      numbers += value == value;
    }
  }
  void print(const std::string& name) const {
    std::printf("%s %lld %lld %016llx\n", name.c_str(), static_cast<long long>(elements),
                static_cast<long long>(numbers), static_cast<unsigned long long>(hash));
  }
};

// Threads one after the other
int32_t in_shares(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*),
                  void* context) {
  for (; begin < end; begin += grain) run(begin, std::min(begin + grain, end), context);
  return 0;
}

// And all at a time
int32_t in_threads(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*),
                   void* context) {
  std::vector<std::thread> threads;
  for (; begin < end; begin += grain) {
    threads.emplace_back(run, begin, std::min(begin + grain, end), context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

template <class T>
struct Caller {
  int op;
  Form form;
  DType dtype;
  Digest digest;
  const Bounds* bounds = nullptr;
  ParallelFor parallel_for = in_shares;
  int64_t shift = 0;  // bytes by which operands begin within an element

  void call(const Layout& layout, const std::vector<uint64_t>& keys, const Values<T>& values) {
    std::vector<T> x(extent(layout, layout.x, op == kSamplesBackward));
    std::vector<T> scale(extent(layout, layout.scale));
    for (size_t i = 0; i < x.size(); ++i) x[i] = values(i, 0);
    for (size_t i = 0; i < scale.size(); ++i) scale[i] = values(i, 1);
    const bool each = op == kSample;
    digest.elements += numel(layout) * (each ? layout.samples : 1) * results();
    for (const std::vector<T>& out : run(layout, keys, x, scale)) digest.add(out);
  }

  int results() const { return op == kSamplesBackward ? 2 : 1; }

  std::vector<std::vector<T>> run(const Layout& layout, const std::vector<uint64_t>& keys,
                                  const std::vector<T>& x, const std::vector<T>& scale) const {
    const int64_t n = numel(layout);
    std::vector<std::vector<T>> out(results());
    for (std::vector<T>& result : out) {
      result.resize(extent(layout, layout.out, op == kSample));
      std::memset(static_cast<void*>(result.data()), 0xff, result.size() * sizeof(T));
    }
    Numbers key_strides(layout.sizes.size()), index_strides(layout.sizes.size());
    std::copy(layout.keys.begin(), layout.keys.end(), key_strides.begin());
    std::copy(layout.index.begin(), layout.index.end(), index_strides.begin());
    const int outer = static_cast<int>(layout.keys.size());
    int64_t segment_numel = 1;
    for (int d = static_cast<int>(layout.sizes.size()); d-- > outer;) {
      index_strides[d] = segment_numel;
      segment_numel *= layout.sizes[d];
    }
    Problem problem{};
    problem.form = form;
    problem.bounds = bounds;
    std::vector<char> shifted[2];
    const auto place = [&](int k, const std::vector<T>& operand) -> const void* {
      if (shift == 0) return operand.data();
      const size_t bytes = operand.size() * sizeof(T);
      shifted[k].resize(bytes + shift);
      if (bytes > 0) std::memcpy(shifted[k].data() + shift, operand.data(), bytes);
      return shifted[k].data() + shift;
    };
    problem.operands[0] = place(0, x);
    problem.operands[1] = place(1, scale);
    for (int i = 0; i < results(); ++i) problem.results[i] = out[i].data();
    problem.keys = keys.data();
    problem.first_index = layout.first_index;
    problem.ndim = static_cast<int>(layout.sizes.size());
    problem.sizes = layout.sizes.data();
    problem.operand_strides[0] = layout.x.data();
    problem.operand_strides[1] = layout.scale.data();
    for (int i = 0; i < results(); ++i) problem.result_strides[i] = layout.out.data();
    problem.index_strides = index_strides.data();
    problem.key_strides = key_strides.data();
    problem.outer_ndim = outer;
    problem.segment_numel = segment_numel;
    problem.samples = layout.samples;
    problem.sample_stride = layout.sample_stride;
    problem.sample_index_stride = layout.sample_index;
    problem.sample_key_stride = layout.sample_key;
    run_kernel(static_cast<Op>(op), dtype, problem, n, parallel_for);
    return out;
  }
};

constexpr Bounds kBounds{-9, 7, 0.25};
const uint64_t kOffsets[] = {0, (uint64_t{1} << 32) - 9, ~uint64_t{0} - 8};
constexpr uint64_t kSeed = ~uint64_t{0} - 58;

template <class T>
void digests(int op, Form form, DType dtype) {
  const std::string name = std::string(kDTypeNames[dtype]) + "/" + kNamedOps[op] +
                           (has_form(op) ? std::string("/") + form_name(form) : "");
  const auto group = [&](const std::string& what, const std::function<void(Caller<T>&)>& calls) {
    Caller<T> caller{op, form, dtype, {}};
    if (what.rfind("bounded", 0) == 0) caller.bounds = &kBounds;
    calls(caller);
    caller.digest.print(name + "/" + what);
  };
  group("sizes", [&](Caller<T>& c) {
    for (int64_t n = 1; n <= 300; ++n) c.call(row(n), {kSeed + n, 0}, plain<T>);
  });
  group("shares", [&](Caller<T>& c) { c.call(row(2 * kGrain + 77), {kSeed, 3}, plain<T>); });
  group("strides", [&](Caller<T>& c) {
    c.call({{19, 23}, {1, 19}, {46, 2}, {70, 3}}, {kSeed, 5}, plain<T>);
    c.call({{3, 5, 67}, {67, 0, 1}, {0, 67, 1}, {67, 201, 1}}, {kSeed, 6}, plain<T>);
  });
  group("broadcast", [&](Caller<T>& c) {
    c.call({{300}, {1}, {0}, {1}}, {kSeed, 8}, plain<T>);
    c.call({{45, 67}, {67, 1}, {1, 0}, {67, 1}}, {kSeed, 9}, plain<T>);
    c.call({{45, 64}, {64, 1}, {0, 1}, {64, 1}}, {kSeed, 10}, plain<T>);
    c.call({{7, 11, 13}, {0, 1, 11}, {13, 0, 1}, {143, 13, 1}}, {kSeed, 11}, plain<T>);
  });
  group("transposed", [&](Caller<T>& c) {
    c.call({{131, 149}, {1, 131}, {1, 131}, {1, 131}}, {kSeed, 12}, plain<T>);
    c.call({{1033, 21}, {1, 1033}, {21, 1}, {1, 1040}}, {kSeed, 13}, plain<T>);
    c.call({{5, 3, 517}, {1551, 1, 3}, {1551, 1, 3}, {1551, 1, 3}}, {kSeed, 14}, plain<T>);
    c.call({{37, 3, 260}, {1, 37, 111}, {780, 260, 1}, {3, 1, 111}}, {kSeed, 15}, plain<T>);
  });
  if (has_form(op)) {
    group("bounded", [&](Caller<T>& c) { c.call(row(3000), {kSeed, 16}, plain<T>); });
  }
  for (int operand = 0; operand < (op == kNoise ? 0 : 2); ++operand) {
    group(operand == 0 ? "extreme x" : "extreme scale", [&](Caller<T>& c) {
      c.call(row(sizeof(T) == 2 ? 65536 + 90 : 9000), {kSeed, 7},
             [&](uint64_t i, int of) { return of == operand ? extreme<T>(i) : plain<T>(i, of); });
    });
  }
  if (!draws(op)) return;
  group("short rows", [&](Caller<T>& c) {
    std::vector<uint64_t> keys;
    for (uint64_t r = 0; r < 2 * 1201; ++r) keys.push_back(mixed(r));
    for (int64_t n = 1; n <= 9; ++n) {
      c.call({{1201, n}, {n, 1}, {n, 1}, {n, 1}, {2}, {0}}, keys, plain<T>);
      c.call({{7, 61, n}, {61 * n, n, 1}, {1, 0, 0}, {n, 7 * n, 1}, {2, 14}, {0, 0}, n}, keys,
             plain<T>);
      c.call({{1201, n}, {1, 1201}, {n, 1}, {1, 1201}, {0}, {n + 2}, 3}, keys, plain<T>);
    }
  });
  if (op == kSample || op == kSamplesBackward) {
    group("samples", [&](Caller<T>& c) {
      std::vector<uint64_t> keys;
      for (uint64_t k = 0; k < 12; ++k) keys.push_back(mixed(k));
      for (const int64_t samples : {0, 1, 2, 5}) {
        for (const int64_t n : {1, 40, 41, 42, 43, 2049}) {
          Layout one = row(n);
          one.samples = samples;
          one.sample_stride = one.sample_index = n;
          c.call(one, keys, plain<T>);
          one.sample_index = 0;
          one.sample_key = 2;
          one.first_index = 3;
          c.call(one, keys, plain<T>);
        }
        c.call({{31, 150}, {1, 31}, {150, 1}, {1, 31}, {}, {}, 0, samples, 4650, 4650, 0}, keys,
               plain<T>);
        c.call({{6, 7}, {1, 8}, {0, 1}, {7, 1}, {2}, {0}, 0, samples, 99, 7, 0}, keys, plain<T>);
      }
    });
  }
  for (const uint64_t offset : kOffsets) {
    group("offset " + std::to_string(offset), [&](Caller<T>& c) {
      for (const int64_t n : {1, 7, 20, 31, 32, 33, 63, 65, 127, 130, 257}) {
        c.call(row(n), {kSeed, offset}, plain<T>);
        Layout late = row(n);
        late.first_index = (int64_t{1} << 33) - n;
        c.call(late, {kSeed, offset}, plain<T>);
      }
    });
    group("rows " + std::to_string(offset), [&](Caller<T>& c) {
      std::vector<uint64_t> keys;
      for (uint64_t r = 0; r < 37; ++r) {
        keys.push_back((r << 40) + r);
        keys.push_back(offset + r);
      }
      for (const int64_t n : {1, 3, 6, 15, 20, 60}) {
        const Layout whole{{37, n}, {n, 1}, {n, 1}, {n, 1}, {2}, {0}};
        // Every second row of a tensor with longer ones, from a later index on
        const Layout block{{18, n}, {n, 1}, {1, 18}, {2 * n, 2}, {4}, {3 * n + 1}, 5};
        c.call(whole, keys, plain<T>);
        c.call(block, keys, plain<T>);
      }
    });
  }
}

// Of a head: its term, how the scales are given, whether there is a sample, and a prior
struct HeadCase {
  Term term;
  bool draws;
  Form form;
  const Bounds* bounds;
  bool has_prior;
  Form prior_form;
};
constexpr const char* kTermNames[] = {"kl_divergence", "log_prob", "tanh_log_prob"};

template <class T>
struct HeadCaller {
  using S = std::conditional_t<std::is_same<T, double>::value, double, float>;
  bool backward;
  HeadCase of;
  DType dtype;
  Digest digest;
  ParallelFor parallel_for = in_shares;

  // Over the last `summed` dimensions. The means, and the gradient of z, are laid out as x, the
  // scales as scale.
  void call(const Layout& layout, int summed, const std::vector<uint64_t>& keys,
            const Values<T>& values) {
    const int64_t n = numel(layout), ndim = static_cast<int64_t>(layout.sizes.size());
    std::vector<T> operands[kMaxOperands], results[kMaxResults];
    Numbers index_strides(ndim), key_strides(ndim);
    Problem p{};
    p.row = 1;
    for (int64_t d = ndim - summed; d < ndim; ++d) p.row *= layout.sizes[d];
    for (int k = 0; k < kMaxOperands; ++k) {
      const bool is_prior = k == 2 || k == 3, is_grad = k == 4;
      if ((is_prior && !of.has_prior) || (is_grad && !(backward && of.draws))) continue;
      const Numbers& strides = k % 2 == 0 ? layout.x : layout.scale;
      operands[k].resize(extent(layout, strides));
      for (size_t i = 0; i < operands[k].size(); ++i) operands[k][i] = values(i, k);
      p.operands[k] = operands[k].data();
      p.operand_strides[k] = strides.data();
    }
    for (int k = 0; k < kMaxResults; ++k) {
      const bool of_mu = k == 0 && of.term != kLogProbTerm, of_prior = k > 1 && of.has_prior;
      if (backward ? !(of_mu || k == 1 || of_prior) : k > 0 || !of.draws) continue;
      results[k].resize(extent(layout, layout.out));
      std::memset(static_cast<void*>(results[k].data()), 0xff, results[k].size() * sizeof(T));
      p.results[k] = results[k].data();
      p.result_strides[k] = layout.out.data();
      digest.elements += n;
    }
    std::vector<S> totals(n / p.row, std::numeric_limits<S>::quiet_NaN());
    for (size_t i = 0; backward && i < totals.size(); ++i) totals[i] = 1 + S(i % 8) / 8;
    if (!backward) digest.elements += n / p.row;
    p.totals = backward ? nullptr : totals.data();
    p.grad_totals = backward ? totals.data() : nullptr;
    p.term = of.term;
    p.form = of.form;
    p.bounds = of.bounds;
    p.prior_form = of.prior_form;
    p.by_log_var = form_is_log_var(of.form, of.bounds) &&
                   (!of.has_prior || form_is_log_var(of.prior_form, nullptr));
    if (of.draws) p.keys = keys.data();
    p.first_index = layout.first_index;
    p.ndim = static_cast<int>(ndim);
    p.sizes = layout.sizes.data();
    p.outer_ndim = static_cast<int>(layout.keys.size());
    std::copy(layout.keys.begin(), layout.keys.end(), key_strides.begin());
    std::copy(layout.index.begin(), layout.index.end(), index_strides.begin());
    p.segment_numel = 1;
    for (int d = p.ndim; d-- > p.outer_ndim; p.segment_numel *= layout.sizes[d]) {
      index_strides[d] = p.segment_numel;
    }
    p.index_strides = index_strides.data();
    p.key_strides = key_strides.data();
    p.samples = 1;
    run_kernel(backward ? kHeadBackward : kHead, dtype, p, n, parallel_for);
    for (const std::vector<T>& result : results) digest.add(result);
    if (!backward) digest.add(totals);
  }
};

// Within 4 of 0, so that no quotient of scales leaves a half type's range
template <class T>
T mild(uint64_t i, int operand) {
  return element<T>(static_cast<double>(mixed(8 * i + operand) >> 40) * 0x1p-21 - 4);
}

template <class T>
void head_digests(DType dtype, bool backward, const HeadCase& of) {
  const std::string name = std::string(kDTypeNames[dtype]) +
                           (backward ? "/head_backward/" : "/head/") + kTermNames[of.term] +
                           (of.draws ? "/drawn/" : "/") + form_name(of.form) +
                           (of.bounds ? " bounded" : "") +
                           (of.has_prior ? std::string("/") + form_name(of.prior_form) : "");
  std::vector<uint64_t> keys;
  for (uint64_t r = 0; r < 80; ++r) keys.push_back(mixed(r));
  HeadCaller<T> rows{backward, of, dtype, {}};
  // Rows of few vectors, of more than 32 and up to a chunk, and of several chunks
  const int64_t chunk = kSumStride * kSumTerms * 16 / static_cast<int64_t>(sizeof(T));
  for (const int64_t n : {1, 2, 3, 4, 7, 8, 17, 33, 64, 100}) {
    rows.call({{13, n}, {n, 1}, {n, 1}, {n, 1}}, 1, keys, mild<T>);
  }
  for (const int64_t n : {int64_t{301}, chunk - 1, chunk, chunk + 1}) {
    rows.call(row(n), 1, keys, mild<T>);
  }
  rows.call(row(50), 0, keys, mild<T>);
  // Apart in memory, broadcast, over two dimensions, and under a key for each row, in a shard
  rows.call({{19, 23}, {1, 19}, {46, 2}, {70, 3}}, 1, keys, mild<T>);
  rows.call({{3, 5, 21}, {21, 0, 1}, {0, 21, 1}, {1, 3, 15}}, 2, keys, mild<T>);
  rows.call({{31, 11}, {11, 1}, {11, 1}, {11, 1}, {2}, {14}, 3}, 1, keys, mild<T>);
  rows.digest.print(name + "/rows");
  if (of.bounds) return;
  HeadCaller<T> extremes{backward, of, dtype, {}};
  // By itself, so that one that is no number leaves the sums of the others alone
  extremes.call(row(1500), 0, keys, [](uint64_t i, int operand) {
    return operand == static_cast<int>(i % 5) ? extreme<T>(i / 5) : mild<T>(i, operand);
  });
  extremes.digest.print(name + "/extreme");
}
template <class T>
void all_head_digests(DType dtype) {
  for (const bool backward : {false, true}) {
    for (Form form = 0; form < form_count(); ++form) {
      for (const Bounds* bounds : {static_cast<const Bounds*>(nullptr), &kBounds}) {
        head_digests<T>(dtype, backward, {kKlTerm, false, form, bounds, false, 0});
        head_digests<T>(dtype, backward, {kLogProbTerm, true, form, bounds, false, 0});
        head_digests<T>(dtype, backward, {kTanhLogProbTerm, true, form, bounds, false, 0});
      }
      for (Form prior = 0; prior < form_count(); ++prior) {
        head_digests<T>(dtype, backward, {kKlTerm, prior % 2 == 0, form, nullptr, true, prior});
      }
    }
  }
}

// Calls that have to give the same bits.
struct Comparison {
  int64_t calls = 0, differing = 0;

  void count(bool same, const std::string& name) {
    ++calls;
    differing += !same;
    if (!same) std::printf("%s differs\n", name.c_str());
  }
  int print() const {
    std::printf("%lld of %lld differ\n", static_cast<long long>(differing),
                static_cast<long long>(calls));
    return differing > 0;
  }
};

bool advance(Numbers& at, const Numbers& sizes) {
  for (size_t d = sizes.size(); d-- > 0; at[d] = 0) {
    if (++at[d] < sizes[d]) return true;
  }
  return false;
}
int64_t dot(const Numbers& a, const Numbers& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), int64_t{0});
}

// A problem with the same elements in row-major order, broadcast ones as often as they are used;
// element by element the results have to be the same.
template <class T>
void compare_with_rows(const Caller<T>& c, const Layout& layout, const std::vector<uint64_t>& keys,
                       const std::string& name, Comparison& comparison) {
  std::vector<T> x(extent(layout, layout.x)), scale(extent(layout, layout.scale)), x_rows,
      scale_rows;
  for (size_t i = 0; i < x.size(); ++i) x[i] = plain<T>(i, 0);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = plain<T>(i, 1);
  Layout rows = layout;
  for (size_t d = 0; d < rows.sizes.size(); ++d) {
    rows.out[d] = 1;
    for (size_t e = d + 1; e < rows.sizes.size(); ++e) rows.out[d] *= rows.sizes[e];
  }
  rows.x = rows.scale = rows.out;
  Numbers at(layout.sizes.size());
  do {
    x_rows.push_back(x[dot(at, layout.x)]);
    scale_rows.push_back(scale[dot(at, layout.scale)]);
  } while (advance(at, layout.sizes));
  const auto out = c.run(layout, keys, x, scale), expected = c.run(rows, keys, x_rows, scale_rows);
  bool same = true;
  do {
    for (size_t k = 0; k < out.size(); ++k) {
      const T &a = out[k][dot(at, layout.out)], &b = expected[k][dot(at, rows.out)];
      same = same && std::memcmp(&a, &b, sizeof(T)) == 0;
    }
  } while (advance(at, layout.sizes));
  comparison.count(same, name);
}

// The same of operands that begin within an element
template <class T>
void compare_unaligned(const Caller<T>& c, const Layout& layout, const std::vector<uint64_t>& keys,
                       const std::string& name, Comparison& comparison) {
  std::vector<T> x(extent(layout, layout.x, c.op == kSamplesBackward)),
      scale(extent(layout, layout.scale));
  for (size_t i = 0; i < x.size(); ++i) x[i] = plain<T>(i, 0);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = plain<T>(i, 1);
  Caller<T> shifted = c;
  shifted.shift = 1;
  const auto out = shifted.run(layout, keys, x, scale), expected = c.run(layout, keys, x, scale);
  bool same = true;
  for (size_t k = 0; k < out.size(); ++k) {
    same = same && std::memcmp(out[k].data(), expected[k].data(), out[k].size() * sizeof(T)) == 0;
  }
  comparison.count(same, name + " unaligned");
}

// K samples, each against a call of its own
template <class T>
void compare_samples(const Caller<T>& c, const Layout& layout, const std::vector<uint64_t>& keys,
                     const std::string& name, Comparison& comparison) {
  std::vector<T> x(extent(layout, layout.x)), scale(extent(layout, layout.scale));
  for (size_t i = 0; i < x.size(); ++i) x[i] = plain<T>(i, 0);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = plain<T>(i, 1);
  const std::vector<T> all = c.run(layout, keys, x, scale)[0];
  bool same = true;
  for (int64_t k = 0; k < layout.samples; ++k) {
    Layout one = layout;
    one.samples = 1;
    one.first_index += k * layout.sample_index;
    const std::vector<uint64_t> own(keys.begin() + k * layout.sample_key, keys.end());
    const std::vector<T> out = c.run(one, own, x, scale)[0];
    Numbers at(layout.sizes.size());
    do {
      const T &a = all[k * layout.sample_stride + dot(at, layout.out)], &b = out[dot(at, one.out)];
      same = same && std::memcmp(&a, &b, sizeof(T)) == 0;
    } while (advance(at, layout.sizes));
  }
  comparison.count(same, name);
}

// And the gradients of K samples against the sums that are written in reparam.h, of noise from
// a call of its own for each
template <class Form, class T>
void compare_sums(const Caller<T>& c, const Layout& layout, const std::vector<uint64_t>& keys,
                  const std::string& name, Comparison& comparison) {
  using R = typename Element<Scalar, T>::Register;
  using S = std::conditional_t<std::is_same<T, double>::value, double, float>;
  std::vector<T> x(extent(layout, layout.x, true)), scale(extent(layout, layout.scale));
  for (size_t i = 0; i < x.size(); ++i) x[i] = plain<T>(i, 0);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = plain<T>(i, 1);
  const auto out = c.run(layout, keys, x, scale);
  std::vector<std::vector<S>> noise;
  const DType wide = c.dtype == kDouble ? kDouble : kFloat;
  for (int64_t k = 0; k < layout.samples; ++k) {
    Layout one = layout;
    one.samples = 1;
    one.first_index += k * layout.sample_index;
    const std::vector<uint64_t> own(keys.begin() + k * layout.sample_key, keys.end());
    noise.push_back(Caller<S>{kNoise, kLogVar, wide, {}}.run(one, own, {}, {})[0]);
  }
  bool same = true;
  Numbers at(layout.sizes.size());
  do {
    R grad_mu = 0, grad_sigma = 0;
    for (int64_t k = 0; k < layout.samples; ++k) {
      const R grad_z = Scalar::load(&x[k * layout.sample_stride + dot(at, layout.x)]);
      grad_mu += grad_z;
      grad_sigma = std::fma(grad_z, noise[k][dot(at, layout.out)], grad_sigma);
    }
    const R of = Scalar::load(&scale[dot(at, layout.scale)]);
    const R grad_scale = c.bounds
                             ? Scale<Form>::template chain<Scalar>(grad_sigma, of, *c.bounds)
                             : Scale<Form>::template chain<Scalar>(grad_sigma, of, Unbounded{});
    const T expected[] = {element<T>(grad_mu), element<T>(grad_scale)};
    for (int i = 0; i < 2; ++i) {
      same = same && std::memcmp(&out[i][dot(at, layout.out)], &expected[i], sizeof(T)) == 0;
    }
  } while (advance(at, layout.sizes));
  comparison.count(same, name);
}
template <class... F, class T, class... Args>
void compare_sums_of(FormList<F...>, const Caller<T>& c, Args&... args) {
  Form form = 0;
  ((form++ == c.form ? compare_sums<F>(c, args...) : void()), ...);
}

std::string text(const Numbers& numbers) {
  std::string text;
  for (const int64_t n : numbers) text += (text.empty() ? "" : ",") + std::to_string(n);
  return "(" + text + ")";
}

template <class T>
void compare(DType dtype, Comparison& comparison) {
  std::vector<uint64_t> keys;
  for (uint64_t r = 0; r < 2 * 2600; ++r) keys.push_back(mixed(r));
  const std::vector<Layout> layouts = {
      {{300}, {1}, {0}, {1}},
      {{3000}, {2}, {1}, {3}},
      {{130, 12}, {24, 1}, {24, 1}, {12, 1}},
      {{130, 40}, {80, 1}, {1, 0}, {40, 1}},
      {{33, 70}, {70, 1}, {0, 1}, {70, 1}, {2}, {0}},
      {{131, 149}, {1, 131}, {1, 131}, {1, 131}},
      {{131, 149}, {1, 131}, {149, 1}, {149, 1}},
      {{131, 149}, {149, 1}, {1, 131}, {1, 140}, {4}, {0}, 2},
      {{1033, 21}, {1, 1033}, {21, 1}, {1, 1033}},
      {{70, 64}, {1, 70}, {1, 70}, {1, 70}, {}, {}, 6},
      {{2, 3, 517}, {1551, 1, 3}, {1551, 1, 3}, {1551, 1, 3}},
      {{2, 70, 260}, {18200, 1, 70}, {0, 0, 1}, {18200, 1, 70}, {0, 0}, {20000, 271}, 9},
      {{5, 3, 260}, {1, 5, 15}, {780, 260, 1}, {3, 1, 15}},
      {{2600, 1}, {1, 1}, {0, 0}, {1, 1}, {2}, {0}},
      {{2600, 3}, {3, 1}, {1, 2600}, {3, 1}, {2}, {0}},
      {{10, 260, 5}, {1, 50, 10}, {1300, 5, 1}, {1300, 5, 1}, {520, 2}, {0, 0}, 1},
      {{20, 130, 2, 3}, {6, 120, 3, 1}, {1, 20, 2600, 5200}, {780, 6, 3, 1}},
      {{3, 1700}, {1700, 1}, {1700, 1}, {1700, 1}, {2}, {0}, 3},
  };
  for (const bool bounded : {false, true}) {
    for (int op = 0; op < kNamed; ++op) {
      for (Form form = 0; form < (has_form(op) ? form_count() : 1); ++form) {
        const Caller<T> caller{op, form, dtype, {}, bounded ? &kBounds : nullptr};
        const std::string name = std::string(kDTypeNames[dtype]) + "/" + kNamedOps[op] + "/" +
                                 form_name(form) + (bounded ? "/bounded " : " ");
        for (const Layout& layout : layouts) {
          const std::string call = name + text(layout.sizes) + text(layout.x) + text(layout.out);
          compare_with_rows(caller, layout, keys, call, comparison);
          compare_unaligned(caller, layout, keys, call, comparison);
          if (op != kSample && op != kSamplesBackward) continue;
          for (const int64_t samples : {0, 1, 2, 5}) {
            for (const int64_t key_step : {0, 6}) {
              Layout many = layout;
              many.samples = samples;
              many.sample_stride = extent(layout, op == kSample ? layout.out : layout.x) + 1;
              many.sample_index = key_step == 0 ? numel(layout) : 0;
              many.sample_key = key_step;
              const std::string of = call + " x " + std::to_string(samples);
              std::vector<uint64_t> more = keys;
              more.resize(keys.size() + 30, 77);
              if (op == kSample) compare_samples(caller, many, more, of, comparison);
              if (op == kSamplesBackward) {
                compare_sums_of(Forms{}, caller, many, more, of, comparison);
              }
            }
          }
        }
      }
    }
  }
}

template <class T>
void edges(DType dtype) {
  std::vector<uint64_t> keys;
  for (uint64_t r = 0; r < 2 * 65; ++r) keys.push_back(mixed(r));
  Numbers lengths{127, 128, 129, 255, 256, 257, 2047, 2048, 2049};
  for (int64_t n = 1; n <= 65; ++n) lengths.push_back(n);
  Digest digest;
  const auto add = [&](const Digest& of) {
    digest.add(of.hash);
    digest.elements += of.elements;
    digest.numbers += of.numbers;
  };
  const auto call = [&](auto caller, auto calls) {
    for (const int64_t n : lengths) {
      calls(caller, Layout{{n}, {1}, {1}, {1}, {}, {}, n % 4});
      if (n > 65) continue;
      calls(caller, Layout{{5, n}, {n, 1}, {1, 0}, {n, 1}, {2}, {0}});
      calls(caller, Layout{{n, 5}, {1, n}, {5, 1}, {1, n}, {}, {}, 3});
    }
    add(caller.digest);
  };
  for (const Form form : {kLogVar, form_count() - 1}) {
    for (int op = 0; op < kNamed; ++op) {
      for (const int64_t shift : {0, 1}) {
        call(Caller<T>{op, form, dtype, {}, shift ? &kBounds : nullptr, in_shares, shift},
             [&](auto& c, Layout layout) {
               if (op == kSample || op == kSamplesBackward) {
                 layout.samples = 2;
                 layout.sample_stride = layout.sample_index = numel(layout);
               }
               c.call(layout, keys, plain<T>);
             });
      }
    }
    for (const bool backward : {false, true}) {
      for (const Term term : {kKlTerm, kLogProbTerm, kTanhLogProbTerm}) {
        const HeadCase of{term, true, form, nullptr, term == kKlTerm, kStd};
        call(HeadCaller<T>{backward, of, dtype, {}},
             [&](auto& c, const Layout& layout) { c.call(layout, 1, keys, mild<T>); });
      }
    }
  }
  digest.print(kDTypeNames[dtype]);
}

// The digest of large calls: rows, of one key and of a key each, rows apart in memory, samples, and
// heads of many rows and of long ones
template <class T>
uint64_t large_calls(int op, DType dtype, ParallelFor parallel_for) {
  std::vector<uint64_t> keys;
  for (uint64_t r = 0; r < 2 * 1300; ++r) keys.push_back(mixed(r));
  Digest digest;
  if (op < kNamed) {
    Caller<T> caller{op, kStd, dtype, {}, nullptr, parallel_for};
    caller.call(row(3 * kGrain + 77), keys, plain<T>);
    caller.call({{1201, 21}, {21, 1}, {21, 1}, {21, 1}, {2}, {0}}, keys, plain<T>);
    caller.call({{131, 149}, {1, 131}, {149, 1}, {1, 131}}, keys, plain<T>);
    Layout samples = row(kGrain + 5);
    samples.samples = 3;
    samples.sample_stride = samples.sample_index = numel(samples);
    if (op == kSample || op == kSamplesBackward) caller.call(samples, keys, plain<T>);
    return caller.digest.hash;
  }
  for (const Term term : {kKlTerm, kLogProbTerm, kTanhLogProbTerm}) {
    HeadCaller<T> caller{
        op == kHeadBackward, {term, true, kLogVar, nullptr, false, 0}, dtype, {}, parallel_for};
    caller.call({{1201, 21}, {21, 1}, {21, 1}, {21, 1}, {2}, {0}}, 1, keys, mild<T>);
    caller.call(
        {{3, 2 * kGrain + 5}, {2 * kGrain + 5, 1}, {2 * kGrain + 5, 1}, {2 * kGrain + 5, 1}}, 1,
        keys, mild<T>);
    digest.add(caller.digest.hash);
  }
  return digest.hash;
}

// Each op in a thread of its own, whose shares are threads again
template <class T>
void compare_threads(DType dtype, Comparison& comparison) {
  uint64_t found[kOps];
  std::vector<std::thread> threads;
  for (int op = 0; op < kOps; ++op) {
    threads.emplace_back(
        [&found, op, dtype] { found[op] = large_calls<T>(op, dtype, in_threads); });
  }
  for (std::thread& thread : threads) thread.join();
  for (int op = 0; op < kOps; ++op) {
    const bool same = found[op] == large_calls<T>(op, dtype, in_shares);
    comparison.count(same, std::string(kDTypeNames[dtype]) + "/" + std::to_string(op));
  }
}

void derived_digests() {
  const Kernels& kernels = cpu_kernels();
  std::vector<uint64_t> keys, data;
  for (uint64_t i = 0; i < 80; ++i) keys.push_back(mixed(i));
  for (uint64_t i = 0; i < 40; ++i) data.push_back(i < 4 ? ~uint64_t{0} - i : mixed(~i));
  const auto print = [](const std::string& name, const std::vector<uint64_t>& out) {
    Digest digest;
    for (const uint64_t word : out) digest.add(word);
    digest.elements = digest.numbers = static_cast<int64_t>(out.size());
    digest.print(name);
  };
  for (const uint64_t first : {uint64_t{0}, (uint64_t{1} << 32) - 3, ~uint64_t{0} - 2}) {
    for (const int64_t n : {1, 3}) {
      std::vector<uint64_t> out(2 * n * 21);
      kernels.child_keys(keys.data(), n, first, 21, out.data());
      print("child_keys/" + std::to_string(n) + "/" + std::to_string(first), out);
    }
  }
  for (const int64_t key_stride : {0, 2, 4}) {
    for (const int64_t data_stride : {0, 1, 2}) {
      std::vector<uint64_t> out(2 * 19);
      kernels.fold_in(keys.data(), key_stride, data.data(), data_stride, 19, out.data());
      print("fold_in/" + std::to_string(key_stride) + "/" + std::to_string(data_stride), out);
    }
  }
}

template <class T>
void all_digests(DType dtype) {
  for (int op = 0; op < kNamed; ++op) {
    for (Form form = 0; form < (has_form(op) ? form_count() : 1); ++form) {
      digests<T>(op, form, dtype);
    }
  }
}

template <class T>
void run_once(int op, Form form, DType dtype, int64_t n) {
  Caller<T>{op, form, dtype, {}}.call(row(n), {kSeed, 0}, [](uint64_t, int) { return T{}; });
}

template <class Names>
int place(const Names& names, const char* name) {
  const auto end = std::end(names);
  return static_cast<int>(std::find(std::begin(names), end, std::string(name)) - std::begin(names));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "isa") {
    std::printf("%s\n", cpu_kernels().isa);
  } else if (what == "digests") {
    all_digests<float>(kFloat);
    all_head_digests<float>(kFloat);
    all_digests<double>(kDouble);
    all_head_digests<double>(kDouble);
    all_digests<Half>(kHalf);
    all_head_digests<Half>(kHalf);
    all_digests<BFloat16>(kBFloat16);
    all_head_digests<BFloat16>(kBFloat16);
    derived_digests();
  } else if (what == "layouts") {
    Comparison comparison;
    const auto asked = [&](DType dtype) {
      return argc < 3 || std::string(argv[2]) == kDTypeNames[dtype];
    };
    if (asked(kFloat)) compare<float>(kFloat, comparison);
    if (asked(kDouble)) compare<double>(kDouble, comparison);
    if (asked(kHalf)) compare<Half>(kHalf, comparison);
    if (asked(kBFloat16)) compare<BFloat16>(kBFloat16, comparison);
    return comparison.print();
  } else if (what == "edges") {
    edges<float>(kFloat);
    edges<double>(kDouble);
    edges<Half>(kHalf);
    edges<BFloat16>(kBFloat16);
    derived_digests();
  } else if (what == "threads") {
    Comparison comparison;
    compare_threads<float>(kFloat, comparison);
    compare_threads<double>(kDouble, comparison);
    compare_threads<Half>(kHalf, comparison);
    compare_threads<BFloat16>(kBFloat16, comparison);
    return comparison.print();
  } else if (what == "run" && argc == 6) {
    const int op = place(kNamedOps, argv[2]), dtype = place(kDTypeNames, argv[4]);
    const Form form = form_id(argv[3], std::strlen(argv[3]));
    const int64_t n = std::atoll(argv[5]);
    if (dtype == kFloat) run_once<float>(op, form, kFloat, n);
    if (dtype == kDouble) run_once<double>(op, form, kDouble, n);
    if (dtype == kHalf) run_once<Half>(op, form, kHalf, n);
    if (dtype == kBFloat16) run_once<BFloat16>(op, form, kBFloat16, n);
  } else {
    return 2;
  }
}
