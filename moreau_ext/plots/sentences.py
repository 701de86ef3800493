"""Sentences as rows of coloured words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ._arrays import Array
from ._figure import (
    CAPTION_LINE,
    CERTAIN,
    PLAIN,
    draw_foot,
    new_figure,
    signed_colours,
    strength_colours,
    wrapped,
    write_caption,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 5.2  # inches: words stay legible on a phone
_EDGE = 0.1  # inches, around the rows
_BOX = 0.23  # inches, height of a word's box
_LINE = 0.31  # inches from a line of words to the next
_TITLE = 0.2  # inches
_FOOT = 0.42  # inches, for the colour bar and the legend
_POINTS = 10.0  # size of the words


@runtime_checkable
class Sentence(Protocol):
    """A :class:`moreau_ext.TextExplanation`, which is defined above this package."""

    @property
    def words(self) -> tuple[str, ...]: ...

    @property
    def scores(self) -> Tensor: ...

    @property
    def norms(self) -> Tensor: ...

    @property
    def fixed(self) -> Tensor: ...

    def significant(self, q: float = ...) -> Tensor: ...


def words(
    explanations: Sentence | Sequence[Sentence],
    titles: str | Sequence[str] = (),
    caption: str = "",
    *,
    norms: bool = False,
) -> Figure:
    """Sentences as rows of words on boxes, coloured by their scores; long sentences take several lines.

    Red raises the output and blue lowers it. Every sentence has a scale of its own, from -max|score| to +max|score|,
    which is stated behind its title. Small scores are gray. Words whose score is exactly 0 are white. Words that are in
    the map beyond sampling noise (:meth:`TextExplanation.significant`) are outlined. Special tokens are gray, without a
    box.

    Args:
        explanations: a :class:`TextExplanation` of one sentence, or several.
        titles: one per sentence, above its row; none by default.
        caption: below the rows; line breaks are kept, long lines wrapped.
        norms: draw the words' ``norms`` instead, from gray to violet: how much of the map is in a word, without a sign.

    Returns:
        A matplotlib Figure; write it with ``figure.savefig(path)``.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: no explanations of text.
        ValueError: no sentences, or another number of titles.

    Example:
        >>> import torch
        >>> from moreau_ext import TextExplainer
        >>> from moreau_ext.plots import words
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding = torch.nn.Embedding(9, 4)
        ...
        ...     def get_input_embeddings(self):
        ...         return self.embedding
        ...
        ...     def forward(self, inputs_embeds):
        ...         return inputs_embeds[:, 1].sum(1).sin()
        >>> found = TextExplainer(Model().eval()).attribute({"input_ids": torch.tensor([[5, 3, 7]])})
        >>> figure = words(found, ["three numbers"])
        >>> [text.get_text() for text in figure.axes[0].texts[1:]]
        ['5', '3', '7']
    """
    given = [explanations] if isinstance(explanations, Sentence) else list(explanations)
    if not all(isinstance(e, Sentence) for e in given):
        kinds = sorted({type(e).__name__ for e in given})
        raise TypeError(f"explanations: expected those of a TextExplainer, got {', '.join(kinds)}")
    if not given:
        raise ValueError("explanations: expected one sentence or more, got none")
    named = [titles] if isinstance(titles, str) else list(titles) or [""] * len(given)
    if len(named) != len(given):
        raise ValueError(f"titles: expected one per sentence, {len(given)}, got {len(named)}")

    width_of = _ruler()
    values = [np.asarray((e.norms if norms else e.scores).detach().cpu()) for e in given]
    largest = [float(np.abs(v).max()) for v in values]
    heads = [
        f"{name}   full colour at {scale:.2g}" if scale else f"{name}   empty"
        for name, scale in zip(named, largest, strict=True)
    ]
    placed = [_lines([width_of(word) for word in e.words]) for e in given]
    lines = wrapped(caption, _WIDTH - 2 * _EDGE)
    foot = _EDGE + CAPTION_LINE * len(lines)
    height = 2 * _EDGE + sum(_TITLE + _LINE * (rows[-1][1] + 1) for rows in placed) + _FOOT + foot
    figure = new_figure(_WIDTH, height)
    # In inches, from the upper left.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    colours, low = (strength_colours(), 0) if norms else (signed_colours(), -1)
    top = _EDGE
    for explanation, value, scale, head, places in zip(given, values, largest, heads, placed, strict=True):
        axes.text(_EDGE, top + 0.45 * _TITLE, head.strip(), fontsize=8, va="center", color="0.25", **PLAIN)
        level = value / (scale or 1)
        shades = colours((level + 1) / 2 if low < 0 else level)
        shades[value == 0] = 1
        _draw(axes, explanation, shades, places, top + _TITLE)
        top += _TITLE + _LINE * (places[-1][1] + 1)
    marks = [("0.6", "exactly 0"), (CERTAIN, "significant")]
    ends = ("small", "", "largest norm") if norms else ("lowers the output", "", "raises it")
    draw_foot(figure, foot, colours, low, ends, marks)
    write_caption(figure, lines)
    return figure


def _ruler() -> Any:
    """The width of a word in inches, as it is drawn."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    make: Any = RendererAgg
    renderer, font = make(72, 72, 72), FontProperties(size=_POINTS)
    return lambda word: renderer.get_text_width_height_descent(word, font, ismath=False)[0] / 72


def _lines(widths: Sequence[float]) -> list[tuple[float, int, float]]:
    """(left edge in inches, line, width) of each box; a line is as long as the figure allows."""
    places: list[tuple[float, int, float]] = []
    left, line = _EDGE, 0
    for width in widths:
        box = width + 0.1
        if left > _EDGE and left + box > _WIDTH - _EDGE:
            left, line = _EDGE, line + 1
        places.append((left, line, box))
        left += box + 0.05
    return places


def _draw(
    axes: Any, explanation: Sentence, shades: Array, places: Sequence[tuple[float, int, float]], top: float
) -> None:
    """The words of a sentence on boxes of colours [W, 4], its first line ``top`` inches below the figure's edge."""
    from matplotlib.patches import FancyBboxPatch

    certain, fixed = explanation.significant().tolist(), explanation.fixed.tolist()
    for i, (word, (left, line, width)) in enumerate(zip(explanation.words, places, strict=True)):
        y, ink = top + _LINE * line, "0.55"
        if not fixed[i]:
            # White letters on dark boxes (Rec. 601).
            ink = "white" if np.dot(shades[i, :3], (0.299, 0.587, 0.114)) < 0.5 else "black"
            edge, line_width = (CERTAIN, 1.3) if certain[i] else ("0.8", 0.6)
            how: Any = {"facecolor": shades[i], "edgecolor": edge, "lw": line_width}
            axes.add_patch(FancyBboxPatch((left, y), width, _BOX, "round,pad=0,rounding_size=0.04", **how))
        at: Any = {"ha": "center", "va": "center_baseline"}
        axes.text(left + width / 2, y + 0.53 * _BOX, word, fontsize=_POINTS, color=ink, **at, **PLAIN)
