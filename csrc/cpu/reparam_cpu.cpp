#include "../ops.h"
#include "launch.h"

// The CPU side of the ops.

namespace reparam_fused {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}
  Tensor run(Op op, Call&& call) const {
    call.allocate();
    launch(op, call);
    return call.take_out();
  }
};

// An empty call leaves the generator alone, as torch.randn(0) does.
std::tuple<Tensor, Tensor> sample(const Tensor& mu, const Tensor& scale,
                                  const std::optional<torch::stable::Generator>& generator,
                                  const std::string& form) {
  Call call(mu, scale, std::nullopt, {form_of(form)});
  call.allocate();
  const uint64_t key[] = {call.numel() == 0 ? 0 : draw_word(generator), 0};
  call.use_key(key);
  launch(kSample, call);
  return {call.take_out(), Tensor(key_tensor(key, mu).release())};
}

// Which tensor of its own a draw in a graph is given makes no difference to it.
std::tuple<Tensor, Tensor> sample_fresh(const Tensor& mu, const Tensor& scale, const Tensor&,
                                        const std::string& form) {
  return sample(mu, scale, std::nullopt, form);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reparam_fused, CPU, m) {
  Ops<Cpu>::add_to(m);
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("sample_fresh", TORCH_BOX(&sample_fresh));
}

}  // namespace reparam_fused
