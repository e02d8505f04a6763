"""DTensor: each rank samples its shard, with the noise of its place in the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import _draw, _validate, reference


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


def _place(
    whole: torch.Size,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    key: Tensor,
) -> dict[str, Any]:
    """This rank's block of the noise, and the keys for it."""
    local_shape, offset = _block(whole, mesh, placements)
    if isinstance(key, DTensor):
        key = key.full_tensor()
    # Dimensions that the key tells apart are cut with the key, and count from 0: but not those
    # of samples, in which none is cut.
    _, batch = reference.slice_keys(key, whole)
    for dim in range(batch):
        if key.size(dim) > 1:
            key = key.narrow(dim, offset[dim], local_shape[dim])
    return {
        "key": key,
        "global_shape": (*local_shape[:batch], *whole[batch:]),
        "global_offset": (*[0] * batch, *offset[batch:]),
    }


def _drawing(
    mu: DTensor,
    scale: DTensor,
    whole: torch.Size,
    placements: Sequence[Placement],
    key: Tensor | None,
    generator: torch.Generator | None,
    sample_shape: Sequence[int],
) -> tuple[list[Placement], dict[str, Any]]:
    """The placements of samples, of one's; and what tells a plain call its place in the whole."""
    mesh, n = mu.device_mesh, len(sample_shape)
    # The dimensions of samples come before those that the mesh cuts.
    of_samples = [Shard(p.dim + n) if isinstance(p, Shard) else p for p in placements]
    if key is None:
        samples = math.prod(sample_shape) if n > 0 else None
        key = _shared_key(mesh, mu.device, generator, _draw.blocks(mu, scale, samples))
    return of_samples, _place(whole, mesh, of_samples, key)


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
    one = _meta(mu, scale)
    placements = _output_placements(one.shape, mu, scale)
    local_mu, local_scale = (_local(t, one.shape, placements) for t in (mu, scale))
    sample_shape: tuple[int, ...] = tuple(options["sample_shape"])
    n = len(sample_shape)
    whole = one if n == 0 else reference.output_of_samples(one, math.prod(sample_shape))
    if n > 1:
        whole = whole.view(*sample_shape, *one.shape)
    placements, place = _drawing(mu, scale, whole.shape, placements, key, generator, sample_shape)
    z = call(local_mu, **{form: local_scale}, **options, **place)
    return _as_whole(z, mu.device_mesh, placements, whole)


def _local_prior(
    function: str,
    prior: torch.distributions.Normal,
    mesh: DeviceMesh,
    shape: torch.Size,
    placements: Sequence[Placement],
) -> torch.distributions.Normal:
    """This rank's part of a prior."""
    from .distributions import Normal

    given = _validate.prior_of(function, prior)
    parts = []
    for t in (given.loc, given.scale):
        if isinstance(t, DTensor) and t.device_mesh == mesh:
            parts.append(_local(t, shape, placements))
        elif isinstance(t, DTensor) or t.dim() > 0 or t.requires_grad:
            # Of a plain one each rank would have the gradient of its own part, and call it whole.
            raise RuntimeError(
                f"{function}(): the parameters of prior must be DTensors on the mesh of mu, or "
                "plain tensors without dimensions and without gradient"
            )
        else:
            parts.append(t)
    loc, scale = parts
    low, high, min_std = given.bounds or (None, None, 0.0)
    local: dict[str, Any] = {"scale" if given.form == "std" else given.form: scale}
    return Normal(loc, **local, clamp=(low, high), min_std=min_std, validate_args=False)


def _summed(placement: Placement, dims: Sequence[int], added: int) -> Placement:
    """How a result lies that is summed over dims, and has others before: in sums of the parts,
    where the mesh cuts one of dims."""
    if not isinstance(placement, Shard):
        return placement
    if placement.dim in dims:
        return Partial()
    return Shard(placement.dim - sum(d < placement.dim for d in dims) + added)


def head(
    function: Callable[..., Any],
    mu: Tensor,
    form: str,
    scale: Tensor | float,
    dims: Sequence[int],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A function that gives a sample and a sum over dims, or of fused_kl_divergence the sum, of
    DTensors: of dims that the mesh cuts the sum is partial."""
    name = function.__name__
    options = {**options, "dim": tuple(dims)}
    key, generator, global_shape, _ = (
        options.pop(option, None)
        for option in ("key", "generator", "global_shape", "global_offset")
    )
    if global_shape is not None:
        raise ValueError(f"{name}(): global_shape is for plain tensors; a DTensor knows its own")
    mu, scale = _checked(name, mu, form, scale)
    mesh = mu.device_mesh
    one = _meta(mu, scale)
    placements = _output_placements(one.shape, mu, scale)
    local_mu, local_scale = (_local(t, one.shape, placements) for t in (mu, scale))
    if options.get("prior") is not None:
        options["prior"] = _local_prior(name, options["prior"], mesh, one.shape, placements)
    rest = [n for d, n in enumerate(one.shape) if d not in dims]

    def summed(total: Tensor, sample_shape: Sequence[int] = ()) -> DTensor:
        whole = total.new_empty((*sample_shape, *rest), device="meta")
        of_sum = [_summed(p, dims, len(sample_shape)) for p in placements]
        return _as_whole(total, mesh, of_sum, whole)

    if name == "fused_kl_divergence":
        return summed(function(local_mu, **{form: local_scale}, **options))  # type: ignore[return-value]
    sample_shape = tuple(options["sample_shape"])
    whole = one.new_empty((*sample_shape, *one.shape))
    of_z, place = _drawing(mu, scale, whole.shape, placements, key, generator, sample_shape)
    z, total = function(local_mu, **{form: local_scale}, **options, **place)
    # The divergence of samples is that of one.
    z = _as_whole(z.contiguous(), mesh, of_z, whole)
    return z, summed(total, () if "prior" in options else sample_shape)
