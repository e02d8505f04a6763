// The kernels of one ISA, without torch, over a fixed list of problems. Compiled by
// test_aarch64.py for two architectures, which have to print the same. What the problems are
// of is made of integers and exact steps, so that no library's functions enter.
//
//   kernels isa                   the ISA that is taken; REPARAM_FUSED_ISA asks for one
//   kernels digests               a line for each group of problems: its name, the number of
//                                 elements computed, how many of them are no NaN, and a hash
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
#include <vector>

#include "../../csrc/common/forms.h"
#include "../../csrc/common/scalar.h"
#include "../../csrc/cpu/dispatch.h"

using namespace reparam_fused;

namespace {

constexpr const char* kNamedOps[] = {"sample", "sample_backward", "noise", "kl_divergence",
                                     "kl_divergence_backward"};
constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16"};
bool has_form(int op) { return op <= kSampleBackward; }
bool draws(int op) { return op <= kNoise; }

using Numbers = std::vector<int64_t>;
struct Layout {
  Numbers sizes, x, scale, out;
  // Of the dimensions that segments are counted in: words from key to key, elements from
  // index to index
  Numbers keys = {}, index = {};
  int64_t first_index = 0;
};

Layout row(int64_t n) { return {{n}, {1}, {1}, {1}}; }
int64_t numel(const Layout& layout) {
  return std::accumulate(layout.sizes.begin(), layout.sizes.end(), int64_t{1}, std::multiplies<>());
}
// The elements of memory that these strides reach
int64_t extent(const Layout& layout, const Numbers& strides) {
  int64_t last = 0;
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

template <class T>
struct Caller {
  int op;
  Form form;
  DType dtype;
  Digest digest;

  void call(const Layout& layout, const std::vector<uint64_t>& keys, const Values<T>& values) {
    const int64_t n = numel(layout);
    std::vector<T> x(extent(layout, layout.x)), scale(extent(layout, layout.scale));
    std::vector<T> out(extent(layout, layout.out));
    for (size_t i = 0; i < x.size(); ++i) x[i] = values(i, 0);
    for (size_t i = 0; i < scale.size(); ++i) scale[i] = values(i, 1);
    std::memset(static_cast<void*>(out.data()), 0xff, out.size() * sizeof(T));
    Numbers key_strides(layout.sizes.size()), index_strides(layout.sizes.size());
    std::copy(layout.keys.begin(), layout.keys.end(), key_strides.begin());
    std::copy(layout.index.begin(), layout.index.end(), index_strides.begin());
    const int outer = static_cast<int>(layout.keys.size());
    int64_t segment_numel = n;
    for (int d = 0; d < outer; ++d) segment_numel /= layout.sizes[d];
    const Problem problem{form,
                          x.data(),
                          scale.data(),
                          out.data(),
                          keys.data(),
                          layout.first_index,
                          static_cast<int>(layout.sizes.size()),
                          layout.sizes.data(),
                          layout.x.data(),
                          layout.scale.data(),
                          layout.out.data(),
                          index_strides.data(),
                          key_strides.data(),
                          outer,
                          segment_numel};
    run_kernel(static_cast<Op>(op), dtype, problem, n, in_shares);
    digest.elements += n;
    digest.add(out);
  }
};

const uint64_t kOffsets[] = {0, (uint64_t{1} << 32) - 9, ~uint64_t{0} - 8};
constexpr uint64_t kSeed = ~uint64_t{0} - 58;

template <class T>
void digests(int op, Form form, DType dtype) {
  const std::string name = std::string(kDTypeNames[dtype]) + "/" + kNamedOps[op] +
                           (has_form(op) ? std::string("/") + form_name(form) : "");
  const auto group = [&](const std::string& what, const std::function<void(Caller<T>&)>& calls) {
    Caller<T> caller{op, form, dtype, {}};
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
  for (int operand = 0; operand < (op == kNoise ? 0 : 2); ++operand) {
    group(operand == 0 ? "extreme x" : "extreme scale", [&](Caller<T>& c) {
      c.call(row(sizeof(T) == 2 ? 65536 + 90 : 9000), {kSeed, 7},
             [&](uint64_t i, int of) { return of == operand ? extreme<T>(i) : plain<T>(i, of); });
    });
  }
  if (!draws(op)) return;
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
  for (int op = 0; op <= kKlDivergenceBackward; ++op) {
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
    all_digests<double>(kDouble);
    all_digests<Half>(kHalf);
    all_digests<BFloat16>(kBFloat16);
    derived_digests();
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
