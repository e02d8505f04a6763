#pragma once

// The lane types that this machine runs. First of all, before csrc's headers.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/common/scalar.h"
#include "../../csrc/cpu/twice.h"
#if defined(__AVX2__)
#include "../../csrc/cpu/avx2.h"
#endif
#if defined(__AVX512F__)
#include "../../csrc/cpu/avx512.h"
#endif
#if defined(__aarch64__)
#include "../../csrc/cpu/neon.h"
#endif
