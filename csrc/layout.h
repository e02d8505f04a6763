#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/forms.h"

// From the shapes and strides of a call to the tables of a Problem, without torch.

namespace reparam_fused {

// An error for whoever calls an op directly: memory safety hangs on these checks.
// _validate.py has checked what a user gave, and has the better words.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "reparam_fused: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

constexpr int kMaxRank = 64;  // torch's own limit in many ops

// A tensor's sizes and strides, or sizes alone. Borrowed.
struct Shape {
  int64_t ndim;
  const int64_t *sizes, *strides;
};

using Sizes = std::vector<int64_t>;

inline Shape shape_of(const Sizes& sizes) {
  return {static_cast<int64_t>(sizes.size()), sizes.data(), nullptr};
}
inline std::optional<Shape> shape_of(const std::optional<Sizes>& sizes) {
  return sizes ? std::optional(shape_of(*sizes)) : std::nullopt;
}

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << '[';
  for (int64_t d = 0; d < shape.ndim; ++d) out << (d ? ", " : "") << shape.sizes[d];
  return out << ']';
}

inline bool same_sizes(const Shape& a, const Shape& b) {
  return a.ndim == b.ndim && std::equal(a.sizes, a.sizes + a.ndim, b.sizes);
}

inline int64_t numel(const Shape& shape) {
  int64_t numel = 1;
  for (int64_t d = 0; d < shape.ndim; ++d) numel *= shape.sizes[d];
  return numel;
}

inline bool is_row_major(const Shape& shape) {
  if (numel(shape) == 0) return true;  // as torch has it
  int64_t expected = 1;
  for (int64_t d = shape.ndim - 1; d >= 0; --d) {
    if (shape.sizes[d] != 1 && shape.strides[d] != expected) return false;
    expected *= shape.sizes[d];
  }
  return true;
}

// Whether the elements lie without gaps, the dimension order[0] innermost. Where a
// dimension of size 1 would go does not count.
inline bool is_packed(const Shape& shape, const int64_t* order) {
  int64_t expected = 1;
  for (int64_t i = 0; i < shape.ndim; ++i) {
    const int64_t d = order[i];
    if (shape.sizes[d] != 1 && shape.strides[d] != expected) return false;
    expected *= shape.sizes[d];
  }
  return true;
}

// Whether the elements lie without gaps in some order
inline bool is_packed(const Shape& shape) {
  auto left = std::count_if(shape.sizes, shape.sizes + shape.ndim, [](auto n) { return n != 1; });
  for (int64_t expected = 1; left > 0; --left) {
    int64_t d = 0;
    while (d < shape.ndim && (shape.sizes[d] == 1 || shape.strides[d] != expected)) ++d;
    if (d == shape.ndim) return false;
    expected *= shape.sizes[d];
  }
  return true;
}

// Of m keys the children that n numbers name, where one key or one number stands for as many
// as there are of the other; or, without numbers, num from `first` on. All lie contiguously.
struct Children {
  bool fit;
  Derivation derivation;
  int64_t sizes[3], strides[3];
  // (num, max(m, n), 2), or the last ndim dimensions of that with the first two as one
  Shape shape;

  Children(const Shape& keys, const Shape* data, uint64_t first, int64_t num, int64_t ndim) {
    const int64_t m = numel(keys) / 2, n = data ? numel(*data) : m, each = m == 1 ? n : m;
    const bool shaped = keys.ndim == (ndim < 3 ? 1 : 2) && keys.sizes[keys.ndim - 1] == 2;
    const bool one = data == nullptr || num == 1;
    fit = is_row_major(keys) && shaped && one && num >= 0 &&
          (data == nullptr || is_row_major(*data)) && (m == n || m == 1 || n == 1);
    derivation = {nullptr, m == 1 ? 0 : 2, each, nullptr, n != 1, first, num, nullptr};
    sizes[0] = num;
    sizes[1] = ndim < 3 ? num * each : each;
    sizes[2] = 2;
    strides[0] = static_cast<int64_t>(2 * static_cast<uint64_t>(each));  // torch refuses what wraps
    strides[1] = 2;
    strides[2] = 1;
    shape = {ndim, sizes + 3 - ndim, strides + 3 - ndim};
  }

  [[noreturn]] static void refuse(const std::string& dtype, const Shape& keys) {
    reparam_fused::refuse(
        "expected contiguous keys (m, 2) and numbers (n) of 64 bits on one device, got ", dtype,
        " ", keys);
  }
};

