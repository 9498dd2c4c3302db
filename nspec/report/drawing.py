"""What all figures share: colours, axes, and the way from a drawing to SVG, inside the page or as a file of its own.

Inside the page colours of text, axes and background are CSS variables, so that one drawing serves a light and a dark
page. Output is the same for the same input: no dates, no random ids.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nspec.analysis.bands import Band
from nspec.analysis.clustering import leaf_order
from nspec.analysis.overlap import Floats, Side

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
    "heads": "#b5495b",
    "random_heads": "#d9a0aa",
    "lass": "#d55e00",
    "adapters": "#56b4e9",
    "adapters+shared": "#2a7fb0",
    "adapters_family": "#7f7fd0",
    "finetuned": "#b8a200",
    "bilingual": "#8a5a2b",
    "pcgrad": "#b03060",
    "gradvac": "#d98880",
    "temperature": "#5b7f3a",
    "curriculum": "#9bbf65",
    "reptile": "#4b6a88",
}
_OTHERS = ["#a6551f", "#4c9bb0", "#9a8f2e", "#a04a86", "#6b8e3d", "#c06c6c"]
_LEAVES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#050505"]
MARKERS = {"dense": "o", "continued": "s", "forward": "^", "update": "v", "random": "D", "lass": "X", "adapters": "p"}

# Placeholders that become CSS variables in the page, and colours in a file: matplotlib only takes colours.
INK, GRID = "#010203", "#010204"
# The blue is too dark on a dark page, so that one varies as well.
_IN_PAGE = {INK: "var(--ink)", GRID: "var(--line)", "#0072b2": "var(--blue)"}
_IN_FILE = {INK: "#333333", GRID: "#dddddd"}

SIDES: tuple[Side, ...] = ("encoder", "decoder")


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
    """A colour for use in the page itself."""
    return _IN_PAGE.get(value, value)


def new_figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, NDArray[Any]]:
    """A figure without the global state of pyplot. Sizes in inches of 96 CSS pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns, squeeze=True, **kwargs))
    return figure, axes


def side_panels(y: str, height: float = 3.4) -> tuple[Figure, NDArray[Any]]:
    """A panel for the layers of the encoder and one for those of the decoder, on one scale ``y``."""
    figure, panels = new_figure(9.6, height, 2, sharey=True)
    for axes, side in zip(panels, SIDES):
        style(axes, f"{side} layer", y if side == "encoder" else "", side.capitalize())
    return figure, panels


