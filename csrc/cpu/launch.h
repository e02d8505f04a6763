#pragma once

#include "../call.h"
#include "dispatch.h"

namespace reparam_fused {

// Elements below which a second thread costs more than it brings: about 8 us of work.
constexpr int64_t kGrain = 8192;

// Runs the kernel of an op over the tiles of a call, on torch's own threads.
inline void launch(Op op, const Call& call) {
  constexpr KernelTable Kernels::* of_op[] = {&Kernels::sample, &Kernels::sample_backward,
                                              &Kernels::noise, &Kernels::kl_divergence,
                                              &Kernels::kl_divergence_backward};
  if (call.numel() == 0) return;
  struct Job {
    Kernel kernel;
    const Problem& problem;
    int64_t numel;
  } job{(cpu_kernels().*of_op[op]).of[call.dtype()], call.problem(), call.numel()};
  if (job.numel <= kGrain) return job.kernel(job.problem, 0, job.numel);
  const auto run = [](int64_t begin, int64_t end, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.kernel(job.problem, begin * kMaxTile, std::min(end * kMaxTile, job.numel));
  };
  const int64_t tiles = (job.numel + kMaxTile - 1) / kMaxTile;
  check(torch_parallel_for(0, tiles, kGrain / kMaxTile, run, &job));
}

// A word as a tensor of one element, which it outlives
inline Owned word_tensor(uint64_t* word) {
  const int64_t one = 1;
  AtenTensorHandle tensor;
  check(torch_from_blob(word, 1, &one, &one, 0, aoti_torch_dtype_int64(),
                        aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(),
                        nullptr, 0, nullptr, nullptr));
  return Owned(tensor);
}

// 64 bits of a CPU generator, torch's own where none is given: one step of random64()
inline uint64_t draw_word(const std::optional<torch::stable::Generator>& generator) {
  uint64_t word = 0;
  StableIValue stack[] = {abi::from(word_tensor(&word).release()), abi::from(INT64_MIN),
                          abi::from(std::nullopt), abi::from(generator)};
  check(torch_call_dispatcher("aten::random_", "from", stack, TORCH_ABI_VERSION));
  const Owned drawn(abi::to<AtenTensorHandle>(stack[0]));
  return word;
}

inline Owned key_tensor(const uint64_t* words, const View& device) {
  Owned key = empty_key(device);
  void* data;
  check(torch_get_mutable_data_ptr(key.get(), &data));
  std::copy_n(words, 2, static_cast<uint64_t*>(data));
  return key;
}

}  // namespace reparam_fused
