"""What runs where on this machine."""

from __future__ import annotations

from . import _ops


def backends() -> dict[str, str]:
    """Say which implementation serves which tensors, and why one is missing.

    Returns:
        dict: ``"cpu"`` names the instruction set in use and ``"cuda"`` the compute
        capabilities with a binary, or they say why the extension is missing and how to get
        it; ``"triton"`` says which GPUs its kernels serve: all where the CUDA extension is
        missing, or left out by ``REPARAM_FUSED_GPU=triton`` in the environment;
        ``"reference"`` is the plain torch code that serves every device without a kernel.

    Example::

        >>> import reparam_fused
        >>> sorted(reparam_fused.backends())
        ['cpu', 'cuda', 'reference', 'triton']
    """
    if _ops.extension is not None:
        cpu = f"C++ kernels, {_ops.extension.isa()}"
    else:
        cpu = f"missing ({_ops.missing_reason}): {_ops.HOW_TO_BUILD}"
    if _ops.cuda_extension is not None:
        cuda = f"C++ kernels for compute capability {_ops.cuda_extension.archs()}"
    else:
        cuda = f"missing ({_ops.cuda_missing_reason}): {_ops.HOW_TO_BUILD_CUDA}"
    if not _ops.has_triton:
        asked = _ops.gpu_choice == "cuda"
        triton = f"missing ({'REPARAM_FUSED_GPU=cuda' if asked else 'pip install triton'})"
    elif _ops.cuda_extension is not None:
        triton = "kernels for Intel GPUs; for NVIDIA's too with REPARAM_FUSED_GPU=triton"
    else:
        triton = "kernels for NVIDIA, AMD and Intel GPUs"
    return {
        "cpu": cpu,
        "cuda": cuda,
        "triton": triton,
        "reference": "plain torch operations, any device",
    }