// What the scale is given as, and where the output lies in a larger tensor, of whose
// noise it takes its part: neither shape nor offset in a call of the whole.
struct HeadOptions {
  Term term;
  int64_t summed;  // of the last dimensions
  Form prior_form;
  std::optional<Bounds> prior_bounds;
};
struct Options {
  Form form = kLogVar;
  std::optional<Bounds> bounds = {};
  std::optional<Shape> global_shape = {}, global_offset = {};
  bool noise = true;
  // So many samples of each element: a dimension of the output before the others, or, where they
  // are summed, of the first operand.
  std::optional<int64_t> samples = {};
  bool summed = false;
  bool on_cpu = false;
  std::optional<HeadOptions> head = {};
};

inline Form form_of(const std::string& name) {
  const Form form = form_id(name.data(), name.size());
  if (form >= 0) return form;
  std::string names = form_name(0);
  for (Form i = 1; i < form_count(); ++i) names += std::string(" or ") + form_name(i);
  refuse("expected form to be ", names, ", got ", name);
}

// Of a backward, which takes the scale where its derivative depends on it
inline Form backward_form_of(const std::string& name, bool bounded, bool has_scale) {
  const Form form = form_of(name);
  if (has_scale == (bounded || form_backward_reads(form))) return form;
  refuse("sample_backward takes ", has_scale ? "no" : "a", " scale in the form ", name,
         bounded ? " within bounds" : "");
}

// As an op is given them: bounds are low, high and min_std.
using Text = const std::string&;
using Ints = const std::optional<Sizes>&;
using Numbers = const std::optional<std::vector<double>>&;
using Count = std::optional<int64_t>;

inline std::optional<Bounds> bounds_of(Numbers bounds) {
  if (!bounds) return std::nullopt;
  if (bounds->size() != 3) refuse("expected bounds of 3 numbers, got ", bounds->size());
  return Bounds{(*bounds)[0], (*bounds)[1], (*bounds)[2]};
}
inline Options options_of(Form form, Numbers bounds, Ints global_shape = {},
                          Ints global_offset = {}) {
  Options options{form};
  options.bounds = bounds_of(bounds);
  options.global_shape = shape_of(global_shape);
  options.global_offset = shape_of(global_offset);
  return options;
}
inline Options with_samples(Options options, Count samples) {
  if (samples && *samples < 0) refuse("expected samples not to be negative, got ", *samples);
  options.samples = samples;
  return options;
}
inline Options without_noise(Options options) {
  options.noise = false;
  return options;
}
inline Options summed(Options options) {
  options.summed = true;
  return options;
}

inline Term term_of(const std::string& name) {
  constexpr const char* kNames[kTerms] = {"kl_divergence", "log_prob", "tanh_log_prob"};
  for (int term = 0; term < kTerms; ++term) {
    if (name == kNames[term]) return static_cast<Term>(term);
  }
  refuse("expected term to be kl_divergence or log_prob or tanh_log_prob, got ", name);
}

// As torch promotes: a tensor without dimensions gives way to one with them.
inline DType promoted(DType x, int64_t x_ndim, DType scale, int64_t scale_ndim) {
  if (x == scale || (x_ndim > 0 && scale_ndim == 0)) return x;
  if (x_ndim == 0 && scale_ndim > 0) return scale;
  return x == kDouble || scale == kDouble ? kDouble : kFloat;
}

// In each dimension of the output, how far its elements are from each other: as
// operands, in the output, in the noise, and in the keys; and of a head as further operands.
enum { kX, kScale, kOut, kIndex, kKey, kLoc, kPrior, kGrad, kStrides };

class Dimensions {
 public:
  int64_t ndim;
  int64_t sizes[kMaxRank];
  int64_t strides[kStrides][kMaxRank];

  Shape shape() const { return {ndim, sizes, strides[kOut]}; }
  // Of each result
  Shape result(const Options& options) const {
    return options.summed ? Shape{ndim - 1, sizes + 1, strides[kOut] + 1} : shape();
  }

  // Of a head a further operand, which broadcasts to its result
  void add_operand(int table, const Shape& given) {
    bool fits = given.ndim <= ndim;
    for (int64_t d = 0; fits && d < ndim; ++d) {
      const int64_t i = d - ndim + given.ndim, n = i < 0 ? 1 : given.sizes[i];
      fits = n == 1 || n == sizes[d];
      strides[table][d] = i < 0 || n != sizes[d] ? 0 : given.strides[i];
    }
    if (!fits) refuse("expected a shape that broadcasts to ", shape(), ", got ", given);
  }
  // Its sums, of which each is of a row
  Shape sums(const HeadOptions& head) {
    if (head.summed < 0 || head.summed > ndim) {
      refuse("expected summed to be 0 to ", ndim, ", got ", head.summed);
    }
    int64_t stride = 1;
    for (int64_t d = ndim - head.summed - 1; d >= 0; --d) {
      strides[kIndex][d] = stride;  // of which nothing is known yet
      stride *= std::max<int64_t>(sizes[d], 1);
    }
    return {ndim - head.summed, sizes, strides[kIndex]};
  }

