"""Text: which words a model's output rests on, through its input embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from .._errors import ConvergenceWarning, EmptyMapWarning, without
from ..analysis.hessian import Bank
from ..explainers.base import Explainer, warn_empty, warn_unconverged
from ..explainers.inputs import check_ids
from ..explainers.moreau import GroupSparseMoreauGrad
from ..explainers.registry import make_explainer
from ..model.arguments import PerInput
from ..model.restore import leaves_as_found
from ..model.target import PerRow, Target, read_target
from ..solvers.groups import Labels, Pixels
from ..solvers.problem import Problem
from .words import TextExplanation, explanation

# Of transformers, or one that is called alike and returns input_ids and further arguments of the model.
Tokenizer = Callable[..., Mapping[str, object]]

# Samples, or pairs of them, in which the errors of a word's features are compared.
_TOGETHER = 64

# What a tokenizer returns beside the model's arguments.
_NOT_ARGUMENTS = ("input_ids", "attention_mask", "special_tokens_mask", "offset_mapping", "length", "labels")


class _FromEmbeddings(nn.Module):
    """A model as a function of its input embeddings and of further arguments, a dict."""

    def __init__(self, model: nn.Module, always: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.always = model, always
        # Of this module alone: the model has flags of its own.
        self.training = False

    def forward(self, embeddings: Tensor, arguments: Mapping[str, Any]) -> Any:
        return self.model(inputs_embeds=embeddings, **arguments, **self.always)


def _targets(index: Any, rows: Tensor) -> Any:
    """The targets of some sentences."""
    if isinstance(index, PerRow):
        return [index.scores_of[row] for row in rows.tolist()]
    if not isinstance(index, Tensor):
        return index
    some = index[rows]
    return some[:, 0] if some.shape[1] == 1 else [tuple(row) for row in some.tolist()]


class TextExplainer:
    """Explains what a language model makes of sentences, word by word.

    The embeddings x [tokens, features] of a sentence are displaced. Special tokens are fixed, and padding is cut off
    before the model sees it. The features of a word are one group (method "group"): whole words are in the map or out
    of it. With the map A, the mean m of the embedding matrix, and t the tokens of a word, its signed score is

        Σ_t ⟨A_t, x_t − m⟩,

    to first order the change of the output if the average token stood there instead, taken back: positive where the
    word raises the output. ``norms`` are √Σ_t ‖A_t‖².

    Args:
        model: from Hugging Face's transformers, or one like it: an nn.Module with ``get_input_embeddings()`` and a
            forward that takes ``inputs_embeds``. Its output is a tensor, or has ``logits``.
        tokenizer: called with strings; word_ids() of its batches say which tokens are a word. Without one, batches of
            token ids are explained.
        method: a name of ``METHODS``. "group" takes other ``groups`` too: Pixels(channel_axis=-1) are the tokens.
        settings: of the method's explainer.

    Raises:
        TypeError, ValueError: a model that does not take embeddings; a setting, by name.

    Example:
        >>> import torch
        >>> from moreau_ext import TextExplainer
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
        >>> ids, mask = torch.tensor([[5, 3, 7], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> found = TextExplainer(Model().eval()).attribute({"input_ids": ids, "attention_mask": mask})
        >>> [(s.words, (s.norms > 0).tolist()) for s in found]
        [(('5', '3', '7'), [False, True, False]), (('1', '2'), [False, True])]

    A sentence's explanation depends neither on padding nor on the other sentences, beyond the rounding of the model's
    passes: sentences of one length are explained together, and all see the noise of one id.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer | None = None, method: str = "group", **settings: object
    ) -> None:
        if not isinstance(model, nn.Module) or not callable(getattr(model, "get_input_embeddings", None)):
            raise TypeError(
                f"model: expected an nn.Module with get_input_embeddings(), got {type(model).__name__}; wrap it in one "
                "whose forward takes inputs_embeds"
            )
        parameters = inspect.signature(model.forward).parameters
        some = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        if not some and "inputs_embeds" not in parameters:
            raise TypeError(f"model: {type(model).__name__}.forward does not take inputs_embeds")
        if settings.get("layer") is not None:
            raise ValueError("layer: the words' scores are those of the embeddings; give make_explainer a layer")
        self.model = model
        self.tokenizer: Any = tokenizer
        self._by_word = method == "group" and "groups" not in settings
        if self._by_word:
            settings["groups"] = Pixels(channel_axis=-1)
        always = {"use_cache": False} if "use_cache" in parameters else {}
        self.explainer: Explainer = make_explainer(method, _FromEmbeddings(model, always), **settings)

    @overload
    def attribute(self, texts: str, target: Target = None, *, ids: Tensor | None = None) -> TextExplanation: ...

    @overload
    def attribute(
        self,
        texts: list[str] | list[tuple[str, str]] | Mapping[str, object],
        target: Target = None,
        *,
        ids: Tensor | None = None,
    ) -> list[TextExplanation]: ...

    @leaves_as_found
    def attribute(self, texts: Any, target: Target = None, *, ids: Tensor | None = None) -> Any:
        """The explanations of sentences.

        Args:
            texts: a string, a list of strings or of pairs of strings, or a tokenizer's batch: ``input_ids`` [B, T] and,
                where there is padding, ``attention_mask``; ``special_tokens_mask`` marks further tokens to fix. Its
                other entries [B, ...] are passed to the model.
            target: as in :meth:`Explainer.attribute`. A callable sees outputs without padding, so that
                ``lambda logits: logits[:, -1, 42]`` is a language model's next token.
            ids: int64 [B], names to the noise bank; 0 for all by default, so that one sentence, or a changed one, sees
                the same noise in every batch.

        Returns:
            A :class:`TextExplanation` for a string, else one for each sentence.

        Raises:
            TypeError, ValueError: strings without a tokenizer, a batch without ``input_ids``; see
                :meth:`Explainer.attribute`.
        """
        given = [texts] if isinstance(texts, str) else texts
        if not len(given):
            return []
        batch = self._batch(given)
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]  # of transformers
        device = embedding.weight.device
        numbers = batch["input_ids"].to(device)
        real = torch.as_tensor(batch.get("attention_mask", torch.ones_like(numbers)), device=device).bool()
        special = self._special(batch, numbers) | ~real
        count = len(numbers)
        index = read_target(target, count, device)
        names = check_ids(torch.zeros(count, dtype=torch.int64) if ids is None else ids, count, device)
        if not bool(real.any(1).all()):
            raise ValueError(f"texts: sentence {int((~real.any(1)).nonzero()[0])} has no tokens")
        # From the first to the last token that is not padding.
        first, stop = real.int().argmax(1), real.shape[1] - real.flip(1).int().argmax(1)
        average = embedding.weight.detach().mean(0, dtype=torch.float32)
        found: list[TextExplanation | None] = [None] * count
        for length in sorted(set((stop - first).tolist())):
            rows = (stop - first == length).nonzero().squeeze(1)
            columns = first[rows, None] + torch.arange(length, device=device)
            words = [self._words(batch, row, columns[i].tolist()) for i, row in enumerate(rows.tolist())]
            with torch.no_grad():
                x = embedding(numbers[rows[:, None], columns])
            arguments = self._arguments(batch, real, rows, columns)
            fixed = special[rows[:, None], columns]
            explainer = self.explainer
            groups = torch.tensor(words, device=device)
            if self._by_word and isinstance(explainer, GroupSparseMoreauGrad) and bool((groups.diff(dim=1) == 0).any()):
                explainer = replace(explainer, groups=Labels(groups[..., None]))
            further: Any = (PerInput(arguments) if arguments else {},)
            with without(EmptyMapWarning, ConvergenceWarning):
                solution = explainer.attribute(
                    x, _targets(index, rows), further, ids=names[rows], fixed=fixed[..., None], return_solution=True
                )
                # Without noise there is no error, and of some methods it is not known.
                erring = (solution.standard_error > 0).flatten(1).any(1).tolist()
                posed = None
                if any(erring):
                    posed = explainer.problem(
                        x, _targets(index, rows), further, ids=names[rows], fixed=fixed[..., None]
                    )
            with self.explainer._evaluating(depth=None):
                for i, row in enumerate(rows.tolist()):
                    places = columns[i].tolist()
                    tokens = self._tokens(numbers[row, columns[i]].tolist())
                    written = self._written(tokens, words[i], self._spans(given, batch, row, places))
                    this = torch.tensor([i], device=device)
                    one = solution.take(this)
                    gradients = (
                        self._samples(posed.take(this), one.displacement) if posed is not None and erring[i] else None
                    )
                    found[row] = explanation(tokens, words[i], written, x[i] - average, one, gradients)
        explained = [e for e in found if e is not None]
        warn_empty([e.solution for e in explained])
        warn_unconverged([e.solution for e in explained], *self.explainer._claim)
        return explained[0] if isinstance(texts, str) else explained

    def _samples(self, problem: Problem, displacement: Tensor) -> Tensor:
        """Gradients at further noisy copies of one sentence, or their means over pairs z, −z where the explainer has
        these; [n, T, features]. Those of many sentences would not fit into memory."""
        pairs = getattr(getattr(self.explainer, "_method", self.explainer), "antithetic", True)
        count = _TOGETHER * (1 + pairs)
        bank = Bank(problem, (displacement,), count, antithetic=pairs)
        return bank.gradients(0, count).view(_TOGETHER, -1, *displacement.shape[1:]).mean(1)

    def _batch(self, texts: Any) -> Mapping[str, Any]:
        if isinstance(texts, Mapping):
            if "input_ids" not in texts:
                raise ValueError(f"texts: expected a batch with input_ids, got {sorted(texts)}")
            numbers = texts["input_ids"]
            if not isinstance(numbers, Tensor):
                raise TypeError("texts: expected input_ids as a tensor [B, T]: tokenizer(..., return_tensors='pt')")
            if numbers.dim() != 2:
                raise ValueError(f"texts: expected input_ids [B, T], got {tuple(numbers.shape)}")
            return texts
        if self.tokenizer is None:
            raise TypeError("texts: strings need a tokenizer; without one give a batch with input_ids")
        made: Mapping[str, Any] = self.tokenizer(
            list(texts), padding=len(texts) > 1, return_tensors="pt", return_special_tokens_mask=True
        )
        return made

    def _special(self, batch: Mapping[str, Any], numbers: Tensor) -> Tensor:
        """Which tokens stand for no text; bool [B, T]."""
        if "special_tokens_mask" in batch:
            return torch.as_tensor(batch["special_tokens_mask"], device=numbers.device).bool()
        names = set(getattr(self.tokenizer, "all_special_ids", ()))
        # These stand for a word.
        names -= {getattr(self.tokenizer, name, None) for name in ("unk_token_id", "mask_token_id")}
        return torch.isin(numbers, torch.tensor(sorted(names), dtype=numbers.dtype, device=numbers.device))

    def _words(self, batch: Any, row: int, columns: list[int]) -> list[int]:
        """The number of each token's word, from 0."""
        try:
            words, parts = batch.word_ids(row), batch.sequence_ids(row)
        except (AttributeError, ValueError):  # no tokenizer's batch, or one of a tokenizer in Python
            return [*range(len(columns))]
        found: dict[Any, int] = {}
        keys = [("token", c) if words[c] is None else (parts[c], words[c]) for c in columns]
        return [found.setdefault(key, len(found)) for key in keys]

    def _tokens(self, numbers: list[int]) -> list[str]:
        if self.tokenizer is None:
            return [str(n) for n in numbers]
        return [str(t) for t in self.tokenizer.convert_ids_to_tokens(numbers)]

    def _spans(self, given: Any, batch: Any, row: int, columns: list[int]) -> list[tuple[str, int, int] | None]:
        """The string that each token stands in, with its first and last place; None where it is not known."""
        if isinstance(given, Mapping) or not getattr(batch, "is_fast", False):
            return [None] * len(columns)
        strings = (given[row],) if isinstance(given[row], str) else given[row]
        parts, found = batch.sequence_ids(row), []
        for column in columns:
            span = batch.token_to_chars(row, column)
            found.append(None if span is None else (strings[parts[column]], span.start, span.end))
        return found

    def _written(self, tokens: list[str], words: list[int], spans: list[tuple[str, int, int] | None]) -> list[str]:
        """The words as they stand in the string, or as the tokenizer joins their tokens."""
        join = getattr(self.tokenizer, "convert_tokens_to_string", "".join)
        written = []
        for word in range(max(words) + 1):
            some = [i for i, w in enumerate(words) if w == word]
            known = [span for i in some if (span := spans[i]) is not None]
            text = known[0][0][min(s for _, s, _ in known) : max(e for _, _, e in known)] if known else ""
            written.append((text or str(join([tokens[i] for i in some]))).strip())
        return written

    def _arguments(self, batch: Mapping[str, Any], real: Tensor, rows: Tensor, columns: Tensor) -> dict[str, Any]:
        """The model's further arguments for some sentences without their padding."""
        made = {}
        for name, value in batch.items():
            if name not in _NOT_ARGUMENTS and isinstance(value, Tensor):
                of_tokens = value.shape[:2] == real.shape
                value = value.to(real.device)
                made[name] = value[rows[:, None], columns] if of_tokens else value[rows]
        held = real[rows[:, None], columns]
        if not bool(held.all()):
            made["attention_mask"] = held.long()
        return made