def style(axes: Axes, x: str, y: str, title: str = "", *, lines: str = "y", frame: Sequence[str] = ()) -> None:
    """Labels, a grid of ``lines`` across one axis, and no frame above and at the right, nor at what ``frame`` adds."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.grid(True, axis=lines, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for edge in ("top", "right", *frame):
        axes.spines[edge].set_visible(False)


def legend_of(figure: Figure, axes: Axes, columns: int, below: bool = False) -> None:
    """A legend of what ``axes`` shows, above all panels or below them."""
    lines, labels = axes.get_legend_handles_labels()
    place: Any = "outside lower center" if below else "outside upper center"
    figure.legend(lines, labels, loc=place, ncols=columns, fontsize=8.5)


def layer_axis(axes: Axes, numbers: Iterable[int]) -> None:
    """A tick for each layer that is drawn, by its number."""
    shown = sorted(set(numbers))
    axes.set_xticks(shown)
    axes.set_xlim(shown[0] - 0.4, shown[-1] + 0.4)


def heat_map(
    figure: Figure, axes: Axes, values: Floats, tasks: Sequence[str], bands: Sequence[Band], most: float, **shown: Any
) -> float:
    """Directions as rows, with lines between bands of related languages, whose names stand at the right.

    Args:
        figure: of the axes; gets the bar of colours.
        axes: to draw on.
        values: float64 [tasks, columns].
        tasks: in the order of :func:`nspec.analysis.bands.band_order`.
        bands: of the same.
        most: the value of the brightest colour.
        shown: further arguments of ``imshow``, such as ``vmin`` and ``aspect``.

    Returns:
        The size of the names, in points: smaller for many directions.
    """
    image = axes.imshow(values, cmap="viridis", vmax=most, **shown)
    font = 8.0 if len(tasks) <= 20 else 6.4
    axes.set_yticks(range(len(tasks)), tasks, fontsize=font)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for number, band in enumerate(bands):
        if band.first:
            axes.axhline(band.first - 0.5, color="#ffffff", linewidth=band_line(bands, number))
        if len(bands) > 1:
            middle = band.first + (band.size - 1) / 2
            axes.text(values.shape[1] - 0.3, middle, band.name, ha="left", va="center", fontsize=font)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=25, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    return font


def band_line(bands: Sequence[Band], number: int) -> float:
    """The width of the line before a band, in points: where the direction type changes it is stronger."""
    return 2.4 if bands[number].part != bands[number - 1].part else 0.9


def tree(linkage: Floats, names: Sequence[str], groups: Sequence[str], title: str) -> Figure:
    """A tree of languages from left (far) to right (near), a leaf a line.

    Args:
        linkage: float [n - 1, 4] of :func:`nspec.analysis.clustering.average_linkage`.
        names: of the n leaves.
        groups: their groups, which give the colours of names.
        title: above the tree.
    """
    from scipy.cluster import hierarchy

    figure, panels = new_figure(6.4, 1.1 + 0.22 * len(names))
    axes = panels[0]
    with warnings.catch_warnings():  # SciPy sets limits of no width where all masks are the same
        warnings.filterwarnings("ignore", "Attempting to set identical")
        hierarchy.dendrogram(linkage, labels=list(names), orientation="left", link_color_func=lambda _: INK, ax=axes)
    axes.invert_yaxis()
    style(axes, "mask distance, 1 - IoU", "", title, frame=["left"])
    axes.grid(False)
    axes.tick_params(axis="y", length=0, labelsize=10)
    order = leaf_order(linkage)
    known = list(dict.fromkeys(groups[leaf] for leaf in order))
    tints = {group: _LEAVES[number % len(_LEAVES)] for number, group in enumerate(known)}
    for label, leaf in zip(axes.get_yticklabels(), order):
        label.set_color(tints[groups[leaf]])
    for group in known:
        axes.plot([], [], "s", color=tints[group], label=group)
    axes.set_xlim(float(linkage[-1, 2]) * 1.03 or 1.0, 0)
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure


def render(function: Callable[..., Figure], label: str, name: str, *arguments: Any) -> str:
    """The figure that ``function(*arguments)`` draws as an ``<svg>`` element, sizes and font left to the page.

    Args:
        function: draws.
        label: what the figure shows, for who cannot see it.
        name: begins the ids in it; one in a page.
        arguments: of the function.
    """
    svg = _drawn(function, name, arguments, transparent=True)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    head = f'role="img" aria-label="{html.escape(label)}" preserveAspectRatio="xMinYMin">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda found: f'<svg viewBox="{found[1]}" {head}', svg, count=1)
    svg = re.sub(r"'?DejaVu Sans'?[^;\"]*", "var(--sans)", svg)
    return _coloured(svg, _IN_PAGE)


def svg_file(function: Callable[..., Figure], name: str, *arguments: Any) -> str:
    """The same figure as the text of an SVG file on white."""
    return _coloured(_drawn(function, name, arguments, facecolor="white"), _IN_FILE)


def _coloured(svg: str, colours: dict[str, str]) -> str:
    for placeholder, value in colours.items():
        svg = svg.replace(placeholder, value)
    return svg


def _drawn(function: Callable[..., Figure], name: str, arguments: Sequence[Any], **options: Any) -> str:
    import matplotlib

    ink = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    settings: dict[Any, Any] = ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": f"nspec-{name}",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.parse_math": False,
        "legend.frameon": False,
        "axes.linewidth": 0.8,
    }
    buffer = io.StringIO()
    with matplotlib.rc_context(settings):
        function(*arguments).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **options)
    return buffer.getvalue()
