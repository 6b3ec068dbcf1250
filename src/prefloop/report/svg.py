"""matplotlib figures as inline SVG that takes its colours from the page, so that it fits light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prefloop.records import PrefloopError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT_INCHES, WIDTH_INCHES, WIDE_INCHES = 2.55, 4.1, 5.8

# matplotlib draws with these stand-ins; the page's CSS variables take their place in the SVG.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
FIRST, SECOND, THIRD, BAD = "#040404", "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", FIRST: "--first", SECOND: "--second", THIRD: "--third", BAD: "--bad"
}  # fmt: skip

_LIGHT = {
    INK: "#14171f", MUTED: "#5c6474", GRID: "#e3e6ec",
    FIRST: "#3f5bd8", SECOND: "#d9730d", THIRD: "#0b8a83", BAD: "#c4352f",
}  # fmt: skip

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "prefloop",
    "text.color": INK,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.4,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}


def draw(name: str, description: str, paint: Callable[[Axes], None], *, wide: bool = False) -> str:
    """The SVG of one figure: `paint` draws on its axes, `description` is what a screen reader says.

    Raises:
        PrefloopError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PrefloopError("a report needs matplotlib: pip install 'prefloop[report]'") from error
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDE_INCHES if wide else WIDTH_INCHES, HEIGHT_INCHES))
        paint(figure.add_subplot())
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name, description)


def standalone(svg: str) -> str:
    """A figure of `draw` as a file of its own: with the page's light colours."""
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(f"var({variable})", _LIGHT[stand_in])
    svg = svg.replace("var(--sans)", "sans-serif")
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #ffffff" ', 1)


def _inline(svg: str, name: str, description: str) -> str:
    """Only what a page needs: no prolog, no metadata, no namespaces, ids of its own, colours from CSS."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    label = html.escape(description, quote=True)
    head = f'<svg class="plot" role="img" aria-label="{label}" {box.group(0) if box else ""}>'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return re.sub(r"\n\s*", "\n", svg)
