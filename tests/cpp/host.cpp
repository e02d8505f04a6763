// What csrc has for its binding beside the kernels: the list of forms, and keys derived from
// keys, by every lane type that this machine runs. Compiled by test_csrc.py.
//
//   host forms                                  each form: number, name, whether its backward reads
//   host form NAME                              its number
//   host children LANES FIRST COUNT KEY...      children FIRST, FIRST + 1, ... of each key
//   host fold_in LANES N KEY_STRIDE DATA_STRIDE WORD...   the words of the keys, then the data
//
// A key is two words, seed and offset; words are decimal, and so is the output.
#include <string>
#include <vector>

#include "lanes.h"

#include "../../csrc/common/forms.h"
#include "../../csrc/cpu/derive.h"

using namespace reparam_fused;

namespace {

std::vector<uint64_t> parsed(char** words, int n) {
  std::vector<uint64_t> numbers;
  for (int i = 0; i < n; ++i) numbers.push_back(std::strtoull(words[i], nullptr, 10));
  return numbers;
}

template <class V>
std::vector<uint64_t> derived(const std::string& what, const std::vector<uint64_t>& numbers) {
  if (what == "children") {
    const size_t n = (numbers.size() - 2) / 2, count = numbers[1];
    std::vector<uint64_t> out(2 * n * count);
    derive_children<V>(numbers.data() + 2, n, numbers[0], count, out.data());
    return out;
  }
  const int64_t n = numbers[0], key_stride = numbers[1], data_stride = numbers[2];
  const uint64_t* keys = numbers.data() + 3;
  std::vector<uint64_t> out(2 * n);
  const int64_t key_words = key_stride == 0 ? 2 : n * key_stride;
  derive_folded<V>(keys, key_stride, keys + key_words, data_stride, n, out.data());
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argv[1];
  if (what == "forms") {
    for (Form form = 0; form < form_count(); ++form) {
      std::printf("%d %s %d\n", form, form_name(form), form_backward_reads(form));
    }
    return 0;
  }
  if (what == "form") {
    std::printf("%d\n", form_id(argv[2], std::strlen(argv[2])));
    return 0;
  }
  const std::string lanes = argv[2];
  const auto numbers = parsed(argv + 3, argc - 3);
  std::vector<uint64_t> out;
  if (lanes == Scalar::kName) out = derived<Scalar>(what, numbers);
#if defined(__AVX2__)
  if (lanes == Avx2::kName) out = derived<Avx2>(what, numbers);
#endif
#if defined(__AVX512F__)
  if (lanes == Avx512::kName) out = derived<Avx512>(what, numbers);
#endif
#if defined(__aarch64__)
  if (lanes == Neon::kName) out = derived<Neon>(what, numbers);
#endif
  for (const uint64_t word : out) std::printf("%llu\n", static_cast<unsigned long long>(word));
}
