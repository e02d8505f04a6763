"""The time of an element over the size, a line for each rival, and the floor of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .lines import PASSES
from .rows import Row

STYLES: dict[str, dict[str, Any]] = {
    "eager": {"color": "#d55e00", "marker": "s"},
    "torch.compile": {"color": "#cc79a7", "marker": "^"},
    "func._random": {"color": "#e69f00", "marker": "v"},
    "fused": {"color": "#0072b2", "marker": "o", "linewidth": 2.5},
    "floor": {"color": "#555555", "linestyle": "--"},
}
LABELS = {
    "eager": "eager",
    "torch.compile": "torch.compile",
    "func._random": "torch.func._random",
    "fused": "fused_reparameterize",
    "floor": "floor: torch.add",
}


def save(rows: list[Row], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Draw the sizes in float32 of the first device."""
    from matplotlib.figure import Figure

    device = rows[0].device
    shown = [
        row for row in rows
        if (row.group, row.dtype, row.device) == ("sizes", "float32", device)
        and row.cache in ("", "cold")
    ]  # fmt: skip
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, passes in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        for call, style in STYLES.items():
            line = [row for row in shown if (row.call, row.passes) == (call, passes)]
            x = [row.numel for row in line]
            axes.loglog(x, [r.seconds / r.numel * 1e9 for r in line], label=LABELS[call], **style)
            low, high = (
                [getattr(r, name) / r.numel * 1e9 for r in line]
                for name in ("seconds_low", "seconds_high")
            )
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        axes.set(title=f"{passes}, float32", xlabel="elements")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    axes = figure.axes[0]
    axes.set_ylabel("nanoseconds per element")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, metadata=metadata)
