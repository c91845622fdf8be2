"""Prompts made into numbers: how texts are prepared, which text is whose, and what is refused."""

import sys
import types

import pytest

pytest.importorskip("tokenizers")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from difa_compile.bundle.manifest import KINDS, LONGEST, STEPS, Encoder, Prompts, Text, Tokens, is_text
from difa_compile.bundle.prompts import KINDS as ATTRIBUTES
from difa_compile.bundle.prompts import (
    PREPARATIONS,
    prepared,
    texts_for,
    texts_of,
    tokenizer_from,
    tokens_of,
)
from difa_compile.errors import BundleInputError, BundleIntegrityError, MissingDependencyError

PROMPTS = Prompts(
    {
        "prompt": Text(),
        "prompt_2": Text("prompt"),
        "negative_prompt": Text(default="grey"),
        "negative_prompt_2": Text("negative_prompt", default="dark"),
    },
    (Encoder("cond", -2, ()),),
)
COND, UNCOND = ("prompt", "prompt_2"), ("negative_prompt", "negative_prompt_2")


def tokens(steps=(), before="", after="", special=True, inputs=None):
    return Tokens("a.json", "prompt", inputs or {"a.ids": "ids", "a.mask": "mask", "a.types": "types"}, steps, before,
                  after, special)  # fmt: skip


def words(length=4):
    """Four numbers a text, 0 where there is none."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "?": 1, "a": 2, "cat": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="<pad>")
    return tokenizer


def test_what_a_manifest_may_name_is_known_here():
    assert (tuple(PREPARATIONS), tuple(ATTRIBUTES)) == (STEPS, KINDS)


@pytest.mark.parametrize(
    ("steps", "text", "wanted"),
    [
        ((), " A  Cat\n", " A  Cat\n"),
        (("strip",), " A  Cat\n", "A  Cat"),
        (("lower", "strip"), " A  Cat\n", "a  cat"),
        (("spaces", "strip"), " A \t Cat\n\u3000", "A Cat"),
        (("unescape",), "caf&eacute; &amp;lt;", "café <"),
    ],
)
def test_texts_are_prepared(steps, text, wanted):
    assert prepared(text, tokens(steps)) == wanted
    assert prepared(text, tokens(steps, "say: ", "!")) == f"say: {wanted}!"


def test_texts_are_mended_where_the_pipeline_did(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text.replace("â€™", "'")))
    assert prepared(" donâ€™t ", tokens(("fix", "strip"))) == "don't"
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingDependencyError, match="pip install ftfy"):
        prepared("a", tokens(("fix",)))


def test_tokens_of_a_text():
    tokenizer = tokenizer_from(words().to_str().encode(), "a.json")
    found = tokens_of(tokenizer, "A cat", tokens(("lower",)))
    assert {name: value.tolist() for name, value in found.items()} == {
        "a.ids": [[2, 3, 0, 0]],
        "a.mask": [[1, 1, 0, 0]],
        "a.types": [[0, 0, 0, 0]],
    }
    assert all(value.dtype is torch.int64 for value in found.values())
    assert tokens_of(tokenizer, "a cat a cat a", tokens(inputs={"x": "ids"}))["x"].tolist() == [[2, 3, 2, 3]]
    assert tokens_of(tokenizer, "", tokens(inputs={"x": "mask"}))["x"].tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"version": "1.0"}', b"[]"])
def test_what_is_no_tokenizer(content):
    with pytest.raises(BundleIntegrityError, match="is no tokenizer that"):
        tokenizer_from(content, "a.json")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        tokenizer_from(b"{}", "a.json")


def test_texts_of_a_call():
    given = {"prompt": "a", "prompt_2": ["b", "c"], "negative_prompt": None}
    assert texts_of(PROMPTS, given) == {"prompt": ("a",), "prompt_2": ("b", "c")}
    assert texts_of(None, {"prompt": None}) == {}


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        (None, {"prompt": "a"}, "has no text encoder"),
        (PROMPTS, {"prompt_3": "a"}, "takes no 'prompt_3'; it takes prompt, prompt_2"),
        (Prompts({"prompt": Text()}, ()), {"negative_prompt": "a"}, "had no unconditional half"),
        (PROMPTS, {"prompt": 3}, "must be a text, or a list of texts"),
        (PROMPTS, {"prompt": []}, "must be a text, or a list of texts"),
        (PROMPTS, {"prompt": ["a", 3]}, "must be a text, or a list of texts"),
        (PROMPTS, {"prompt": {"a": 1}}, "must be a text, or a list of texts"),
        (PROMPTS, {"prompt": "\ud800"}, "no text that UTF-8 can hold"),
        (PROMPTS, {"prompt": ["a", "x" * (LONGEST + 1)]}, "characters long"),
    ],
)
def test_texts_that_are_refused(prompts, given, message):
    with pytest.raises(BundleInputError, match=message):
        texts_of(prompts, given)


@pytest.mark.parametrize(
    ("names", "given", "needed", "wanted"),
    [
        (COND, {"prompt": ("a", "b")}, False, {"prompt": ("a", "b"), "prompt_2": ("a", "b")}),
        (COND, {"prompt": ("a",), "prompt_2": ("b",)}, False, {"prompt": ("a",), "prompt_2": ("b",)}),
        (COND, {"negative_prompt": ("a",)}, False, None),
        (UNCOND, {"prompt": ("a",)}, False, None),
        (UNCOND, {"prompt": ("a",)}, True, {"negative_prompt": ("grey",), "negative_prompt_2": ("dark",)}),
        (UNCOND, {"negative_prompt": ("a",)}, True, {"negative_prompt": ("a",), "negative_prompt_2": ("a",)}),
        (UNCOND, {"negative_prompt_2": ("a",)}, False, {"negative_prompt": ("grey",), "negative_prompt_2": ("a",)}),
    ],
)
def test_what_is_not_given_follows(names, given, needed, wanted):
    assert texts_for(PROMPTS, names, given, needed=needed) == wanted


def test_a_prompt_has_to_be_given():
    for given, needed in (({"prompt_2": ("a",)}, False), ({"negative_prompt": ("a",)}, True)):
        with pytest.raises(BundleInputError, match="prompt is missing"):
            texts_for(PROMPTS, COND, given, needed=needed)


def test_a_tokenizer_that_refuses_a_text():
    tokenizer = Tokenizer(models.WordLevel({"a": 1}, unk_token="?"))
    with pytest.raises(BundleIntegrityError, match="makes no numbers of 'b'"):
        tokens_of(tokenizer, "b", tokens())


def test_what_is_told_of_a_text_that_is_none():
    assert is_text("na\u00efve \U0001f98a")
    assert not is_text("\ud800")
