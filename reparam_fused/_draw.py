"""Keys for calls without one, from torch's generators, without a host sync."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ._validate import broadcast

# The offsets of keys that a CUDA generator gives, a domain of their own: or the first draw
# after manual_seed(s) would be that of key(s).
DOMAIN = 2**63


class Position(NamedTuple):
    """Where a CUDA generator stands: at (seed, offset), as signed integers.

    While a graph is captured both are on the device, as each replay finds them, and
    offset is the graph's own part.
    """

    seed: int
    offset: int
    captured: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(
        seed: int, offset: int, captured_seed: Tensor | None, captured_offset: Tensor | None
    ) -> Position:
        """From the arguments of the op sample_at."""
        if captured_seed is None or captured_offset is None:
            return Position(seed, offset)
        return Position(seed, offset, (captured_seed, captured_offset))


def blocks(mu: Tensor, scale: Tensor, samples: int | None = None) -> int:
    """How many counters a call with these uses: those of an output of their broadcast shape, or
    of so many samples of it."""
    numel = broadcast(mu.shape, scale.shape).numel() * (1 if samples is None else samples)
    return -(-numel // (2 if torch.result_type(mu, scale) == torch.float64 else 4))


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index]


def device_of(generator: torch.Generator) -> torch.device:
    """The device that it draws on, with an index where there are several."""
    device = generator.device
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


@contextmanager
def drawn(
    device: torch.device, generator: torch.Generator | None, blocks: int
) -> Iterator[Position]:
    """The position of a CUDA generator, which moves on by 4 for each counter.

    If what is done with it fails, the generator is put back, unless another has drawn since.
    """
    generator = generator or _default(device)
    if hasattr(generator, "philox_state"):
        seed, offset, within = generator.philox_state(4 * blocks)
        if seed.device == device:  # a failed capture has no state to give back
            yield Position(0, int(within.item()), (seed, offset))
            return
        position = Position(int(seed.item()), int(offset.item()))
    else:  # torch below 2.14, which refuses set_offset under capture
        position = Position(_signed(generator.initial_seed()), _signed(generator.get_offset()))
        generator.set_offset((position.offset + 4 * blocks) % 2**64)
    try:
        yield position
    except Exception:
        before = position.offset % 2**64
        if generator.get_offset() == (before + 4 * blocks) % 2**64:
            generator.set_offset(before)
        raise


def draw_key(device: torch.device, generator: torch.Generator | None, blocks: int) -> Tensor:
    """A fresh key for so many counters, from the generator of the device.

    On CUDA (seed, offset / 4 + 2^63); elsewhere 64 random bits, with offset 0. For none
    the generator stays where it is, as in torch.randn(0).
    """
    if device.type == "cuda":
        with drawn(device, generator, blocks) as position:
            return key_at(position, device)
    if blocks == 0:
        return torch.zeros(2, dtype=torch.int64, device=device).view(torch.uint64)
    seed = torch.empty((), dtype=torch.int64, device=device)
    seed.random_(-(2**63), None, generator=generator)
    return torch.stack([seed, torch.zeros_like(seed)]).view(torch.uint64)


class put_back:
    """If what is done within fails, the generator is as it was before.

    A failed capture has no state to give back, and of other devices no state is known. A class,
    for a generator of contextlib takes 6 us more of a call.
    """

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        self.undo: Callable[[], object] | None = None
        if device.type == "cpu":
            generator = generator or _default(device)
            self.undo = functools.partial(generator.set_state, generator.get_state())
        elif device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            generator = generator or _default(device)
            self.undo = functools.partial(generator.set_offset, generator.get_offset())

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and self.undo is not None:
            self.undo()


def key_at(position: Position, device: torch.device) -> Tensor:
    if position.captured is not None:
        seed, offset = position.captured
        counter = (offset + position.offset >> 2) & 2**62 - 1
        return torch.cat([seed, counter ^ -DOMAIN]).view(torch.uint64)
    # Filled by kernels: a copy from the host would have to wait for its memory.
    key = torch.full((2,), position.seed, dtype=torch.int64, device=device)
    key[1] = (position.offset % 2**64 >> 2) - DOMAIN
    return key.view(torch.uint64)


def mapped_key(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A key drawn under torch.vmap: one for each example or one for all, as its randomness says.

    By torch.randint, whose batching rule does that: all 128 bits are random.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator)
