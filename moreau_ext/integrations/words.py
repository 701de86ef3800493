"""The explanation of a sentence, word by word, as numbers, a table, HTML or coloured text."""

from __future__ import annotations

import html
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solvers.solution import Solution

# Red raises the output, blue lowers it.
_RAISES, _LOWERS = (214, 66, 48), (52, 110, 190)


@dataclass(frozen=True, eq=False, repr=False)
class TextExplanation:
    """Which words of a sentence an output rests on. Special tokens are words too; they are fixed, with a score of 0.

    Args:
        words: W of them, as text.
        scores: Σ_t ⟨A_t, x_t − m⟩ over a word's tokens, in units of the output; positive where the word raises it.
            float64 [W].
        norms: √Σ_t ‖A_t‖²; float64 [W].
        standard_error: of the scores, by sampling; float64 [W]. The errors of a word's features are correlated: by how
            much is measured at 64 further noisy copies, or pairs of them, which gradient_evaluations does not count.
            NaN where it is not known.
        fixed: bool [W].
        tokens: T of them, as the tokenizer writes them.
        word_of_token: int64 [T].
        attribution: A, [T, features].
        solution: of this sentence alone.
    """

    words: tuple[str, ...]
    scores: Tensor
    norms: Tensor
    standard_error: Tensor
    fixed: Tensor
    tokens: tuple[str, ...]
    word_of_token: Tensor
    attribution: Tensor
    solution: Solution

    def significant(self, q: float = 0.1) -> Tensor:
        """The words that are in the map beyond sampling noise, bool [W]; see :meth:`Solution.significant`."""
        marked = self.solution.significant(q)[0].any(1)
        return _of_words(marked.double(), self.word_of_token, len(self.words)) > 0

    def __repr__(self) -> str:
        size = max(len(word) for word in self.words)
        certain = self.significant().tolist()
        lines = [f"{'word':<{size}}  {'score':>9}  {'error':>8}  {'norm':>8}"]
        for i, word in enumerate(self.words):
            score, error, norm = (float(v[i]) for v in (self.scores, self.standard_error, self.norms))
            mark = "fixed" if bool(self.fixed[i]) else "*" if certain[i] else ""
            lines.append(f"{word:<{size}}  {score:>9.3g}  {error:>8.2g}  {norm:>8.3g}  {mark}".rstrip())
        return "\n".join([*lines, "* beyond sampling noise at q = 0.1"])

    def to_terminal(self) -> str:
        """The sentence in ANSI colours: red raises the output, blue lowers it; significant words are underlined."""
        drawn = []
        for word, score, share, certain, fixed in self._marks():
            if fixed:
                drawn.append(f"\x1b[2m{word}\x1b[0m")
            elif share == 0:
                drawn.append(word)
            else:
                r, g, b = _mixed(score, share)
                drawn.append(f"\x1b[30;48;2;{r};{g};{b}{';4' if certain else ''}m{word}\x1b[0m")
        return " ".join(drawn)

    def to_html(self) -> str:
        """The sentence as HTML without scripts or files, coloured as :meth:`to_terminal`; the numbers are titles."""
        drawn = []
        for i, (word, score, share, certain, fixed) in enumerate(self._marks()):
            style = "color:#888" if fixed else "padding:0 .15em;border-radius:.2em"
            if share:
                style += ";color:#000;background:rgb({},{},{})".format(*_mixed(score, share))
            if certain:
                style += ";text-decoration:underline"
            title = "fixed" if fixed else f"{score:.3g} ± {float(self.standard_error[i]):.2g}"
            drawn.append(f'<span style="{style}" title="{title}">{html.escape(word)}</span>')
        return f'<p style="line-height:1.8">{" ".join(drawn)}</p>'

    _repr_html_ = to_html

    def _marks(self) -> list[tuple[str, float, float, bool, bool]]:
        """(word, score, share of the largest |score|, significant, fixed) of each."""
        largest = float(self.scores.abs().max()) or 1.0
        columns = (self.scores.tolist(), self.significant().tolist(), self.fixed.tolist())
        return [
            (word, score, abs(score) / largest, certain, fixed)
            for word, score, certain, fixed in zip(self.words, *columns, strict=True)
        ]


def _mixed(score: float, share: float) -> tuple[int, ...]:
    colour = _RAISES if score > 0 else _LOWERS
    return tuple(round(255 + share * (c - 255)) for c in colour)


def _of_words(values: Tensor, word_of_token: Tensor, words: int) -> Tensor:
    """The sum over the tokens of each word, float64."""
    return values.new_zeros(words, dtype=torch.float64).index_add_(0, word_of_token, values.double())


def together(gradients: Tensor, moved: Tensor, word_of_token: Tensor, words: int) -> Tensor:
    """√(Var Σ_t ⟨g_t, c_t⟩ / Σ_t Σ_j c_tj² Var g_tj) over the tokens t of each word, c = x − m; float64 [W].

    Errors of features that are correlated add up to more, or to less, than independent ones.

    Args:
        gradients: g of each sample, [n, T, features].
        moved: x − m, [T, features].
        word_of_token: int64 [T].
        words: W.
    """
    weighted = gradients.double() * moved.double()
    sums = weighted.new_zeros(len(weighted), words).index_add_(1, word_of_token, weighted.sum(2))
    apart = _of_words(weighted.var(0).sum(1), word_of_token, words)
    return torch.where(apart > 0, sums.var(0) / apart, 1.0).sqrt()


def explanation(
    tokens: list[str], words: list[int], written: list[str], moved: Tensor, solution: Solution, gradients: Tensor
) -> TextExplanation:
    """The explanation of one sentence.

    Args:
        tokens: T of them.
        words: the number of each token's word, from 0.
        written: each word as text.
        moved: x − m, [T, features].
        solution: of the sentence.
        gradients: see :func:`together`.
    """
    count = len(written)
    place = torch.tensor(words, device=moved.device)
    a, c, error = solution.attribution[0].double(), moved.double(), solution.standard_error[0].double()
    apart = _of_words((error * c).square().sum(1), place, count).sqrt()
    return TextExplanation(
        words=tuple(written),
        scores=_of_words((a * c).sum(1), place, count),
        norms=_of_words(a.square().sum(1), place, count).sqrt(),
        standard_error=apart * together(gradients, c, place, count),
        fixed=_of_words((~solution.fixed[0].all(1)).double(), place, count) == 0,
        tokens=tuple(tokens),
        word_of_token=place,
        attribution=solution.attribution[0],
        solution=solution,
    )
