"""A picture of which experts are chosen together, in the order of their ids and as placed."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from occult_train.errors import UserError
from occult_train.moe.collaboration import LayerStatistics
from occult_train.moe.placement import Placement

PAIRS_A_ROW = 3
"""Layers beside each other."""


def draw(layers: dict[int, LayerStatistics], placements: dict[int, Placement], devices: int, path: Path) -> None:
    """For each layer its matrix of collaborations before and after, lines around what is on one device.

    Raises:
        UserError: matplotlib is not installed, or does not write such files.
        OSError: the disk does not take it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--figure={path} needs the package {error.name}, which is not installed") from None
    columns = min(PAIRS_A_ROW, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(4.4 * columns, 2.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (index, layer) in enumerate(layers.items()):
        row, column = divmod(number, columns)
        orders = list(range(layer.loads_E.numel())), list(placements[index].slot_to_expert)
        for offset, (order, title) in enumerate(zip(orders, ("by id", "as placed"), strict=True)):
            axes = grid[row][2 * column + offset]
            _matrix(axes, layer.pairs_EE[order][:, order], devices)
            axes.set_title(f"layer {index}, {title}", fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UserError(f"--figure={path}: {error}") from None


def _matrix(axes: Any, pairs_EE: Tensor, devices: int) -> None:
    experts = pairs_EE.shape[0]
    axes.imshow(pairs_EE.numpy(), cmap="magma", interpolation="nearest", vmin=0, vmax=_ceiling(pairs_EE))
    for device in range(1, devices):
        edge = device * experts / devices - 0.5
        axes.axhline(edge, color="white", linewidth=0.4)
        axes.axvline(edge, color="white", linewidth=0.4)


def _ceiling(pairs_EE: Tensor) -> float:
    """What is drawn brightest: a few pairs far above all others would leave the rest black."""
    values = pairs_EE[pairs_EE > 0].double()
    return float(values.quantile(0.995)) if values.numel() else 1.0
