"""Tokenizers of tiny pipelines, made here from a list of words."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Sequence[str], special: Mapping[str, str], **options) -> PreTrainedTokenizerFast:
    """A tokenizer over ``words``, whose numbers follow those of the special tokens.

    ``special``: tokens by role (``pad_token``, ``unk_token``, ...), numbered in this order. Where there is one to begin
    with and one to end with, a text stands between them.
    """
    numbers = {word: number for number, word in enumerate((*special.values(), *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "bos_token" in special and "eos_token" in special:
        begin, end = special["bos_token"], special["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", special_tokens=[(each, numbers[each]) for each in (begin, end)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)
