"""A tokenizer of a few words, made here: tests load nothing."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = "the a cat dog house tree walks sees under over river stone bread water small big old blue red with and"
FILL = _WORDS.split()
DECIDING = ["good", "bad", "odd"]


def tokenizer(template: str | None = "[CLS] $A [SEP]") -> Any:
    """Words, and pieces of one long word."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *FILL, *DECIDING, "un", "##break", "##able"])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    if template is not None:
        ids = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        pair = f"{template} $B:1 [SEP]:1"
        made.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=ids)
    names = {name.strip("[]").lower() + "_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)
