"""Keys: made of seeds, drawn, split, and folded with integers, on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, by_the_ops_alone, inputs, key_of
from torch import Tensor

import reparam_fused
from reparam_fused import fold_in, fused_reparameterize, key, noise, reference, split

KEY = key_of(0x0123456789ABCDEF, 2**64 - 3)
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint64, torch.uint32, torch.uint8]


def same_words(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.cpu().view(torch.int64), expected.view(torch.int64))


@pytest.mark.parametrize("first", [0, 5, 2**63 - 2, 2**64 - 1])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_children(first: int, batch: tuple[int, ...], device: torch.device) -> None:
    """As the reference derives them, of keys in any layout and of either dtype."""
    keys = split(KEY, 6).flatten()[: 2 * int(np.prod(batch))].reshape(*batch, 2).to(device)
    signed = first - 2**64 if first >= 2**63 else first
    for given in (keys, keys.mT.contiguous().mT if batch else keys, keys.view(torch.int64)):
        rows = given.reshape(-1, 2).contiguous()
        expected = reference.derive(rows.cpu(), None, signed, 7)
        derived = reparam_fused._ops.derive(rows, None, signed, 7)
        assert (derived.shape, derived.dtype) == ((7, len(rows), 2), given.dtype)
        assert same_words(derived, expected)
        child = fold_in(given, first)
        assert (child.shape, child.dtype) == (given.shape, given.dtype)
        assert same_words(child.reshape(-1, 2), expected[0])
        if first == 0:
            assert split(given, 7).shape == (7, *batch, 2)
            assert same_words(split(given, 7).reshape(7, -1, 2), expected)


@pytest.mark.parametrize(
    ("batch", "shape"),
    [((), ()), ((), (5,)), ((4,), ()), ((4,), (4,)), ((4, 1), (3,)), ((2, 3), (2, 3)), ((), (0,))],
)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_key_for_each_index(
    batch: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Both broadcast; each is the key that the int alone gives."""
    keys = split(KEY, 12).flatten()[: 2 * int(np.prod(batch))].reshape(*batch, 2)
    data = (torch.arange(int(np.prod(shape)), dtype=torch.int64) * 7 + 1).reshape(shape)
    derived = fold_in(keys.to(device), data.to(dtype).to(device))
    whole = torch.broadcast_shapes(batch, shape)
    assert derived.shape == (*whole, 2)
    single = zip(
        keys.view(torch.int64).expand(*whole, 2).reshape(-1, 2),
        data.expand(whole).flatten().tolist(),
        derived.cpu().view(torch.int64).reshape(-1, 2),
        strict=True,
    )
    for one, index, got in single:
        assert torch.equal(got, fold_in(one, index))


def test_rows_named_by_a_global_id(device: torch.device) -> None:
    """Any order and any part of the rows have the noise that they have in the whole."""
    mu, log_var = (t.to(device) for t in inputs(10, 6))
    ids = torch.tensor([7, 2, 9], device=device)
    key = KEY.to(device)
    whole = fused_reparameterize(mu, log_var, key=fold_in(key, torch.arange(10, device=device)))
    part = fused_reparameterize(mu[ids], log_var[ids], key=fold_in(key, ids))
    assert_same_bits(part.cpu(), whole[ids].cpu())


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.func._random is new in torch 2.14")
def test_they_are_those_of_torch() -> None:
    from torch.func import _random

    keys = split(KEY, 3)
    for num in (1, 2, 70):
        assert torch.equal(split(keys, num), _random.split(keys, num))
    for data in (0, -1, 2**63, torch.tensor(9, dtype=torch.uint64)):
        assert torch.equal(fold_in(keys, data), _random.fold_in(keys, data))


