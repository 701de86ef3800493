"""Explainers as an attribution method of inseq."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..explainers.registry import make_explainer
from ..model.arguments import PerInput, Shared
from ..solvers.groups import Pixels


def register() -> None:
    """Adds the method "moreau" to inseq, which then explains what a language model generates.

    The method displaces the input embeddings. Special tokens and padding are fixed: their scores are zero. With
    ``explainer="group"``, the default, whole tokens are in the map or out of it; other names of
    :data:`moreau_ext.METHODS` are taken too. Further arguments of ``inseq.load_model`` are the explainer's settings.
    All sentences and all generated tokens see the same noise.

    Raises:
        ImportError: inseq is missing.

    Example:
        >>> import inseq  # doctest: +SKIP
        >>> from moreau_ext.integrations.inseq import register
        >>> register()  # doctest: +SKIP
        >>> model = inseq.load_model("gpt2", "moreau", explainer="group", eta_ratio=0.2)  # doctest: +SKIP
        >>> model.attribute("The capital of France is").show()  # doctest: +SKIP

    Source: inseq.attr.feat.GradientAttributionRegistry, whose subclasses are the methods.
    """
    _registered()


@cache
def _registered() -> type:
    """The class that inseq finds among its subclasses, kept."""
    try:
        from inseq.attr.feat.gradient_attribution import GradientAttributionRegistry
    except ImportError as error:
        raise ImportError(f"the method for inseq needs inseq ({error}); install it with: pip install inseq") from error

    class MoreauAttribution(GradientAttributionRegistry):  # type: ignore[misc]  # inseq has no types
        """Sparse maps of the input embeddings, by moreau_ext."""

        method_name = "moreau"

        def __init__(self, attribution_model: Any, explainer: str = "group", **settings: object) -> None:
            super().__init__(attribution_model)
            # The wrapper's own flag: inseq puts the model in eval mode, and not itself.
            attribution_model.training = False
            self.method = _Method(attribution_model, explainer, settings)

    return MoreauAttribution


class _Method:
    """An explainer called as captum's methods are, by inseq."""

    def __init__(self, model: Any, explainer: str, settings: dict[str, Any]) -> None:
        if explainer == "group":
            settings = {"groups": Pixels(channel_axis=-1), **settings}
        self._model = model
        self._explainer = make_explainer(explainer, model, **settings)

    def attribute(self, inputs: tuple[Tensor, ...], additional_forward_args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The maps of one step, one per tensor of embeddings [B, T, features].

        Args:
            inputs: the embeddings of a decoder's tokens; those of an encoder's, and with ``attribute_target`` those of
                its decoder's.
            additional_forward_args: what inseq passes to its model behind them.
        """
        batch = inputs[0].shape[0]
        # An encoder-decoder whose decoder is not explained has the decoder's embeddings here.
        ids_at = next(i for i, a in enumerate(additional_forward_args) if not a.is_floating_point())
        # token ids of each, the target's ids, the attributed function, an attention mask of each
        count = 2 if self._model.is_encoder_decoder else 1
        tokens = additional_forward_args[ids_at : ids_at + count]
        masks = additional_forward_args[ids_at + count + 2 : ids_at + 2 * count + 2]
        special = torch.tensor(sorted(self._model.special_tokens_ids), device=inputs[0].device)
        fixed = tuple(
            [
                (torch.isin(ids, special) | (mask == 0))[..., None]
                for ids, mask, _ in zip(tokens, masks, inputs, strict=False)
            ]
        )
        arguments = tuple(
            [
                PerInput(a) if isinstance(a, Tensor) and a.dim() and a.shape[0] == batch else Shared(a)
                for a in additional_forward_args
            ]
        )
        found: tuple[Tensor, ...] = self._explainer.attribute(inputs, None, arguments, ids=0, fixed=fixed)
        return found
