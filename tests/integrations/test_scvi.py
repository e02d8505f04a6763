"""SCVI of scvi-tools on synthetic cells: it trains, with the fused sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed: make integrations")

from clients import cells

from reparam_fused import patch

EPOCHS = 5


def test_training(calls: list[Any]) -> None:
    model = cells()
    with patch("normal"):
        model.train(EPOCHS, accelerator="cpu", train_size=1.0, enable_progress_bar=False)
        losses = model.history["elbo_train"]["elbo_train"].to_numpy()
        assert len(losses) == EPOCHS
        assert (losses[1:] < losses[:-1]).all()
        assert losses[-1] < 0.98 * losses[0]
        steps = -(-model.adata.n_obs // 128) * EPOCHS
        assert len(calls) >= steps
        model.get_latent_representation(give_mean=False)
        assert len(calls) > steps


def test_gradients_reach_the_encoder(calls: list[Any]) -> None:
    model = cells()
    batch = next(iter(model._make_data_loader(model.adata, batch_size=64)))
    with patch("normal"):
        model.module.train()(batch)[2].loss.backward()
    assert len(calls) == 1
    gradients = [p.grad for p in model.module.z_encoder.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(torch.count_nonzero(g) for g in gradients)
