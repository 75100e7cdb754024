"""A picture of a bench: time and memory over sizes, relative to the plain model (pip install diffusion-attn[viz])."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusion_attn.bench.run import PLAIN

_PANELS = {"relative_time": "time per step, plain = 1", "relative_peak": "peak memory, plain = 1"}


def plot(result: Mapping[str, Any]) -> Any:
    """Time per step and peak memory of each method over sizes, relative to the plain model's.

    Args:
        result: what `run_bench` returns, or its JSON.

    Returns:
        A ``matplotlib.figure.Figure``, which belongs to no window; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = result["rows"]
    sizes = sorted({tuple(row["size"]) for row in rows}, key=lambda size: (size[0] * size[1], size))
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name != PLAIN]
    bar = 0.8 / max(len(methods), 1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axis, (of, label) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        axis.axhline(1, color="black", linewidth=1, label=PLAIN)
        for index, name in enumerate(methods):
            points = {tuple(row["size"]): row[of] for row in rows if row["method"] == name and row[of] is not None}
            there = [size for size in sizes if size in points]
            beside = [sizes.index(size) + (index - (len(methods) - 1) / 2) * bar for size in there]
            axis.bar(beside, [points[size] for size in there], bar, label=name)
        axis.set_xticks(range(len(sizes)), [f"{width}x{height}" for width, height in sizes])
        axis.set_xlabel("pixels")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(methods) + 1)
    return figure
