"""Plots of `sparsekern bench kernels`: the roofline, and the speed-up over dense by tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsekern.errors import check
from sparsekern.profiling.kernel_bench import OP, SPARSE_RATIO, Ceilings, Row


def usable(path: str | Path, op: str = OP) -> Path:
    """The path, where matplotlib can write a picture of its suffix; to be asked first.

    Raises:
        ModuleNotFoundError: no matplotlib.   ValueError: no suffix, or one of no picture.
    """
    path = Path(path)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{op}: --plot needs matplotlib. Run: pip install matplotlib."
        ) from error
    known = path.suffix[1:].lower() in Figure().canvas.get_supported_filetypes()
    check(known, op, "--plot NAME.svg or NAME.png", path, "Give it another ending.")
    return path


def plot(rows: Sequence[Row], limits: Ceilings, path: str | Path) -> list[Path]:
    """Write <stem>-roofline<suffix> and <stem>-speedup<suffix> beside `path`; returns both.

    Args:
        rows: of one dtype and machine; those without a time are left out.
        path: a name whose suffix matplotlib writes, such as speed.svg or speed.png.
    Raises:
        As `usable`; ValueError: no row with a time.
    """
    path = usable(path)
    timed = [row for row in rows if row.status == "ok"]
    check(bool(timed), OP, "a row with a time to plot", "none")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kernels = list(dict.fromkeys(row.kernel for row in timed))
    colours = {name: f"C{i}" for i, name in enumerate(kernels)}

    figure, axes = pyplot.subplots(figsize=(7, 5))
    intensities = sorted(row.flops / row.bytes for row in timed)
    line = [intensities[0] / 2, *intensities, intensities[-1] * 2]
    for ratio, label in ((1.0, "dense roof"), (SPARSE_RATIO, "2:4 roof")):
        roof = [min(i * limits.read_tb_s, ratio * limits.dense_tflops) for i in line]
        axes.plot(line, roof, "k-" if ratio == 1.0 else "k--", linewidth=1, label=label)
    for name in kernels:
        own = [row for row in timed if row.kernel == name]
        axes.scatter(
            [row.flops / row.bytes for row in own],
            [row.flops / row.us["p50"] / 1e6 for row in own],
            s=18,
            color=colours[name],
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="dense-equivalent FLOP per byte")
    axes.set_ylabel("dense-equivalent TFLOPS")
    axes.legend()
    roofline = path.with_name(f"{path.stem}-roofline{path.suffix}")
    figure.savefig(roofline, bbox_inches="tight")
    pyplot.close(figure)

    shapes = list(dict.fromkeys((row.out_features, row.in_features) for row in timed))
    figure, grid = pyplot.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), squeeze=False)
    for axes, shape in zip(grid[0], shapes):
        for name in kernels:
            own = [
                r for r in timed if r.kernel == name and (r.out_features, r.in_features) == shape
            ]
            points = sorted((r.tokens, r.speedup) for r in own if r.speedup is not None)
            if points:
                axes.plot(*zip(*points), "o-", color=colours[name], label=name, markersize=4)
        axes.axhline(1.0, color="k", linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens", title=f"{shape[0]}x{shape[1]}")
    grid[0][0].set_ylabel("times dense")
    grid[0][-1].legend()
    speedup = path.with_name(f"{path.stem}-speedup{path.suffix}")
    figure.savefig(speedup, bbox_inches="tight")
    pyplot.close(figure)
    return [roofline, speedup]
