#pragma once

#include <cstdint>
#include <string>

// The part of the CUDA driver's interface that a launch takes, looked up in the driver's own
// library with the first tensor on a GPU. Nothing of CUDA is linked, or needed to compile: one
// binary serves machines with a GPU and without, and every release of the CUDA runtime.

namespace reparam_fused {

using CudaStream = void*;
using CudaKernel = void*;  // of every device

// Where the kernels lie, a fat binary, and why they are not to be used: "" where they are. It is
// read with the first tensor on a GPU: later, another makes no difference.
void use_cuda_image(const char* path, const char* why_not);

// Null where the kernels serve the device, or why they do not, words that stay. The driver is
// asked once for each device, at its first tensor. Throws for what may pass, such as a lack of
// memory or the fault of an earlier kernel.
const char* cuda_refusal(int device);
// The same of what has been asked, without asking: "" where nothing is known against it.
const char* known_cuda_refusal(int device);

// On a device that is served and current. These throw in the driver's words.
CudaKernel find_cuda_kernel(const std::string& name, int device);
void launch_cuda(CudaKernel kernel, int64_t blocks, unsigned threads, int device, CudaStream stream,
                 void** arguments);

}  // namespace reparam_fused
