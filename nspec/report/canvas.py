"""What all figures share: colours, axes, and the way from a drawing to SVG inside the page.

Colours of text, axes and background are CSS variables, so that one drawing serves a light and a dark page. Output is
the same for the same input: no dates, no random ids.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nspec import analysis
from nspec.report.load import RunData
from nspec.report.words import group_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour vision, and lighter and darker ones of the same hue for
# what is akin; dense is grey because it is where all start.
COLOURS = {
    "dense": "#8c8c8c",
    "continued": "#e69f00",
    "forward": "#0072b2",
    "update": "#009e73",
    "forward_encoder": "#5aa9d6",
    "forward_decoder": "#3b5b92",
    "update_encoder": "#66c2a5",
    "update_decoder": "#1b6b50",
    "random": "#cc79a7",
    "neurons": "#3aa6a0",
    "neurons+shared": "#6a5acd",
    "lass": "#d55e00",
    "adapters": "#56b4e9",
    "adapters_family": "#7f7fd0",
    "finetuned": "#b8a200",
    "bilingual": "#8a5a2b",
}
_OTHERS = ["#a6551f", "#4c9bb0", "#9a8f2e", "#a04a86", "#6b8e3d", "#c06c6c"]
MARKERS = {"dense": "o", "continued": "s", "forward": "^", "update": "v", "random": "D", "lass": "X", "adapters": "p"}
GROUPS = [("all", "#8c8c8c"), ("from", "#0072b2"), ("to", "#d55e00")]

# Placeholders that become CSS variables in the SVG: matplotlib only takes colours.
INK, GRID = "#010203", "#010204"
# The blue is too dark on a dark page, so that one varies as well.
_VARIABLES = {INK: "var(--ink)", GRID: "var(--line)", "#0072b2": "var(--blue)"}

SIDES: tuple[analysis.overlap.Side, ...] = ("encoder", "decoder")


def colour(system: str, names: Sequence[str]) -> str:
    """The colour of a system, the same in every figure."""
    if system in COLOURS:
        return COLOURS[system]
    others = [name for name in names if name not in COLOURS]
    return _OTHERS[others.index(system) % len(_OTHERS)]


def css_colour(system: str, names: Sequence[str]) -> str:
    """The same colour for use in the page itself."""
    return css(colour(system, names))


def css(value: str) -> str:
    """A colour of a figure for use in the page itself."""
    return _VARIABLES.get(value, value)


def new_figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, NDArray[Any]]:
    """A figure without the global state of pyplot. Sizes in inches of 96 CSS pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns, squeeze=True, **kwargs))
    return figure, axes


def style(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Labels, a grid of horizontal lines, and no frame above and at the right."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def inline_svg(svg: str, name: str, label: str) -> str:
    """An SVG file as an ``<svg>`` element: ids made unique by ``name``, sizes and font left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    head = f'role="img" aria-label="{html.escape(label)}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda found: f'<svg viewBox="{found[1]}" {head}', svg, count=1)
    svg = re.sub(r"'?DejaVu Sans'?[^;\"]*", "var(--sans)", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline_svg(buffer.getvalue(), name, label)


def _settings(name: str) -> Any:
    ink = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    return ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": f"nspec-{name}",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.parse_math": False,
        "legend.frameon": False,
        "axes.linewidth": 0.8,
    }


def render(function: Callable[..., Figure], label: str, name: str, *arguments: Any) -> str:
    """The figure that ``function(*arguments)`` draws as SVG.

    Args:
        function: draws.
        label: what the figure shows, for who cannot see it.
        name: begins the ids in it; one in a page.
        arguments: of the function.
    """
    import matplotlib

    with matplotlib.rc_context(_settings(name)):
        return _svg(function(*arguments), name, label)


def groups(data: RunData, tasks: Sequence[str]) -> dict[str, list[str]]:
    """``from`` and ``to`` the pivot with their tasks, or ``all`` where there is no pivot."""
    split = {
        "from": [task for task in tasks if data.pivot and task.startswith(f"{data.pivot}-")],
        "to": [task for task in tasks if data.pivot and task.endswith(f"-{data.pivot}")],
    }
    return {key: members for key, members in split.items() if members} or {"all": list(tasks)}


def label_of(data: RunData, group: str) -> str:
    """``en→x`` for ``from``, ``x→en`` for ``to``."""
    return group_name("all" if group == "all" else f"{group}_{data.pivot}")


def layer_axis(axes: Axes, numbers: Iterable[int]) -> None:
    """A tick for each layer that is drawn, by its number."""
    shown = sorted(set(numbers))
    axes.set_xticks(shown)
    axes.set_xlim(shown[0] - 0.4, shown[-1] + 0.4)
