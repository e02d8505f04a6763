#pragma once

#include <cstddef>
#include <cstring>

#include "problem.h"
#include "reparam.h"

// The list of forms as the binding asks for it. Not for the files of kernels: what they
// share with others has to be a template over the lane type.

namespace reparam_fused {

constexpr int form_count() { return Forms::kSize; }
constexpr const char* form_name(Form form) { return Forms::kNames[form]; }
// Whether sample_backward reads the scale.
constexpr bool form_backward_reads(Form form) { return Forms::kBackwardReads[form]; }

// Whether sigma is nothing but a power of e
constexpr bool form_is_log_var(Form form, const Bounds* bounds) {
  return Forms::kLogVars[form] != 0 && (bounds == nullptr || bounds->min_std == 0);
}

// The form of this name, or -1.
inline Form form_id(const char* name, size_t length) {
  for (Form form = 0; form < form_count(); ++form) {
    const char* known = form_name(form);
    if (std::strlen(known) == length && std::memcmp(known, name, length) == 0) return form;
  }
  return -1;
}

}  // namespace reparam_fused
