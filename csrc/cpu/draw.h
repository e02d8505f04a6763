#pragma once

#include <cstdint>

struct AtenTensorOpaque;

// Keys for calls on the CPU without one. The tensors that these give belong to the caller.

namespace reparam_fused {

// A word as a tensor of one element, which it outlives
AtenTensorOpaque* word_tensor(uint64_t* word);
// 64 bits of torch's own generator: one step of random64()
uint64_t draw_word();
// A key of these words on the device of a tensor, the CPU
AtenTensorOpaque* key_tensor(const uint64_t* words, AtenTensorOpaque* device);

}  // namespace reparam_fused