  // Of a call with these operands; a scale that is not read is that of x.
  void place(Shape x, const Shape* scale, Options* options) {
    int64_t sample_stride = 0;
    if (options->summed) {
      if (x.ndim < 1) refuse("expected a dimension of samples, got ", x);
      options->samples = x.sizes[0];
      sample_stride = x.strides[0];
      x = {x.ndim - 1, x.sizes + 1, x.strides + 1};
    }
    broadcast(x, scale ? *scale : x);
    options->head ? pack() : lay_out(x, scale ? *scale : x);
    if (options->samples) add_samples(*options->samples, sample_stride);
    // Of operands that there are not
    if (options->head) {
      for (int k = kLoc; k < kStrides; ++k) std::copy_n(strides[kOut], ndim, strides[k]);
    }
  }

  // The problem but for its memory, unless it is empty. Returns the elements of one sample, or of
  // all where they are a dimension like others.
  int64_t plan(const Shape& key, const Options& options, Problem* problem) {
    if (!options.noise && !options.head) sort_by_memory();
    problem->first_index = number(key, options);
    problem->samples = 1;
    if (const auto& head = options.head) {
      tables_ = kStrides;
      problem->term = head->term;
      problem->prior_form = head->prior_form;
      problem->prior_bounds = head->prior_bounds ? &*head->prior_bounds : nullptr;
      const bool has_prior = problem->operands[kPrior - kLoc + 2] != nullptr;
      problem->by_log_var =
          form_is_log_var(options.form, options.bounds ? &*options.bounds : nullptr) &&
          (!has_prior || form_is_log_var(head->prior_form, problem->prior_bounds));
      problem->row = 1;
      for (int64_t d = ndim - head->summed; d < ndim; ++d) problem->row *= sizes[d];
    } else if (options.samples && goes_in_turn(options)) {
      take_samples(problem, options.summed);
    }
    const int64_t numel = this->numel();
    // Of no samples there is nothing to go over; but for sums, which are 0.
    if (numel == 0 || (problem->samples == 0 && !options.summed)) return 0;
    merge();
    describe(problem);
    problem->form = options.form;
    problem->bounds = options.bounds ? &*options.bounds : nullptr;
    return numel;
  }

  int64_t numel() const { return reparam_fused::numel(shape()); }

  // The shape that both broadcast to
  void broadcast(const Shape& x, const Shape& scale) {
    ndim = std::max(x.ndim, scale.ndim);
    check_rank();
    int64_t numel = 1;
    for (int64_t d = 0; d < ndim; ++d) {
      const int64_t i = d - ndim + x.ndim, j = d - ndim + scale.ndim;
      const int64_t m = i < 0 ? 1 : x.sizes[i], n = j < 0 ? 1 : scale.sizes[j];
      if (m != n && m != 1 && n != 1) {
        refuse("expected shapes that broadcast, got ", x, " and ", scale);
      }
      sizes[d] = m == 1 ? n : m;
      strides[kX][d] = i < 0 || m != sizes[d] ? 0 : x.strides[i];
      strides[kScale][d] = j < 0 || n != sizes[d] ? 0 : scale.strides[j];
      numel = counted(numel, sizes[d]);
    }
  }

  // As the strides of the output, those that torch.add(x, scale) gives to its own: in
  // the common order of the operands, where they have one.
  void lay_out(const Shape& x, const Shape& scale) {
    int64_t order[kMaxRank];  // innermost first
    for (int64_t i = 0; i < ndim; ++i) order[i] = ndim - 1 - i;
    if (same_sizes(x, scale)) {
      if (numel() == 0 || (is_packed(x, order) && is_packed(scale, order))) return pack();
      constexpr int64_t channels_last[] = {1, 3, 2, 0};
      if (ndim == 4 && is_packed(x, channels_last) && is_packed(scale, channels_last)) {
        return pack_in(channels_last);
      }
      if (std::equal(x.strides, x.strides + ndim, scale.strides) && is_packed(x)) {
        std::copy_n(x.strides, ndim, strides[kOut]);
        return;
      }
    }
    // An insertion sort, as where two dimensions go may be left open
    bool row_major = true;
    for (int64_t i = 1; i < ndim; ++i) {
      for (int64_t inner = i - 1, outer = i; inner >= 0; --inner) {
        const int comparison = compare(order[inner], order[outer]);
        if (comparison < 0) break;
        if (comparison == 0) continue;
        std::swap(order[inner], order[outer]);
        outer = inner;
      }
    }
    for (int64_t i = 0; i < ndim; ++i) row_major = row_major && order[i] == ndim - 1 - i;
    row_major ? pack() : pack_in(order);
  }

