"""What torch.compile's partitioner is told of a draw: imported where a graph is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._functorch import config
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointPolicy


@contextmanager
def drawn_once() -> Iterator[None]:
    """A draw that is traced within has one outcome in the forward and in its backward.

    With an activation memory budget below 1 the partitioner draws again what it was told
    never to recompute (pytorch issue 190758). What may be recomputed it draws from the
    saved state of the generator. Where the budget is 1 it keeps the outcome, if not told.
    """
    if config.activation_memory_budget == 1:
        yield
        return
    mode = get_proxy_mode()
    inputs = mode.tracer.graph.find_nodes(op="placeholder") if mode is not None else ()
    # A forward and a backward in one graph: torch refuses a marked draw in any other.
    if not any("tangents" in str(node.target) for node in inputs):
        yield
        return
    meta = traceback.get_current_meta()
    outer = {name: meta[name] for name in ("recompute",) if name in meta}
    meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    try:
        yield
    finally:
        del meta["recompute"]
        meta.update(outer)
