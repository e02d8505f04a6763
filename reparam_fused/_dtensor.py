"""DTensor: each rank samples its shard, with the noise of its place in the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import _draw, reference


def _output_placements(shape: torch.Size, *operands: DTensor) -> list[Placement]:
    """On each dimension of the mesh the shards of the first operand that has some there."""
    placements: list[Placement] = [Replicate()] * operands[0].device_mesh.ndim
    for operand in reversed(operands):
        added = len(shape) - operand.dim()
        for i, placement in enumerate(operand.placements):
            # A strided shard is no block of the whole.
            if type(placement) is Shard:
                dim = placement.dim % operand.dim()
                if operand.shape[dim] == shape[dim + added]:
                    placements[i] = Shard(dim + added)
    return placements


def _block(
    shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[list[int], list[int]]:
    """The shape and the offset of this rank's block, cut on each mesh dimension as by chunk.

    torch's own function for this goes through tensors, which torch.compile cannot follow.
    """
    local_shape, offset = list(shape), [0] * len(shape)
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            dim = placement.dim
            size = local_shape[dim]
            chunk = -(-size // mesh.size(i))
            first = min(size, chunk * mesh.get_local_rank(i))
            local_shape[dim] = min(chunk, size - first)
            offset[dim] += first
    return local_shape, offset


def _local(operand: DTensor, shape: torch.Size, placements: Sequence[Placement]) -> Tensor:
    """This rank's part of an operand; where it broadcasts, its gradient is a sum over ranks."""
    added = len(shape) - operand.dim()
    own: list[Placement] = []
    of_gradient: list[Placement] = []
    for placement in placements:
        if not isinstance(placement, Shard):
            own.append(Replicate())
            of_gradient.append(Replicate())
            continue
        dim = placement.dim - added
        broadcast = dim < 0 or operand.shape[dim] != shape[placement.dim]
        own.append(Replicate() if broadcast else Shard(dim))
        of_gradient.append(Partial() if broadcast else Shard(dim))
    local: Tensor = operand.redistribute(placements=own).to_local(grad_placements=of_gradient)
    return local


def _shared_key(
    mesh: DeviceMesh, device: torch.device, generator: torch.Generator | None, blocks: int
) -> Tensor:
    """A key drawn by the first rank of the mesh. All generators move on alike."""
    key = _draw.draw_key(device, generator, blocks)
    for dim in range(mesh.ndim):
        distributed.broadcast(key.view(torch.int64), group=mesh.get_group(dim), group_src=0)
    return key


def _meta(*tensors: DTensor) -> Tensor:
    """The whole result, without its memory."""
    return torch.add(
        *(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors)
    )


def _checked(function: str, mu: Tensor, name: str, scale: object) -> tuple[DTensor, DTensor]:
    """mu and a scale of this name, which must both be DTensors, on one mesh."""
    if not isinstance(mu, DTensor) or not isinstance(scale, DTensor):
        raise RuntimeError(
            f"{function}(): mu and {name} must both be DTensors, "
            f"got {type(mu).__name__} and {type(scale).__name__}"
        )
    if scale.device_mesh != mu.device_mesh:
        raise RuntimeError(
            f"{function}(): mu and {name} must be on the same mesh, "
            f"got {mu.device_mesh} and {scale.device_mesh}"
        )
    return mu, scale


def _as_whole(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], whole: Tensor
) -> DTensor:
    """The DTensor that is laid out as the whole, of this rank's part."""
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def elementwise(
    function: str,
    call: Callable[..., Tensor],
    mu: Tensor,
    form: str,
    scale: Tensor | float,
    options: dict[str, Any],
) -> DTensor:
    """A call of this name, of DTensors, in which every element is on its own."""
    mu, scale = _checked(function, mu, form, scale)
    whole = _meta(mu, scale)
    placements = _output_placements(whole.shape, mu, scale)
    local_mu, local_scale = (_local(t, whole.shape, placements) for t in (mu, scale))
    local = call(local_mu, **{form: local_scale}, **options)
    return _as_whole(local, mu.device_mesh, placements, whole)


def reparameterize(
    call: Callable[..., Tensor],
    mu: Tensor,
    form: str,
    scale: Tensor | float,
    key: Tensor | None,
    generator: torch.Generator | None,
    options: dict[str, Any],
) -> DTensor:
    """fused_reparameterize, which is `call`, of DTensors."""
    mu, scale = _checked("fused_reparameterize", mu, form, scale)
    mesh = mu.device_mesh
    one = _meta(mu, scale)
    placements = _output_placements(one.shape, mu, scale)
    local_mu, local_scale = (_local(t, one.shape, placements) for t in (mu, scale))
    # The dimensions of samples come before those that the mesh cuts.
    sample_shape: tuple[int, ...] = tuple(options["sample_shape"])
    n = len(sample_shape)
    whole = one if n == 0 else reference.output_of_samples(one, math.prod(sample_shape))
    if n > 1:
        whole = whole.view(*sample_shape, *one.shape)
    shape = whole.shape
    placements = [Shard(p.dim + n) if isinstance(p, Shard) else p for p in placements]
    local_shape, offset = _block(shape, mesh, placements)
    if key is None:
        samples = math.prod(sample_shape) if n > 0 else None
        key = _shared_key(mesh, mu.device, generator, _draw.blocks(mu, scale, samples))
    elif isinstance(key, DTensor):
        key = key.full_tensor()
    # Dimensions that the key tells apart are cut with the key, and count from 0: but not those
    # of samples, in which none is cut.
    _, batch = reference.slice_keys(key, shape)
    for dim in range(batch):
        if key.size(dim) > 1:
            key = key.narrow(dim, offset[dim], local_shape[dim])
    global_shape = (*local_shape[:batch], *shape[batch:])
    global_offset = (*[0] * batch, *offset[batch:])
    z = call(
        local_mu,
        **{form: local_scale},
        **options,
        key=key,
        global_shape=global_shape,
        global_offset=global_offset,
    )
    return _as_whole(z, mesh, placements, whole)