  // A shape without operands, in row-major order
  void pack(const Shape& shape) {
    ndim = shape.ndim;
    check_rank();
    std::copy_n(shape.sizes, ndim, sizes);
    int64_t numel = 1;
    for (int64_t d = 0; d < ndim; ++d) numel = counted(numel, sizes[d]);
    pack();
    for (const int k : {kX, kScale}) std::copy_n(strides[kOut], ndim, strides[k]);
  }

  // A dimension of samples before the others, so far from each other in the first operand.
  void add_samples(int64_t samples, int64_t x_stride) {
    ++ndim;
    check_rank();
    int64_t stride = 1;
    for (int64_t d = ndim - 1; d > 0; --d) {
      sizes[d] = sizes[d - 1];
      for (auto& of : tables()) of[d] = of[d - 1];
      stride *= std::max<int64_t>(sizes[d], 1);
    }
    sizes[0] = samples;
    counted(stride, samples);
    strides[kX][0] = x_stride;
    strides[kScale][0] = 0;
    strides[kOut][0] = stride;
  }

  // Whether the samples of an element are made one after the other, which reads it once. Sums are,
  // in the order of the contract.
  bool goes_in_turn(const Options& options) const {
    // Of few elements there are many blocks to begin on a CPU, and on a GPU too few threads to hide
    // that a sample waits for the one before: 100 samples of 8 elements take a third of the time
    // side by side on a CPU. What is said of a GPU is modelled.
    constexpr int64_t kFewSamples = 16;
    const int64_t few = options.on_cpu ? 1 << 10 : 1 << 16;
    return options.summed || sizes[0] <= kFewSamples || numel() / sizes[0] >= few;
  }

  // And away again, to where a problem has it
  void take_samples(Problem* problem, bool summed) {
    problem->samples = sizes[0];
    problem->sample_stride = strides[summed ? kX : kOut][0];
    problem->sample_index_stride = strides[kIndex][0];
    problem->sample_key_stride = strides[kKey][0];
    --ndim;
    for (int64_t d = 0; d < ndim; ++d) {
      sizes[d] = sizes[d + 1];
      for (auto& of : tables()) of[d] = of[d + 1];
    }
  }

  // In the noise, numbered in row-major order of the whole, from 0 in each slice that a
  // key tells apart. One key for all samples does not: they are numbered within the slices of
  // the others. Returns the index of the first element.
  int64_t number(const Shape& key, const Options& options) {
    const int64_t batch = batch_of(key);
    const auto &whole = options.global_shape, &from = options.global_offset;
    if (whole.has_value() != from.has_value()) {
      refuse("expected global_shape and global_offset, or neither");
    }
    if (whole && (whole->ndim != ndim || from->ndim != ndim)) {
      refuse("expected global_shape and global_offset to have the ", ndim,
             " dimensions of the output");
    }
    int64_t stride = 1, first = 0;
    for (int64_t d = ndim - 1; d >= 0; --d) {
      const int64_t size = whole ? whole->sizes[d] : sizes[d];
      const int64_t offset = from ? from->sizes[d] : 0;
      // size - sizes[d] of the least number would overflow.
      if (offset < 0 || size < 0 || offset > size - sizes[d]) {
        refuse("dimension ", d, " of the output, ", sizes[d], " from ", offset, ", is not within ",
               size);
      }
      const bool numbered = d >= batch || (d == 0 && options.samples && key.sizes[0] == 1);
      strides[kKey][d] = d < batch && key.sizes[d] != 1 ? key.strides[d] : 0;
      strides[kIndex][d] = numbered ? stride : 0;
      if (!numbered) continue;
      // None of these is negative.
      if (size != 0 && stride > INT64_MAX / size) {
        refuse("expected global_shape to have less than 2^63 elements, got ",
               whole ? *whole : shape());
      }
      first += offset * stride;
      stride *= size;
    }
    return first;
  }