def test_the_same_bits_as_int64(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Wherever a key is taken, by the module and by the ops."""
    mu, log_var = (t.to(device) for t in inputs(4, 6))
    for by_op in (False, True):
        if by_op:
            by_the_ops_alone(monkeypatch)
        for k in (KEY.to(device), split(KEY, 4).to(device)):
            signed = k.view(torch.int64)
            results: list[Any] = []
            for given in (k, signed):
                leaf = log_var.clone().requires_grad_()
                z = fused_reparameterize(mu, leaf, key=given)
                results.append((z.detach(), *torch.autograd.grad(z.sum(), leaf)))
                results[-1] += (noise(given, 4, 6), split(given).view(torch.int64))
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
            assert split(signed).dtype == fold_in(signed, 1).dtype == torch.int64


@pytest.mark.parametrize(
    "seed",
    [
        5,
        2**64 - 1,
        np.int64(5),
        np.uint64(2**63 + 5),
        np.uint8(5),
        True,
        torch.tensor(5),
        torch.tensor(2**63 + 5, dtype=torch.uint64),
        torch.tensor(5).int(),
    ],
    ids=repr,
)
def test_any_integer_is_a_seed(seed: Any) -> None:
    word = seed.item() if isinstance(seed, Tensor) else int(seed)
    assert key(seed).tolist() == [word, 0]
    assert (key(seed).dtype, key(seed).shape) == (torch.uint64, (2,))


@pytest.mark.parametrize(
    "seeds", [[5, 6, 2**64 - 1], (5, 6), [], range(3), np.array([[1, 2], [3, 4]])], ids=repr
)
def test_several_seeds_give_a_key_each(seeds: Any) -> None:
    expected = [[int(s), 0] for s in np.asarray(seeds, dtype=object).flatten()]
    assert key(seeds).reshape(-1, 2).tolist() == expected
    assert key(seeds).shape == (*np.asarray(seeds, dtype=object).shape, 2)


def test_seeds_of_a_tensor_stay_on_its_device(device: torch.device) -> None:
    seeds = torch.tensor([[1, 2, -1]], device=device)
    keys = key(seeds)
    assert (keys.shape, keys.device) == ((1, 3, 2), seeds.device)
    assert keys[0, :, 0].tolist() == [1, 2, 2**64 - 1]


def test_a_key_of_a_generator(device: torch.device) -> None:
    """The one that a call without a key draws there, and so a fresh one each time."""
    mu, log_var = (t.to(device) for t in inputs(1))
    generator = torch.Generator(device).manual_seed(3)
    drawn = [key(generator=generator) for _ in range(2)]
    assert drawn[0].tolist() != drawn[1].tolist()
    assert drawn[0].device.type == device.type
    generator.manual_seed(3)
    for k in drawn:
        z = fused_reparameterize(mu, log_var, generator=generator)
        assert_same_bits(fused_reparameterize(mu, log_var, key=k.to(mu.device)).cpu(), z.cpu())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ValueError, "expected seed or generator, got neither"),
        ((1,), {"generator": torch.Generator()}, ValueError, "got both"),
        ((), {"generator": 3}, TypeError, "argument 'generator' must be torch.Generator, not int"),
        ((1.5,), {}, TypeError, "argument 'seed' must be int, not float"),
        (("7",), {}, TypeError, "argument 'seed' must be int, not str"),
        (([1, 2.5],), {}, TypeError, "argument 'seed' must be int, not float"),
        (([1, -2],), {}, ValueError, r"seed must be in \[0, 2\*\*64\), got -2"),
        ((torch.tensor([0.5]),), {}, TypeError, "an int or integers, got dtype torch.float32"),
        ((np.array([0.5]),), {}, TypeError, "an int or integers, got dtype torch.float64"),
    ],
    ids=range(9),
)
def test_errors_of_key(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=r"^key\(\): .*" + message):
        key(*arguments, **options)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (torch.tensor([0.5]), TypeError, "data must be an int or integers, got dtype torch.float"),
        (torch.tensor([1, 2]), RuntimeError, r"batch shape of key \(3,\), got \(2,\)"),
        (torch.empty(3, dtype=torch.int64, device="meta"), RuntimeError, "on the device of key"),
    ],
    ids=range(3),
)
def test_errors_of_fold_in(data: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^fold_in\(\): .*" + message):
        fold_in(split(KEY, 3), data)


def test_opcheck() -> None:
    for keys in (KEY.view(1, 2), split(KEY, 3).view(torch.int64)):
        torch.library.opcheck(reparam_fused._ops.derive, (keys, None, 2, 5))
        torch.library.opcheck(reparam_fused._ops.derive, (keys, torch.tensor([1, 2, 3]), 0, 1))


def test_the_op_refuses_what_it_cannot_read(device: torch.device) -> None:
    keys, numbers = split(KEY, 6).to(device), torch.arange(6, device=device)
    for arguments in (
        (keys[::2], None, 0, 1),
        (keys.flatten()[:3], None, 0, 1),
        (keys.float(), None, 0, 1),
        (keys, numbers[:4], 0, 1),
        (keys, numbers.int(), 0, 1),
        (keys[:3], numbers[::2], 0, 1),
        (keys, None, 0, -1),
    ):
        with pytest.raises(RuntimeError, match="expected contiguous keys"):
            reparam_fused._ops.derive(*arguments)


def test_under_vmap(device: torch.device) -> None:
    """A key an example, or one for all."""
    keys, numbers = split(KEY, 3).to(device), torch.arange(3, device=device)
    halves = torch.vmap(split)(keys)
    folded = torch.vmap(fold_in)(keys, numbers)
    by_number = torch.vmap(lambda i: fold_in(keys[0], i))(numbers)
    several = numbers + torch.arange(4, device=device)[:, None]
    last = torch.vmap(split, in_dims=1)(keys.T)
    each = torch.vmap(fold_in, in_dims=(0, 1))(keys, several)
    derive = reparam_fused._ops.derive
    by_op = torch.vmap(lambda k, d: derive(k, d, 0, 1), in_dims=1)(keys[None], several)
    for i in range(3):
        assert torch.equal(halves[i], split(keys[i]))
        assert torch.equal(last[i], split(keys[i]))
        assert torch.equal(folded[i], fold_in(keys[i], i))
        assert torch.equal(by_number[i], fold_in(keys[0], i))
        assert torch.equal(each[i], fold_in(keys[i], several[:, i]))
        assert torch.equal(by_op[i], each[i][None])
