"""Where a pipeline comes from: the model card and the licences that lie beside it, on this machine alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from difa_compile.files.documents import open_plain, read_at_most
from difa_compile.wording import shown

CARD = "README.md"
NOTICES = re.compile(r"(licen[cs]e|copying|notice|use[_-]?policy|third[_-]?party)", re.IGNORECASE)
"""How names of files begin that say what may be done with a model."""
MOST_BYTES = 2**20
"""Of a card or licence."""
MOST_FILES = 16
INDEX = "model_index.json"


@dataclass(frozen=True)
class Origin:
    """``licence``: as the card names it, "" where it does not. ``card``: its content, None without one. ``notices``: of
    licences and the like, by the names of their files."""

    licence: str = ""
    card: bytes | None = field(default=None, repr=False)
    notices: Mapping[str, bytes] = field(default_factory=dict, repr=False)


def origin_of(pipe: Any, told: Callable[[str], None] = lambda text: None) -> Origin:
    """What lies beside the files that a pipeline was loaded from: its own folder, or that in the cache of the hub.

    Nothing is downloaded. ``told`` is given a line for each file that is not taken along, and why.
    """
    folder = folder_of(pipe)
    if folder is None:
        return Origin()
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        told(f"{shown(folder.name)}: its licence is not known: {shown(error.strerror or error)}")
        return Origin()
    wanted = [name for name in names if name == CARD or NOTICES.match(name)]
    found: dict[str, bytes] = {}
    for name in wanted[:MOST_FILES]:
        try:
            with open_plain(folder / name, MOST_BYTES) as file:
                found[name] = read_at_most(file, MOST_BYTES)
        except (OSError, ValueError) as error:
            told(f"{shown(name)} is not taken along: {shown(getattr(error, 'strerror', None) or error)}")
    for name in wanted[MOST_FILES:]:
        told(f"{shown(name)} is not taken along: there are more than {MOST_FILES} such files")
    card = found.pop(CARD, None)
    return Origin(_licence(card, told) if card is not None else "", card, found)


def folder_of(pipe: Any) -> Path | None:
    """The folder that a pipeline was loaded from: one of the user's, or a snapshot in the cache of the hub, where its
    models were. None where neither is there (any more)."""
    places = [getattr(pipe, "name_or_path", None)]
    for component in getattr(pipe, "components", {}).values():
        if isinstance(component, nn.Module):
            own = getattr(getattr(component, "config", None), "_name_or_path", None)
            places.append(os.path.dirname(own) if own else None)
    for place in places:
        if place and os.path.isabs(place) and os.path.isfile(os.path.join(place, INDEX)):
            return Path(place)
    return Path(places[0]) if places[0] and os.path.isfile(os.path.join(places[0], INDEX)) else None


def _licence(card: bytes, told: Callable[[str], None]) -> str:
    """The licence that the front matter of a card names, with its name and address where it is none of the usual."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.decode("utf-8", "replace"), ignore_metadata_errors=True).data
    except Exception as error:  # of yaml, and of whatever makes fields of what it gives
        told(f"the model card's front matter cannot be read: {shown(error, 100)}; the licence is not known")
        return ""
    named = data.get("license") or ""
    parts = [str(each) for each in named] if isinstance(named, (list, tuple)) else [str(named)]
    more = [str(value) for key in ("license_name", "license_link") if (value := data.get(key))]
    text = ", ".join(filter(None, parts)) + (f" ({', '.join(more)})" if more else "")
    return shown(text.strip(), 200)
