"""Text on tiny models of transformers, and on a model whose maps are known."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from tokens import DECIDING, FILL, tokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from moreau_ext import (
    AdaptiveProximalGradient,
    ConvergenceWarning,
    Pixels,
    ProximalGradient,
    TextExplainer,
    TextExplanation,
)
from moreau_ext._errors import EmptyMapWarning
from moreau_ext.integrations.words import together

KINDS = ["bert", "distilbert", "gpt2"]
SHORT = AdaptiveProximalGradient(max_gradients=400)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")  # transformers
        yield


def classifier(kind: str) -> nn.Module:
    size = {"vocab_size": 40, "num_labels": 3, "initializer_range": 0.1}
    if kind == "bert":
        config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **size)
        return BertForSequenceClassification(config).eval()
    if kind == "distilbert":
        return DistilBertForSequenceClassification(
            DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **size)
        ).eval()
    return GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=2, pad_token_id=0, **size)).eval()


def sentences(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Sentences of 4 to 11 words, one of which decides the class."""
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    texts, classes = [], []
    for _ in range(count):
        words = [FILL[below(len(FILL))] for _ in range(3 + below(8))]
        classes.append(below(3))
        words.insert(below(len(words) + 1), DECIDING[classes[-1]])
        texts.append(" ".join(words))
    return texts, torch.tensor(classes)


@cache
def trained(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    made, model = tokenizer("$A [SEP]" if kind == "gpt2" else "[CLS] $A [SEP]"), classifier(kind)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(120):
        texts, classes = sentences(64, 1000 + step)
        logits = model(**made(texts, padding=True, return_tensors="pt")).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, classes).backward()
        optimizer.step()
    return model, made