  // For a call without noise, in which no element has an index of its own: dimensions
  // in the order of memory, not of logic.
  void sort_by_memory() {
    for (int64_t i = 1; i < ndim; ++i) {
      for (int64_t d = i; d > 0 && strides[kOut][d - 1] < strides[kOut][d]; --d) {
        std::swap(sizes[d - 1], sizes[d]);
        for (auto& stride : tables()) std::swap(stride[d - 1], stride[d]);
      }
    }
  }

  // Neighbours become one where everything steps through them as through one.
  void merge() {
    int64_t merged = 0;  // the dimensions so far
    for (int64_t d = 0; d < ndim; ++d) {
      const int64_t size = sizes[d];
      if (size == 1) continue;
      bool joined = merged > 0;
      for (auto& stride : tables()) {
        joined = joined && stride[merged - 1] == stride[d] * size;
      }
      if (!joined) sizes[merged++] = 1;
      sizes[merged - 1] *= size;
      for (auto& stride : tables()) stride[merged - 1] = stride[d];
    }
    if (merged == 0) {
      sizes[0] = 1;
      for (auto& stride : tables()) stride[0] = 1;
      merged = 1;
    }
    ndim = merged;
  }

  // The tables of a problem, and its segments
  void describe(Problem* problem) const {
    problem->ndim = problem->outer_ndim = static_cast<int>(ndim);
    problem->segment_numel = 1;
    while (problem->outer_ndim > 0 &&
           strides[kIndex][problem->outer_ndim - 1] == problem->segment_numel) {
      problem->segment_numel *= sizes[--problem->outer_ndim];
    }
    problem->sizes = sizes;
    problem->operand_strides[0] = strides[kX];
    problem->operand_strides[1] = strides[kScale];
    for (int k = kLoc; k < tables_; ++k) problem->operand_strides[k - kLoc + 2] = strides[k];
    for (auto& result : problem->result_strides) result = strides[kOut];
    problem->index_strides = strides[kIndex];
    problem->key_strides = strides[kKey];
  }

  [[noreturn]] void refuse_key(const std::string& dtype, const Shape& key) const {
    refuse("expected a uint64 key of shape (2,) or (*batch, 2) for ", shape(),
           " on the same device, got ", dtype, " ", key);
  }

  // Whether a key of this shape tells slices of the output apart
  bool fits(const Shape& key) const {
    if (key.ndim < 1 || key.ndim > ndim + 1 || key.sizes[key.ndim - 1] != 2) return false;
    for (int64_t d = 0; d + 1 < key.ndim; ++d) {
      if (key.sizes[d] != 1 && key.sizes[d] != sizes[d]) return false;
    }
    return true;
  }

 private:
  // Those in use
  struct Tables {
    using Table = int64_t[kMaxRank];
    Table* first;
    int n;
    Table* begin() const { return first; }
    Table* end() const { return first + n; }
  };
  Tables tables() { return {strides, tables_}; }
  int tables_ = kLoc;

  // The elements of one dimension more. What 63 bits do not count is refused, if empty, too.
  static int64_t counted(int64_t numel, int64_t size) {
    if (size > 1 && numel > INT64_MAX / size) refuse("expected less than 2^63 elements");
    return size > 1 ? numel * size : numel;
  }

  void check_rank() const {
    if (ndim > kMaxRank) refuse("expected at most ", kMaxRank, " dimensions, got ", ndim);
  }

  // In row-major order an empty dimension counts as one of size 1.
  void pack() {
    int64_t stride = 1;
    for (int64_t d = ndim - 1; d >= 0; --d) {
      strides[kOut][d] = stride;
      stride *= std::max<int64_t>(sizes[d], 1);
    }
  }

  // The dimensions that a key tells apart: ones at the end of its batch leave theirs
  // within a slice.
  static int64_t batch_of(const Shape& key) {
    int64_t batch = std::max<int64_t>(key.ndim - 1, 0);
    while (batch > 0 && key.sizes[batch - 1] == 1) --batch;
    return batch;
  }

  void pack_in(const int64_t* order) {
    int64_t stride = 1;
    for (int64_t i = 0; i < ndim; ++i) {
      strides[kOut][order[i]] = stride;
      stride *= sizes[order[i]];
    }
  }

  // Whether dimension a lies outside of b (1), within it (-1), or it does not matter:
  // the first operand decides that has a stride in both.
  int compare(int64_t a, int64_t b) const {
    for (const int operand : {kX, kScale}) {
      const int64_t m = strides[operand][a], n = strides[operand][b];
      if (m == 0 || n == 0) continue;
      if (m != n) return m < n ? -1 : 1;
      if (sizes[a] > sizes[b]) return 1;
    }
    return 0;
  }
};

}  // namespace reparam_fused
