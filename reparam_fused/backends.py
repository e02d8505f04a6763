"""What runs where on this machine."""

from __future__ import annotations

from . import _ops


def backends() -> dict[str, str]:
    """Say which implementation serves which tensors, and why one is missing.

    Returns:
        dict: ``"cpu"`` names the instruction set in use, or says why the C++ extension is
        missing and how to get it; ``"reference"`` is the plain torch code that serves
        every device without a kernel.

    Example::

        >>> import reparam_fused
        >>> sorted(reparam_fused.backends())
        ['cpu', 'reference']
    """
    if _ops.extension is not None:
        cpu = f"C++ kernels, {_ops.extension.isa()}"
    else:
        cpu = f"missing ({_ops.missing_reason}): {_ops.HOW_TO_BUILD}"
    return {"cpu": cpu, "reference": "plain torch operations, any device"}