def same(one: TextExplanation, other: TextExplanation) -> None:
    assert one.words == other.words
    size = float(one.attribution.norm())
    assert size > 0
    assert float((one.attribution - other.attribution).norm()) < 1e-4 * size
    assert float((one.scores - other.scores).abs().max()) < 1e-4 * float(one.scores.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_neither_on_padding_nor_on_the_batch(kind: str) -> None:
    model, made = classifier(kind), tokenizer(None if kind == "gpt2" else "[CLS] $A [SEP]")
    texts = ["the cat sees good bread", "the house under a big blue tree walks with bad water"]
    explainer = TextExplainer(model, made, solver=SHORT)
    whole = explainer.attribute(texts)
    for text, one in zip(texts, whole, strict=True):
        alone = explainer.attribute(text)
        same(one, alone)
        score = float(model(**made(text, return_tensors="pt")).logits.max())
        assert float(one.solution.score) == pytest.approx(score, rel=1e-5)
        # Special tokens do not move, and padding is not there.
        assert [w for w, f in zip(one.words, one.fixed.tolist(), strict=True) if not f] == text.split()
        assert not bool(one.attribution[one.solution.fixed[0].all(1)].any())
    for side, length in (("left", 16), ("right", 21)):
        made.padding_side = side
        padded = made(texts[::-1], padding="max_length", max_length=length, return_tensors="pt")
        for one, other in zip(whole[::-1], explainer.attribute(padded), strict=True):
            same(one, other)


def test_words_of_several_tokens_are_one_group() -> None:
    model, made = classifier("bert"), tokenizer()
    text = "the unbreakable dog sees"
    found = TextExplainer(model, made, support=1, solver=SHORT).attribute(text)
    assert found.words == ("[CLS]", "the", "unbreakable", "dog", "sees", "[SEP]")
    assert found.tokens[2:5] == ("un", "##break", "##able")
    assert found.word_of_token.tolist() == [0, 1, 2, 2, 2, 3, 4, 5]
    assert int((found.norms > 0).sum()) == int(found.solution.support) == 1
    plain = TextExplainer(model, made, "moreau", solver=SHORT).attribute(text)
    x = model.get_input_embeddings().weight.detach()
    moved = (x[made(text, return_tensors="pt").input_ids[0]] - x.mean(0)).double()
    token = (plain.attribution.double() * moved).sum(1)
    torch.testing.assert_close(plain.scores[2], token[2:5].sum())
    torch.testing.assert_close(plain.norms[2], plain.attribution[2:5].double().norm())
    tokens = TextExplainer(model, made, support=1, groups=Pixels(channel_axis=-1), solver=SHORT).attribute(text)
    assert int((tokens.attribution != 0).any(1).sum()) == 1
    # The second sentence's first word is not the first one's.
    pair = TextExplainer(model, made, "gradient").attribute([("old Tom", "cat walks")])[0]
    assert pair.words == ("[CLS]", "old", "Tom", "[SEP]", "cat", "walks", "[SEP]")
    assert pair.tokens[2] == "[UNK]"
    assert not bool(pair.fixed[2])
    same_words = TextExplainer(model, made, "gradient").attribute(made([text], return_tensors="pt"))[0]
    assert same_words.words == found.words


class Sum(nn.Module):
    """Σ_t ⟨a, x_t⟩·(weight of t), with the arguments that it was given last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.seen: dict[str, Any] = {}

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs_embeds: Tensor, attention_mask: Any = None, token_type_ids: Any = None) -> Tensor:
        self.seen = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        weight = torch.ones(inputs_embeds.shape[:2]) if token_type_ids is None else 1.0 + token_type_ids
        return (inputs_embeds.sum(2) * weight).sum(1)


def test_scores_of_a_linear_model() -> None:
    """A = a; padding on either side is cut off every argument of tokens, and a hole is a fixed token."""
    model = Sum().eval()
    numbers = torch.tensor([[0, 5, 3, 7], [4, 6, 0, 0], [1, 0, 2, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
    batch = {"input_ids": numbers, "attention_mask": mask, "token_type_ids": torch.tensor([[1, 0, 1, 0]] * 3)}
    found = TextExplainer(model, method="moreau", solver=ProximalGradient(2, 10), rho=1.0).attribute(batch)
    assert [s.words for s in found] == [("5", "3", "7"), ("4", "6"), ("1", "0", "2", "8")]
    average = model.embedding.weight.detach().mean(0)
    for explained, tokens, weights in (
        (found[0], [5, 3, 7], [1.0, 2.0, 1.0]),
        (found[1], [4, 6], [2.0, 1.0]),
        (found[2], [1, 0, 2, 8], [2.0, 0.0, 2.0, 1.0]),
    ):
        x = model.embedding.weight.detach()[tokens]
        expected = (x - average).sum(1) * torch.tensor(weights)
        torch.testing.assert_close(explained.scores.float(), expected, rtol=1e-4, atol=1e-5)
    assert found[2].fixed.tolist() == [False, True, False, False]
    assert not bool(found[2].significant()[1])
    assert model.seen["attention_mask"].tolist()[0] == [1, 0, 1, 1]


def test_targets_follow_their_sentences() -> None:
    model, made = classifier("distilbert"), tokenizer()
    texts, classes = ["the cat sees", "old dog", "a big tree walks"], torch.tensor([2, 0, 1])
    explainer = TextExplainer(model, made, "smoothgrad", num_samples=4)
    for target in (classes, classes.tolist(), [lambda row, c=c: row[c] for c in classes.tolist()]):
        for text, one, label in zip(texts, explainer.attribute(texts, target), classes.tolist(), strict=True):
            assert one.solution.target is None or int(one.solution.target) == label
            same(one, explainer.attribute(text, label))
    torch.manual_seed(0)
    language = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)).eval()
    made.padding_side = "left"
    explainer = TextExplainer(language, made, "smoothgrad", num_samples=4)
    for text, one in zip(texts, explainer.attribute(texts, lambda logits: logits[:, -1, 7]), strict=True):
        score = language(**made(text, return_tensors="pt")).logits[0, -1, 7]
        torch.testing.assert_close(one.solution.score[0], score.detach())


def test_one_warning_a_call() -> None:
    model, made = classifier("bert"), tokenizer()
    explainer = TextExplainer(model, made, eta_ratio=1.0, solver=ProximalGradient(2, 10, tol=1e-9))
    with pytest.warns() as record:
        explainer.attribute(["old dog", "the cat sees"])
    text = [str(w.message) for w in record if w.category is EmptyMapWarning]
    assert text[0].startswith("2 of 2 maps are zero")
    with pytest.warns(ConvergenceWarning, match="2 of 2 maps did not converge") as record:
        TextExplainer(model, made, solver=ProximalGradient(2, 10, tol=1e-9)).attribute(["old dog", "the cat sees"])
    assert [w.filename for w in record] == [__file__]


def test_rendering() -> None:
    found = TextExplainer(classifier("bert"), tokenizer(), "smoothgrad", num_samples=8).attribute("the <b> cat good")
    page, line = found.to_html(), found.to_terminal()
    assert found._repr_html_() == page
    assert re.sub(r"\x1b\[[0-9;]*m", "", line) == " ".join(found.words)
    text = re.sub(r"<[^>]*>", "", page)
    assert text == html.escape(" ".join(found.words))
    assert "<" in found.words
    assert page.count("<span") == len(found.words)
    rows = repr(found).splitlines()
    assert len(rows) == len(found.words) + 2
    assert rows[1].split() == ["[CLS]", "0", "0", "0", "fixed"]
    marks = [row.endswith("*") for row in rows[1:-1]]
    assert marks == found.significant().tolist()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module with get_input_emb"):
        TextExplainer(nn.Linear(2, 2))
    model = Sum().eval()
    model.forward = lambda x: x  # type: ignore[method-assign]  # a model without the argument
    with pytest.raises(TypeError, match="forward does not take inputs_embeds"):
        TextExplainer(model)
    explainer = TextExplainer(Sum().eval())
    numbers = torch.ones(1, 2, dtype=torch.int64)
    for texts, error, text in (
        ("a b", TypeError, "strings need a tokenizer"),
        ({"attention_mask": numbers}, ValueError, "a batch with input_ids"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids as a tensor"),
        ({"input_ids": numbers[0]}, ValueError, r"input_ids \[B, T\]"),
        ({"input_ids": numbers, "attention_mask": 0 * numbers}, ValueError, "sentence 0 has no tokens"),
    ):
        with pytest.raises(error, match=text):
            explainer.attribute(texts)
    assert explainer.attribute([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "alone"), [("bert", 61), ("distilbert", 61), ("gpt2", 45)])
def test_the_deciding_word_alone(kind: str, alone: int) -> None:
    """95 % of 64 sentences, and 70 % for GPT-2, whose last and first tokens weigh by their place."""
    model, made = trained(kind)
    texts, classes = sentences(64, 7)
    explainer = TextExplainer(model, made, support=1, solver=SHORT)
    hits = 0
    for text, label, one in zip(texts, classes.tolist(), explainer.attribute(texts), strict=True):
        assert not bool(one.norms[one.fixed].any())
        marked = [w for w, n in zip(one.words, one.norms.tolist(), strict=True) if n > 0]
        assert len(marked) == 1
        assert int(one.fixed.sum()) == len(one.words) - len(text.split())
        hits += marked == [DECIDING[label]]
    assert hits >= alone


def test_errors_of_features_that_are_correlated_add_up() -> None:
    """g = s·v with one random s: Σ c·g errs by |Σ c·v|, and by √Σ (c·v)² if the features were independent."""
    v, c = torch.randn(5, 3), torch.randn(5, 3)
    place = torch.tensor([0, 1, 1, 2, 2])
    found = together(torch.randn(4000, 1, 1) * v, c, place, 3)
    weighted = (c * v).double()
    sums = torch.stack([weighted[place == w].sum().abs() / weighted[place == w].norm() for w in range(3)])
    torch.testing.assert_close(found, sums)
    apart = together(torch.randn(4000, 5, 3), c, place, 3)
    torch.testing.assert_close(apart, torch.ones_like(apart), atol=0.1, rtol=0)
    assert together(torch.zeros(8, 5, 3), c, place, 3).tolist() == [1, 1, 1]
