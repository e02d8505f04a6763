"""SAC of stable-baselines3 on Pendulum-v1: it runs, and its actions are drawn by the fused op."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip(
    "stable_baselines3", reason="stable-baselines3 is not installed: make integrations"
)

from clients import pendulum

from reparam_fused import patch


def test_training(calls: list[Any]) -> None:
    model = pendulum()
    before = [p.detach().clone() for p in model.actor.parameters()]
    with patch("normal"):
        model.learn(300)
    # Each step draws an action to take, one for the loss of the actor, one for the critics'.
    assert len(calls) >= 3 * 199
    values = model.logger.name_to_value
    for name in ("train/actor_loss", "train/critic_loss", "train/ent_coef_loss"):
        assert math.isfinite(values[name]), values
    after = list(model.actor.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any((p != q).any() for p, q in zip(after, before, strict=True))


def test_a_seed_gives_the_same_run(calls: list[Any]) -> None:
    def run() -> list[float]:
        with patch("normal"):
            model = pendulum().learn(120)
        return [float(p.detach().double().sum()) for p in model.actor.parameters()]

    assert run() == run()
    assert calls
