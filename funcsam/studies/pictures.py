"""The loss around two solutions and between them, as pictures to look at and a page to turn."""

import html
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from funcsam.studies import checkpoint
from funcsam.studies.errors import StudyError
from funcsam.studies.survey import Landscape

COLOURS = "viridis"
AXES = ("first direction, filter norms", "second direction, filter norms")
DRAWN = "two random directions, each filter as long as that of the solution, one draw for both"


class Scale(NamedTuple):
    """What both pictures share: losses from `low` to `high`, and a label that says what lies outside."""

    low: float
    high: float
    label: str

    def clip(self, losses: Tensor) -> Tensor:
        """Puts what lies outside, and what is not finite, on the edge."""
        return losses.nan_to_num(math.inf).clamp(self.low, self.high)

    def norm(self) -> LogNorm:
        """Returns the colours' share of it."""
        return LogNorm(self.low, self.high)

    def ticks(self) -> list[float]:
        """Lists 1, 2 and 5 times powers of ten within, or powers of ten alone where these are many."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        leading = (1, 2, 5) if self.high / self.low < 1000 else (1,)
        found = [k * 10.0**power for power in powers for k in leading]
        return [tick for tick in found if self.low <= tick <= self.high] or [self.low, self.high]


def scale(losses: Tensor) -> Scale:
    """Chooses one logarithmic scale for both solutions: corners of a landscape are often beyond all proportion.

    It ends at the largest loss, or at ten times the third quartile if that is less, and spans six decades at most.

    Raises:
        StudyError: If no loss is finite and positive.
    """
    usual = losses[losses.isfinite() & (losses > 0)].flatten()
    if not len(usual):
        raise StudyError("landscape: the losses must be finite and positive somewhere, got none. The runs diverged.")
    largest, cut = usual.max().item(), 10 * usual.quantile(0.75).item()
    high = min(largest, cut)
    low = max(usual.min().item(), 1e-6 * high)
    above = f", cut at {high:.3g}" if cut < largest or not losses.isfinite().all() else ""
    return Scale(min(low, high / 1.01), high, f"training loss, logarithmic{above}")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _figure(landscape: Landscape, caption: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(textwrap.fill(landscape.title, int(12 * width)), fontsize=10)
    figure.supxlabel("\n".join(textwrap.fill(line, int(14 * width)) for line in caption.splitlines()), fontsize=8)
    return figure


def _heading(landscape: Landscape, k: int) -> str:
    return f"{landscape.names[k]}: loss {landscape.centres[k].item():.3g} at the solution"


def contours(landscape: Landscape) -> bytes:
    """Draws lines of equal loss around the two solutions side by side, as PNG."""
    figure = _figure(landscape, f"{landscape.caption}\n{DRAWN}", 10, 5.2)
    shared = scale(landscape.losses)
    levels = torch.logspace(math.log10(shared.low), math.log10(shared.high), 21, dtype=torch.float64).tolist()
    levels[0], levels[-1] = shared.low, shared.high
    panels: Sequence[Axes] = figure.subplots(1, 2, sharex=True, sharey=True)
    for k, panel in enumerate(panels):
        heights = shared.clip(landscape.losses[k])
        filled = panel.contourf(landscape.xs, landscape.ys, heights, levels, cmap=COLOURS, norm=shared.norm())
        panel.contour(landscape.xs, landscape.ys, heights, levels, colors="black", linewidths=0.4, alpha=0.6)
        panel.plot(0, 0, marker="*", markersize=12, color="white", markeredgecolor="black", linestyle="none")
        panel.set_title(_heading(landscape, k), fontsize=9)
        panel.set(xlabel=AXES[0], aspect="equal")
        panel.locator_params(nbins=5)
    panels[0].set_ylabel(AXES[1])
    bar = figure.colorbar(filled, ax=panels, label=shared.label, shrink=0.9)
    bar.set_ticks(shared.ticks(), labels=[f"{tick:g}" for tick in shared.ticks()])
    bar.minorticks_off()
    return _png(figure)


def surfaces(landscape: Landscape) -> bytes:
    """Draws the loss as the height of a surface, around the two solutions side by side, as PNG."""
    figure = _figure(landscape, f"{landscape.caption}\n{DRAWN}", 11, 5.2)
    shared = scale(landscape.losses)
    ticks = shared.ticks()
    across, up = torch.meshgrid(landscape.xs, landscape.ys, indexing="xy")
    panels: Any = figure.subplots(1, 2, subplot_kw={"projection": "3d", "computed_zorder": False})
    for k, panel in enumerate(panels):
        heights = shared.clip(landscape.losses[k]).log10()
        panel.plot_surface(
            across.numpy(),
            up.numpy(),
            heights.numpy(),
            cmap=COLOURS,
            vmin=math.log10(shared.low),
            vmax=math.log10(shared.high),
            rcount=len(landscape.ys),
            ccount=len(landscape.xs),
            edgecolor="black",
            linewidth=0.15,
        )
        centre = math.log10(shared.clip(landscape.centres[k]).item())
        panel.plot([0], [0], [centre], marker="*", markersize=10, color="white", markeredgecolor="black", zorder=3)
        panel.set_zlim(math.log10(shared.low), math.log10(shared.high))
        panel.set_zticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        panel.set_xlabel(AXES[0], fontsize=8)
        panel.set_ylabel(AXES[1], fontsize=8)
        panel.set_zlabel(shared.label, fontsize=8)
        panel.locator_params("x", nbins=5)
        panel.locator_params("y", nbins=5)
        panel.tick_params(labelsize=7)
        panel.set_title(_heading(landscape, k), fontsize=9)
        panel.view_init(elev=28, azim=-55)
        panel.set_box_aspect(None, zoom=0.9)
    return _png(figure)


def line(landscape: Landscape) -> bytes:
    """Draws the loss, and the test error if there is one, on the straight line through the two solutions, as PNG."""
    figure = _figure(landscape, landscape.caption, 7, 4.4)
    panel = figure.subplots()
    panel.plot(landscape.ts, landscape.line, color="C0", label="training loss")
    panel.set(ylabel="training loss", ylim=(0, None))
    curves = list(panel.get_lines())
    if landscape.errors is not None:
        right = panel.twinx()
        curves += right.plot(landscape.ts, 100 * landscape.errors, color="C1", linestyle="--", label="test error")
        right.set(ylabel="test error, %", ylim=(0, None))
    for place in (0.0, 1.0):
        panel.axvline(place, color="black", linewidth=0.8, linestyle=":")
    panel.set_xticks([0.0, 0.5, 1.0], [landscape.names[0], "halfway", landscape.names[1]])
    panel.set_xlabel("place on the line, and a quarter beyond")
    panel.grid(alpha=0.3)
    panel.legend(handles=curves, frameon=False)
    return _png(figure)


TURN = """
const plot = document.getElementById("{plot_id}");
plot.on("plotly_relayout", (change) => {
  for (const [one, other] of [["scene", "scene2"], ["scene2", "scene"]]) {
    const camera = change[one + ".camera"];
    if (camera && JSON.stringify(camera) !== JSON.stringify(plot.layout[other].camera))
      Plotly.relayout(plot, {[other + ".camera"]: camera});
  }
});
"""
"""Turns the other surface with the one that is turned."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="font-family: sans-serif; margin: 1em">
<h1 style="font-size: 1.1em">{title}</h1>
<p style="font-size: 0.9em">{caption}. Drag to turn both surfaces, scroll to come closer.</p>
{plot}
</body>
</html>
"""


def page(landscape: Landscape) -> bytes:
    """Makes a web page of the two surfaces, whole in itself: it needs no network."""
    import plotly.graph_objects as go  # takes a second, and the other pictures do without
    from plotly.subplots import make_subplots

    shared = scale(landscape.losses)
    heads = [html.escape(_heading(landscape, k)) for k in range(2)]
    figure = make_subplots(1, 2, specs=[[{"type": "surface"}] * 2], subplot_titles=heads, horizontal_spacing=0.02)
    hover = "x %{x:.2f}, y %{y:.2f}<br>loss %{customdata:.4g}<extra></extra>"
    for k in range(2):
        heights = shared.clip(landscape.losses[k]).log10()
        surface = go.Surface(
            x=landscape.xs.tolist(),
            y=landscape.ys.tolist(),
            z=heights.tolist(),
            customdata=[[_shown(loss) for loss in row] for row in landscape.losses[k].tolist()],
            hovertemplate=hover,
            coloraxis="coloraxis",
            contours_z={"show": True, "color": "rgba(0,0,0,0.3)", **_steps(shared)},
        )
        centre = math.log10(shared.clip(landscape.centres[k]).item())
        marker = {"size": 5, "color": "white", "line": {"color": "black", "width": 2}}
        solution = go.Scatter3d(
            x=[0], y=[0], z=[centre], mode="markers", marker=marker, hovertext=heads[k], hoverinfo="text"
        )
        figure.add_traces([surface, solution], rows=[1, 1], cols=[k + 1, k + 1])
    ends = [math.log10(shared.low), math.log10(shared.high)]
    ticks = {
        "tickvals": [math.log10(tick) for tick in shared.ticks()],
        "ticktext": [f"{t:g}" for t in shared.ticks()],
    }
    figure.update_scenes(
        xaxis_title="first direction",
        yaxis_title="second direction",
        zaxis={"title": "training loss", "range": ends, **ticks},
        aspectmode="cube",
        camera_eye={"x": 1.6, "y": -1.6, "z": 0.9},
    )
    bar = {"title": {"text": shared.label, "side": "right"}, "len": 0.8, **ticks}
    figure.update_layout(
        coloraxis={"colorscale": COLOURS, "cmin": ends[0], "cmax": ends[1], "colorbar": bar},
        showlegend=False,
        margin={"l": 0, "r": 0, "t": 40, "b": 0},
    )
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        default_height="80vh",
        div_id="landscape",
        post_script=TURN,
        config={"displaylogo": False, "responsive": True},
    )
    caption = f"{landscape.caption}; {DRAWN}, steps in filter norms"
    texts = {name: html.escape(text) for name, text in (("title", landscape.title), ("caption", caption))}
    return PAGE.format(plot=plot, **texts).encode()


def _shown(loss: float) -> float | str:
    return loss if math.isfinite(loss) else "not finite"


def _steps(shared: Scale) -> dict[str, float]:
    start, end = math.log10(shared.low), math.log10(shared.high)
    return {"start": start, "end": end, "size": (end - start) / 20}


def write(out: Path, landscape: Landscape) -> list[Path]:
    """Writes the three pictures and the page into a folder, each whole or not at all, and returns their paths."""
    made = {
        "landscape-contours.png": contours,
        "landscape-surfaces.png": surfaces,
        "landscape-line.png": line,
        "landscape.html": page,
    }
    for name, draw in made.items():
        checkpoint.write(out / name, draw(landscape))
    return [out / name for name in made]
