"""Prompts made into numbers: texts prepared as the pipeline prepares them, and tokenizers without transformers.

A tokenizer is a ``tokenizer.json`` of the library ``tokenizers`` that pads and cuts to the length which the pipeline
asked for, so that every text becomes as many numbers.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difa_compile.bundle.manifest import LONGEST, Prompts, Tokens, is_text
from difa_compile.errors import BundleInputError, BundleIntegrityError, MissingDependencyError
from difa_compile.wording import quoted, shown


def _fixed(text: str) -> str:
    try:
        import ftfy
    except ImportError as error:
        raise MissingDependencyError(
            "the pipeline that this bundle was made of mends its prompts with ftfy, which is not installed: "
            "pip install ftfy"
        ) from error
    return str(ftfy.fix_text(text))


PREPARATIONS: dict[str, Callable[[str], str]] = {
    "fix": _fixed,
    "unescape": lambda text: html.unescape(html.unescape(text)),
    "spaces": lambda text: re.sub(r"\s+", " ", text),
    "lower": str.lower,
    "strip": str.strip,
}
"""What pipelines do to a prompt before it is tokenized, in the order in which it is done: characters mended by ftfy,
HTML's names of characters replaced, any white space one space, small letters, no white space around it."""
KINDS = {"ids": "ids", "mask": "attention_mask", "types": "type_ids"}
"""What an engine can be given of a text: by name the attribute of an encoding."""


def prepared(text: str, tokens: Tokens) -> str:
    """The text that goes to the tokenizer. Raises :class:`MissingDependencyError` without ftfy where it is needed."""
    for step in tokens.steps:
        text = PREPARATIONS[step](text)
    return f"{tokens.before}{text}{tokens.after}"


def tokenizer_from(content: bytes, name: str) -> Any:
    """A tokenizer of the content of its file, which ``name`` names in messages.

    Raises :class:`MissingDependencyError` without the library, and :class:`BundleIntegrityError` for what it refuses.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(
            "prompts are read by the library tokenizers, which is not installed: pip install tokenizers (it is in the "
            'extra: pip install "difa-compile[export]"); or give the bundle embeddings, conditions={"cond": {...}}'
        ) from error
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # its errors share no class but this one
        raise BundleIntegrityError(
            f"{shown(name)} is no tokenizer that tokenizers {tokenizers.__version__} reads: {shown(error, 300)}; "
            "install a newer release, or export again"
        ) from error


def tokens_of(tokenizer: Any, text: str, tokens: Tokens) -> dict[str, Tensor]:
    """By the engine's names what it is given of a prompt: int64, ``(1, tokens)``. Raises :class:`BundleIntegrityError`
    for a tokenizer that refuses it."""
    try:
        encoding = tokenizer.encode(prepared(text, tokens), add_special_tokens=tokens.special)
    except MissingDependencyError:
        raise
    except Exception as error:  # the library's errors share no class but this one
        raise BundleIntegrityError(
            f"{shown(tokens.file)} makes no numbers of {quoted(text, 40)}: {shown(error, 300)}; export again"
        ) from error
    return {name: torch.tensor([getattr(encoding, KINDS[kind])]) for name, kind in tokens.inputs.items()}


Texts = Mapping[str, tuple[str, ...]]
"""By argument the texts, one an image; or one alone that is for all images."""


def texts_of(prompts: Prompts | None, given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The texts that a call is given, by argument; None is not given. Raises :class:`BundleInputError`."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in given.items():
        if value is None:
            continue
        if prompts is None or name not in prompts.texts:
            raise BundleInputError(_why_not(prompts, name))
        texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
        if not texts or not all(isinstance(text, str) for text in texts):
            raise BundleInputError(f"{name} is {quoted(value)}; it must be a text, or a list of texts, one an image")
        for text in texts:
            if len(text) > LONGEST or not is_text(text):
                what = f"is {len(text)} characters long" if len(text) > LONGEST else "is no text that UTF-8 can hold"
                raise BundleInputError(
                    f"{name} {what}: {quoted(text, 60)}; give a text of at most {LONGEST} characters"
                )
        found[name] = texts
    return found


def _why_not(prompts: Prompts | None, name: str) -> str:
    if prompts is None:
        return f"the bundle has no text encoder, so it takes no {quoted(name)}; give embeddings, or export again"
    if name.startswith("negative"):
        return (
            f"the bundle takes no {quoted(name)}: the call that was exported had no unconditional half; export again "
            "with guidance, and with a negative prompt if the pipeline asks for one"
        )
    return f"the bundle takes no {quoted(name)}; it takes {', '.join(prompts.texts)}"


def texts_for(
    prompts: Prompts, names: Sequence[str], given: Texts, *, needed: bool = False
) -> dict[str, tuple[str, ...]] | None:
    """The texts of one half, by the ``names`` of its arguments; None where none of them was given, unless ``needed``.

    What was not given follows another one, as in the pipeline, or is what the export's call had. Raises
    :class:`BundleInputError` where there is neither.
    """
    if not needed and not any(name in given for name in names):
        return None
    found = {}
    for name in names:
        base = prompts.texts[name].follows or name
        if name in given or base in given:
            found[name] = given.get(name, given.get(base, ()))
        elif (default := default_of(prompts, name)) is not None:
            found[name] = (default,)
        else:
            raise BundleInputError(f"{base} is missing: a call with {', '.join(given)} needs it, too")
    return found


def default_of(prompts: Prompts, name: str) -> str | None:
    """What a text is where neither it nor the one that it follows is given; None if it must be."""
    defaults = (prompts.texts[each].default for each in (name, prompts.texts[name].follows or name))
    return next((each for each in defaults if each is not None), None)
