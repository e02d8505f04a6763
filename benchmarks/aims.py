"""The speeds that the project aims at, and which rows miss them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from reparam_fused.bench.lines import PASSES
from reparam_fused.bench.rows import Row

FORWARD, BOTH = PASSES
STEP = "step"
#: The least ratio of a rival to ours that the project aims at, on 2 cores with AVX-512; of the
#: floor it is its share of our time.
AIM = {
    ("sizes: 2^22, float32", FORWARD): {"eager": 10, "torch.compile": 25},
    ("sizes: 2^24, float32", FORWARD): {"floor": 1 / 1.4},
    ("sizes: 2^16, float32", BOTH): {"eager": 4},
    ("sizes: 2^22, float32", BOTH): {"eager": 6},
    ("forms: log_std, float32", BOTH): {"eager": 6},
    ("forms: rho, float32", BOTH): {"eager": 6},
    ("forms: log_var, clamp, float32", BOTH): {"eager": 6},
    ("forms: 16 samples, float32", BOTH): {"eager": 7},
    ("forms: 64 samples, float32", BOTH): {"eager": 6},
    ("forms: z, KL, float32", BOTH): {"eager": 12, "floor": 0.5},
    ("forms: KL of two, float32", BOTH): {"eager": 8},
    ("forms: z, KL of two, float32", BOTH): {"eager": 8},
    ("forms: z, log q, float32", BOTH): {"eager": 8},
    ("forms: tanh z, log q, float32", BOTH): {"eager": 8},
    ("views: halves of rows of 12, float32", FORWARD): {"eager": 3.5},
    ("views: a key for each row of 1, 4096 rows, float32", FORWARD): {"eager": 1.5},
    ("views: a key for each row of 6, 4096 rows, float32", FORWARD): {"eager": 2},
    ("views: a key for each row of 6, 4096 rows, float32", BOTH): {"eager": 1.3},
    ("views: a key for each row of 20, 4096 rows, float32", FORWARD): {"eager": 3},
    ("views: a key for each row of 20, 4096 rows, float32", BOTH): {"eager": 1.5},
    ("views: a key for each row of 3, 1400000 rows, float32", FORWARD): {"eager": 3},
    ("views: a key for each row of 3, 1400000 rows, float32", BOTH): {"eager": 1.5},
    ("calls: log_std, 8 x 32, float32", BOTH): {"eager": 1.4},
    ("calls: one shape, float32", FORWARD): {"eager": 1 / 0.35},
    ("calls: one shape, float32", BOTH): {"eager": 1 / 0.65},
    ("calls: 20 calls in one graph, float32", BOTH): {"eager": 2},
    ("calls: z, KL, mean of sums, float32", BOTH): {"eager": 2.5},
    ("calls: tanh z, log q, 256 x 6, float32", BOTH): {"eager": 4},
    ("workloads: Bayesian MLP, 5.8M weights drawn, float32", STEP): {"eager": 2},
}
#: No call is to be slower than the line that it replaces.
EVERY_CASE = {"eager": 1.0}


def aimed_at(rows: Iterable[Row]) -> Iterator[tuple[Row, float]]:
    """The rows that there is an aim for, with it."""
    for row in rows:
        own = AIM.get((f"{row.group}: {row.case}, {row.dtype}", row.passes), {})
        bound = (EVERY_CASE | own).get(row.call)
        if bound is not None:
            yield row, bound


def missed(rows: Iterable[Row]) -> list[str]:
    """A line for each aim that is missed."""
    return [
        f"{row.group}: {row.case}, {row.dtype}, {row.passes}: {row.call} / fused "
        f"{row.ratio:.2f}, aim {bound:.2f}: MISSED"
        for row, bound in aimed_at(rows)
        if row.ratio < bound
    ]
