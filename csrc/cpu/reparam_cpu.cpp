#include "../call.h"
#include "dispatch.h"
#include "draw.h"
#include "keys.h"

// The CPU side of the ops.

namespace reparam_fused {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}
  template <Boxed boxed>
  static void add(abi::StableLibrary& m, const char* name) {
    m.impl(name, boxed);
  }
  static Tensor run(Op op, Call&& call) {
    check(run_kernel(op, call.dtype(), call.problem(), call.numel(), torch_parallel_for));
    return call.take_out();
  }
  static void derive(const Derivation& d) { derive_cpu(d); }
};

uint64_t draw_word(const std::optional<torch::stable::Generator>& generator) {
  uint64_t word = 0;
  const Owned tensor(word_tensor(&word));
  call_aten("aten::random_", "from", tensor.get(), INT64_MIN, std::nullopt, generator);
  return word;
}

// An empty call leaves the generator alone, as torch.randn(0) does.
std::tuple<Tensor, Tensor> sample(const Tensor& mu, const Tensor& scale,
                                  const std::optional<torch::stable::Generator>& generator,
                                  Text form, Numbers bounds, Count samples) {
  Call call(mu, scale, std::nullopt, with_samples(options_of(form_of(form), bounds), samples));
  const uint64_t key[] = {call.draws() == 0 ? 0 : draw_word(generator), 0};
  call.use_key(key);
  return {Cpu::run(kSample, std::move(call)), Tensor(key_tensor(key, mu.get()))};
}

// Which tensor of its own a draw in a graph is given makes no difference to it.
std::tuple<Tensor, Tensor> sample_fresh(const Tensor& mu, const Tensor& scale, const Tensor&,
                                        Text form, Numbers bounds, Count samples) {
  return sample(mu, scale, std::nullopt, form, bounds, samples);
}

}  // namespace

AtenTensorHandle word_tensor(uint64_t* word) {
  const int64_t one = 1;
  AtenTensorHandle tensor;
  check(torch_from_blob(word, 1, &one, &one, 0, aoti_torch_dtype_int64(),
                        aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(),
                        nullptr, 0, nullptr, nullptr));
  return tensor;
}

uint64_t draw_word() { return draw_word(std::nullopt); }

AtenTensorHandle key_tensor(const uint64_t* words, AtenTensorHandle device) {
  Owned key = empty_key(device);
  void* data;
  check(torch_get_mutable_data_ptr(key.get(), &data));
  std::copy_n(words, 2, static_cast<uint64_t*>(data));
  return key.release();
}

STABLE_TORCH_LIBRARY_IMPL(reparam_fused, CPU, m) {
  Ops<Cpu>::add_to(m);
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_fresh", TORCH_BOX(&sample_fresh));
}

}  // namespace reparam_fused
