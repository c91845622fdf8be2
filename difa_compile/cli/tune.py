"""``difa tune``, and measuring what a calibration needs to know about the machine before it begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from difa_compile.cli.tables import foreign
from difa_compile.errors import DifaError, ProfileError
from difa_compile.machine.profile import DEVICES, ELEMENTWISE, FULL_ATTENTION, Fit, Machine, Profile, current, place
from difa_compile.machine.tune import tune
from difa_compile.pipeline.transformers import find_transformer
from difa_compile.plan.cost import seconds_text
from difa_compile.wording import shown

UNRELIABLE = 0.25
"""A held-out error from which a profile is better measured again."""


def measure(console: Console, device: str, dtypes: Iterable[torch.dtype], quick: bool = False) -> Profile:
    """Measure, with a bar, and keep the profile together with what is known of other dtypes.

    Raises :class:`ProfileError` and :class:`OutputError`.
    """
    if os.environ.get("DIFA_PROFILE") == "off":
        raise ProfileError("DIFA_PROFILE is off, so a profile would not be kept; unset it, or set it to a path")
    columns = (TextColumn("measuring this machine"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        profile = tune(device, dtypes, quick=quick, progress=show)
    known = _kept(profile.machine)
    if known is not None:
        profile = known.updated(profile)
    profile.save()
    worst = max(
        (fit.held_out_error for fit in profile.fits if fit.operation.startswith((FULL_ATTENTION, "local"))), default=0.0
    )
    if worst > UNRELIABLE:
        console.print(
            f"[yellow]Predictions of attention are off by {100 * worst:.0f} % (median): other work on this machine may "
            "have disturbed the measurement. Run difa tune again when it is quiet.[/]"
        )
    return profile


def _kept(machine: Machine) -> Profile | None:
    """The profile of ``machine`` that would be replaced; None if it cannot be read or is another machine's."""
    path = place(machine)
    try:
        profile = None if path is None else Profile.load(path)
    except ProfileError:
        return None
    return profile if profile is not None and profile.machine == machine else None


def measure_if_unknown(console: Console, pipe: Any) -> None:
    """Before calibrating ``pipe``: measure this machine unless its profile covers the dtype of the transformer.

    Nothing is done if ``DIFA_PROFILE`` is ``off``. A profile that cannot be made or kept is said and done without.
    """
    if os.environ.get("DIFA_PROFILE") == "off":
        return
    parameter = next(find_transformer(pipe)[1].parameters(), None)
    if parameter is None or parameter.device.type not in DEVICES:
        return
    device, dtype = parameter.device, parameter.dtype
    try:
        known = _kept(Machine.here(device))
        if known is not None and dtype in known.dtypes:
            return
        console.print(
            f"        measuring what attention in {_name(dtype)} takes on this machine, once (difa tune): some 15 s"
        )
        measure(console, str(device), (dtype,))
    except DifaError as error:
        console.print(f"        going on without predicted times: {escape(shown(error, 500))}")


def profile_for(pipe: Any) -> Profile | None:
    """The profile of this machine for the device of a pipeline's transformer."""
    if os.environ.get("DIFA_PROFILE") == "off":
        return None
    parameter = next(find_transformer(pipe)[1].parameters(), None)
    return None if parameter is None else current(parameter.device)


def print_profile(console: Console, profile: Profile) -> None:
    """One line per operation and dtype: the best rate seen, the price of a call, the error on held-out samples."""
    table = Table(
        title=foreign(str(profile.machine)), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False
    )
    for name in ("operation", "dtype"):
        table.add_column(name)
    for name in ("samples", "best rate", "price of a call", "held-out error"):
        table.add_column(name, justify="right")
    for fit in profile.fits:
        price = seconds_text(fit.prices["calls"])
        error = f"{100 * fit.held_out_error:.1f} %"
        table.add_row(*map(foreign, (fit.operation, fit.dtype, str(len(fit.samples)), best_rate(fit), price, error)))
    console.print(table)


def best_rate(fit: Fit) -> str:
    """The most work per second of any sample: operations, of hidden pairs too, or bytes."""
    if fit.operation == ELEMENTWISE:
        return f"{max(sample.work['bytes'] / sample.seconds for sample in fit.samples) / 1e9:.3g} GB/s"
    return f"{max(2 * sample.work['multiply_adds'] / sample.seconds for sample in fit.samples) / 1e9:.3g} GFLOP/s"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
