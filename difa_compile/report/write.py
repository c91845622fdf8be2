"""Write the report page: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from difa_compile.errors import MissingDependencyError
from difa_compile.files.writing import write_whole
from difa_compile.plan.plan import Plan
from difa_compile.report.machine import describe_versions
from difa_compile.report.view import Page, build_page
from difa_compile.wording import visible

if TYPE_CHECKING:
    from difa_compile.backend.verdicts import Record
    from difa_compile.comparison.compare import Comparison
    from difa_compile.comparison.front import Point

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
    front: Sequence[Point] = (),
) -> Path:
    """Write ``folder/index.html`` and return its path. The page holds all it shows and loads nothing.

    ``records``: what became of each decision, for the list of skips. ``machine`` and ``versions`` (default: those of
    this process) are printed as they are; ``command`` is what made the comparison; ``captions`` name the images, one
    each in the order of the comparison; ``front``: other plans that were run, for the chart of what a budget buys.

    The file appears whole or not at all. Raises :class:`OutputError` if it cannot be written,
    :class:`MissingDependencyError` without jinja2, Pillow or torchmetrics, ``ValueError`` unless captions are none or
    one per image.
    """
    shown_versions = describe_versions() if versions is None else versions
    page = build_page(plan, comparison, records, title, machine, shown_versions, command, captions, front)
    path = Path(folder) / PAGE_NAME
    write_whole(path, render(page), "the page")
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

    def printable(value: object) -> object:
        """Jinja escapes the characters that mean markup; these are those that no page may hold or that turn text."""
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=printable
    )
    template = environment.from_string(files.joinpath("page.html.j2").read_text(encoding="utf-8"))
    # Only these two files and the charts, whose texts are escaped where they are made, enter unescaped.
    style = Markup(files.joinpath("page.css").read_text(encoding="utf-8"))
    script = Markup(files.joinpath("page.js").read_text(encoding="utf-8"))
    return template.render(page=page, style=style, script=script)
