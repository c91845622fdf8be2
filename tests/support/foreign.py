"""Texts that are not ours, for names in messages and tables."""

from __future__ import annotations

FOREIGN = [
    "plain",
    "[red]x[/]",
    "[/]",
    "[link=file:///etc]x",
    "\\[",
    "a\\",
    "<script>alert(1)</script>",
    "</script>",
    "a\nb\tc\r",
    "\x1b[2J\x1b]0;t\x07",
    "\u202egnp.exe",
    "\ud800",
    "\0",
    ":smile:",
    "日本" * 5,
    "x" * 5000,
    "{{ page }}",
    "%s",
    "{0}",
    "&lt;",
    "\u2028",
]
