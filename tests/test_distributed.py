"""DistributedDataParallel and FSDP2, over two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same_bits, inputs, key_of
from ranks import needs_gloo, run_ranks
from torch import Tensor

from reparam_fused import fold_in, fused_reparameterize

pytestmark = needs_gloo
KEY = key_of(23)
RANKS = 2


class Autoencoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder = torch.nn.Linear(4, 6)
            self.decoder = torch.nn.Linear(3, 4)

    def forward(self, x: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor]:
        mu, log_var = self.encoder(x).chunk(2, -1)
        z = fused_reparameterize(mu, log_var, key=key)
        return self.decoder(z).square().mean(), z


def batch(rank: int) -> tuple[Tensor, Tensor]:
    return inputs(5, 4, seed=rank)[0], fold_in(KEY, rank)


def run_rank(rank: int) -> tuple[Any, ...]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    x, key = batch(rank)
    torch.manual_seed(100 + rank)
    replicated = DistributedDataParallel(Autoencoder())
    _, drawn = replicated(torch.zeros(5, 4), None)
    loss, _ = replicated(x, key)
    loss.backward()
    gradients = [p.grad for p in replicated.parameters()]

    sharded = Autoencoder()
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (sharded.encoder, sharded.decoder, sharded):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.5)
    loss, z = sharded(x, key)
    loss.backward()
    optimizer.step()
    stepped = [p.full_tensor() for p in sharded.parameters()]
    return drawn, gradients, z, stepped


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(RANKS, tmp_path_factory.mktemp("ranks"), run_rank)


def mean_gradients(model: Autoencoder) -> list[Tensor]:
    """Of one process that has both batches; leaves it in .grad too."""
    for rank in range(RANKS):
        loss, _ = model(*batch(rank))
        (loss / RANKS).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_ranks_draw_noise_of_their_own(ranks: list[Any]) -> None:
    (first, *_), (second, *_) = ranks
    assert (first != second).all()


def test_replicas_average_the_gradients_of_a_single_process(ranks: list[Any]) -> None:
    expected = mean_gradients(Autoencoder())
    for _, gradients, *_ in ranks:
        torch.testing.assert_close(gradients, expected)


def test_sharded_parameters_step_as_in_a_single_process(ranks: list[Any]) -> None:
    model = Autoencoder()
    for rank, (_, _, z, _) in enumerate(ranks):
        assert_same_bits(z, model(*batch(rank))[1])
    mean_gradients(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for *_, stepped in ranks:
        torch.testing.assert_close(stepped, [p.detach() for p in model.parameters()])
