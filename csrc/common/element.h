#pragma once

#include <cstdint>

namespace reparam_fused {

// Storage of the half types; arithmetic on them is done in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What an element of T is computed in, and how many of them a counter gives.
template <class V, class T>
struct Element {
  using Register = typename V::F;
  static constexpr int kPerCounter = 4;
};
template <class V>
struct Element<V, double> {
  using Register = typename V::D;
  static constexpr int kPerCounter = 2;
};

}  // namespace reparam_fused
