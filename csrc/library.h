#pragma once

#include "cpu/dispatch.h"
#include "cpu/draw.h"
#include "cpu/keys.h"

namespace reparam_fused {

// What the library of the ops gives to the module of Python, by its address: so that neither is
// linked to the other, on any platform.
struct Library {
  decltype(&reparam_fused::run_kernel) run_kernel;
  decltype(&reparam_fused::derive_cpu) derive;
  decltype(&reparam_fused::word_tensor) word_tensor;
  decltype(&reparam_fused::draw_word) draw_word;
  decltype(&reparam_fused::key_tensor) key_tensor;
};

}  // namespace reparam_fused
