"""Write the report page: one self-contained HTML file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from difa_compile.errors import MissingDependencyError, OutputError
from difa_compile.plan import Plan
from difa_compile.report.machine import describe_versions
from difa_compile.report.view import Page, build_page

if TYPE_CHECKING:
    from difa_compile.capture import Record
    from difa_compile.compare import Comparison

PAGE_NAME = "index.html"


def write_report(
    folder: str | Path,
    *,
    plan: Plan,
    comparison: Comparison,
    records: Sequence[Record],
    title: str,
    machine: Mapping[str, str],
    versions: Mapping[str, str] | None = None,
    command: str = "",
    captions: Sequence[str] = (),
) -> Path:
    """Write ``folder/index.html`` and return its path. The page holds all it shows and loads nothing.

    ``records``: what became of each decision, for the list of skips. ``machine`` and ``versions`` (default: those of
    this process) are printed as they are; ``command`` is what made the comparison; ``captions`` name the images, one
    each in the order of the comparison.

    The file appears whole or not at all. Raises :class:`OutputError` if it cannot be written,
    :class:`MissingDependencyError` without jinja2, Pillow or torchmetrics, ``ValueError`` unless captions are none or
    one per image.
    """
    shown_versions = describe_versions() if versions is None else versions
    page = build_page(plan, comparison, records, title, machine, shown_versions, command, captions)
    path = Path(folder) / PAGE_NAME
    write_file(path, render(page).encode())
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingDependencyError(
            f"the report page needs jinja2 and it cannot be imported ({error}); install difa-compile[report]"
        ) from error
    files = resources.files("difa_compile.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8"))
    # Only these two files and the charts, whose texts are escaped where they are made, enter unescaped.
    style = Markup(files.joinpath("page.css").read_text(encoding="utf-8"))
    script = Markup(files.joinpath("page.js").read_text(encoding="utf-8"))
    return template.render(page=page, style=style, script=script)


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, whole or not at all; missing folders are made. Raises :class:`OutputError`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; choose an output folder that you may write to"
        ) from error


def check_writable(folder: str | Path) -> Path:
    """Make ``folder`` and try it with an empty file, so that hours of work do not end in an :class:`OutputError`."""
    folder = Path(folder)
    probe = folder / f".difa.{secrets.token_hex(4)}.tmp"
    write_file(probe, b"")
    probe.unlink(missing_ok=True)
    return folder
