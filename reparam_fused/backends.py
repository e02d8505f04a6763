"""What runs where on this machine."""

from __future__ import annotations

from . import _extensions


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
    if _extensions.cpu is not None:
        cpu = f"C++ kernels, {_extensions.cpu.isa()}"
    else:
        cpu = f"missing ({_extensions.cpu_missing_reason}): {_extensions.HOW_TO_BUILD}"
    if _extensions.cuda is not None:
        cuda = f"C++ kernels for compute capability {_extensions.cuda.archs()}"
    else:
        cuda = f"missing ({_extensions.cuda_missing_reason}): {_extensions.HOW_TO_BUILD_CUDA}"
    if not _extensions.has_triton:
        asked = _extensions.gpu_choice == "cuda"
        triton = f"missing ({'REPARAM_FUSED_GPU=cuda' if asked else 'pip install triton'})"
    elif _extensions.cuda is not None:
        triton = "kernels for Intel GPUs; for NVIDIA's too with REPARAM_FUSED_GPU=triton"
    else:
        triton = "kernels for NVIDIA, AMD and Intel GPUs"
    return {
        "cpu": cpu,
        "cuda": cuda,
        "triton": triton,
        "reference": "plain torch operations, any device",
    }
