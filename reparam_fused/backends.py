"""What runs where on this machine."""

from __future__ import annotations

from . import _extensions


def backends() -> dict[str, str]:
    """Say which implementation serves which tensors, and why one is missing.

    Returns:
        dict: ``"cpu"`` names the instruction set in use and ``"cuda"`` the compute
            capabilities with machine code, or they say why there are no compiled kernels and how
            to get them; the CUDA kernels are loaded with the first tensor on a GPU, and ``"cuda"``
            says from then on on which GPUs they cannot run. ``"triton"`` says which GPUs its
            kernels serve: those, or all where the CUDA kernels are missing or left out by
            ``REPARAM_FUSED_GPU=triton`` in the environment; ``"reference"`` is the plain torch
            code that serves every device without a kernel.

    Examples:
        >>> import reparam_fused
        >>> sorted(reparam_fused.backends())
        ['cpu', 'cuda', 'reference', 'triton']
    """
    if _extensions.library is not None:
        cpu = f"C++ kernels, {_extensions.isa()}"
    else:
        cpu = f"missing ({_extensions.missing_reason}): {_extensions.how_to_build()}"
    if _extensions.has_cuda:
        cuda = f"C++ kernels for compute capability {' '.join(_extensions.cuda_archs())}"
        for device, reason in _extensions.cuda_refusals().items():
            cuda += f"; cuda:{device} is left to Triton, for {reason}"
    else:
        cuda = f"missing ({_extensions.cuda_missing_reason}): {_extensions.how_to_build_cuda()}"
    if not _extensions.has_triton:
        asked = _extensions.gpu_choice == "cuda"
        triton = f"missing ({'REPARAM_FUSED_GPU=cuda' if asked else 'pip install triton'})"
    elif _extensions.has_cuda:
        triton = "kernels for Intel GPUs, and for NVIDIA's that the CUDA kernels do not serve"
    else:
        triton = "kernels for NVIDIA, AMD and Intel GPUs"
    return {
        "cpu": cpu,
        "cuda": cuda,
        "triton": triton,
        "reference": "plain torch operations, any device",
    }
