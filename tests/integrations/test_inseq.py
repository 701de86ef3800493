"""The method that inseq calls, on tiny language models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokens import tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from moreau_ext import ProximalGradient
from moreau_ext.integrations.inseq import register

inseq = pytest.importorskip("inseq", reason="inseq is installed by hand: pip install inseq")

SOLVER = ProximalGradient(num_samples=4, max_steps=10, tol=0.0)
PROMPT, WHOLE = "[CLS] the cat walks", "[CLS] the cat walks under the tree"


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register()
    register()  # changes nothing


def decoder() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=40,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return GPT2LMHeadModel(config).eval()


def encoder_decoder() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, initializer_factor=3.0)
    return T5ForConditionalGeneration(config).eval()


def maps_of(model: Any, source: str, target: str, name: str, **settings: Any) -> Any:
    made = tokenizer(None)
    made.eos_token, made.bos_token = "[SEP]", "[CLS]"
    attribute_target = settings.pop("attribute_target", False)
    loaded = inseq.load_model(model, name, tokenizer=made, **settings)
    (found,) = loaded.attribute(
        source, target, attribute_target=attribute_target, show_progress=False
    ).sequence_attributions
    return found


def known(maps: Tensor) -> Tensor:
    return maps.nan_to_num(0)


def test_the_plain_gradient_is_inseqs_saliency_beside_special_tokens() -> None:
    saliency = known(maps_of(decoder(), PROMPT, WHOLE, "saliency").target_attributions)
    ours = known(maps_of(decoder(), PROMPT, WHOLE, "moreau", explainer="gradient").target_attributions)
    torch.testing.assert_close(ours[1:].abs(), saliency[1:], rtol=1e-4, atol=1e-7)
    assert float(saliency[0].max()) > 0
    assert not ours[0].any()


def test_whole_tokens_are_in_the_map_or_out_of_it() -> None:
    maps = known(maps_of(decoder(), PROMPT, WHOLE, "moreau", eta_ratio=0.5, solver=SOLVER).target_attributions)
    tokens = (maps != 0).float().mean(-1)
    assert set(tokens.flatten().tolist()) == {0.0, 1.0}
    # Of every generated token one prefix token at least, and never the special one.
    assert bool((tokens.sum(0) >= 1).all())
    assert not tokens[0].any()


@pytest.mark.parametrize("attribute_target", [False, True])
def test_encoder_and_decoder(attribute_target: bool) -> None:
    found = maps_of(
        encoder_decoder(), "the cat walks [SEP]", "a dog sees [SEP]", "moreau", solver=SOLVER, rho=0.1,
        attribute_target=attribute_target,
    )  # fmt: skip
    source = known(found.source_attributions)
    assert source[:3].abs().sum() > 0
    assert not source[3].any()  # </s>
    if attribute_target:
        assert known(found.target_attributions).abs().sum() > 0
    else:
        assert found.target_attributions is None
