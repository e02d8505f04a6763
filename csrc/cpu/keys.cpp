#include "keys.h"

#include "dispatch.h"

namespace reparam_fused {

void derive_cpu(const Derivation& d) {
  if (d.data == nullptr) return child_keys_cpu(d.keys, d.n, d.first, d.count, d.out);
  fold_in_cpu(d.keys, d.key_stride, d.data, d.data_stride, d.n, d.out);
}

void child_keys_cpu(const uint64_t* keys, int64_t n, uint64_t first, int64_t count, uint64_t* out) {
  cpu_kernels().child_keys(keys, n, first, count, out);
}

void fold_in_cpu(const uint64_t* keys, int64_t key_stride, const uint64_t* data,
                 int64_t data_stride, int64_t n, uint64_t* out) {
  cpu_kernels().fold_in(keys, key_stride, data, data_stride, n, out);
}

}  // namespace reparam_fused
