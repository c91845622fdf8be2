"""Every reader of files on two thousand damaged ones: an error of ours, or a document that is as good as it looks.

Three kinds of damage: bytes; the structure, under the old digest; the structure, with the digest made to fit, so that
the readers of single values are reached. Without a new digest only what means the same may be read; with one, what is
read must be usable: it is written back, read again and shown.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difa_compile.calibration.state import STATE, CalibrationState
from difa_compile.comparison.kept import TRIALS, Held, KeptTrials, read_trials
from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import (
    CalibrationStateError,
    ComparisonFormatError,
    ErrorTableError,
    PlanFormatError,
    ProfileError,
    ScheduleError,
)
from difa_compile.files.documents import Format
from difa_compile.layout import Layout
from difa_compile.machine.profile import ELEMENTWISE, PROFILE, FullCall, Machine, Profile, elementwise_work
from difa_compile.plan.json_form import PLAN
from difa_compile.plan.plan import Cell, ModelInfo, Plan, Settings, SiteInfo, Trial
from difa_compile.planner.make import plan_from_table
from difa_compile.planner.table import TABLE, ErrorTable
from difa_compile.report.stored import COMPARISON, StoredComparison, _read_images
from tests.support.mutations import damaged, edited
from tests.support.profiles import made_up
from tests.support.report_sample import MACHINE, make_comparison
from tests.support.tables import made_table

COUNT = 2000
LONGEST = 1200
"""Characters of a message: what a file holds must not flood the terminal."""
IDENTITY = {"model": "a", "inputs": "b"}


def small_plan() -> Plan:
    window = Decision.parse("window(disc:3)+residual")
    sites = (
        SiteInfo("blocks.0.attn1", "self", 2, 8, 16, 16, Layout((4, 4))),
        SiteInfo("blocks.1.attn1", "joint", 2, 8, 20, 16, Layout((4, 4), 0, 4)),
    )
    trials = (Trial(REUSE, 0.5, 0.05, "", 0.25), Trial(window, None, 0.05, "masked"))
    rows = (
        (Cell(FULL), Cell(FULL)),
        (Cell(FULL, trials, 0.0), Cell(window, trials[:1], 0.3)),
        (Cell(REUSE), Cell(FULL)),
        (Cell(Decision.parse("forecast:1(step)+cfg")), Cell(Decision.parse("forecast:2"))),
    )
    settings = Settings("greedy", 0.05, "paper", "disc:3", ("reuse", "window+residual"), "batched", 0, "2", None)
    return Plan(ModelInfo("Model", "ab" * 32, 10), settings, sites, (1.0, 0.6, 0.3, 0.1), rows)


@dataclass
class Reader:
    """A kind of file: where one lies, how it is read, what may be raised, and what must work on what is read."""

    form: Format
    path: Path
    load: Callable[[], Any]
    errors: tuple[type[Exception], ...]
    use: Callable[[Any], object]
    same: Callable[[Any, Any], bool] = lambda a, b: bool(a == b)


def use_plan(plan: Plan) -> None:
    plan.summary().encode()
    plan.diff_text(plan).encode()
    plan.validate(sites=plan.sites)
    plan.resolve(5).summary().encode()
    assert Plan.from_json(plan.to_json()) == plan


def use_state(state: CalibrationState) -> None:
    again = CalibrationState(state.path.with_name("again"), state.identity, state.rows)
    again.save()
    assert CalibrationState.open(again.path, IDENTITY).rows == state.rows
    again.path.unlink()


def use_profile(profile: Profile, copy: Path) -> None:
    for dtype in profile.dtypes:
        profile.full_seconds(FullCall(1, 2, 16, 16, 8), dtype)
        work = elementwise_work(64, dtype, torch.device("cpu"), 1)
        profile.seconds(ELEMENTWISE, dtype, work)
        profile.extrapolates(100, dtype)
    for fit in profile.fits:
        assert fit.held_out_error >= 0
        assert fit.prices["calls"] >= 0
    str(profile.machine).encode()
    assert Profile.load(profile.save(copy)) == profile


def use_table(table: ErrorTable, copy: Path) -> None:
    table.save(copy)
    assert same_table(ErrorTable.load(copy), table)
    try:
        table.check_complete(copy)
    except ErrorTableError as error:
        check_message(error)
        return
    assert table.problem().full_cost > 0
    plan = plan_from_table(replace(table, machine=""), budget=1.0)  # others are warned of
    assert plan.steps == len(table.progress)
    str(plan.settings.promise).encode()


def same_table(a: ErrorTable, b: ErrorTable) -> bool:
    return a._content() == b._content()


def write_trials(path: Path, plan: Plan) -> None:
    class Runs:
        def judge(self, plan: Plan) -> float:
            return 41.5

        def run(self, plan: Plan, rounds: int = 3) -> Held:
            return Held(0.5, math.inf, 40.0)

    kept = KeptTrials.open(Runs(), path, IDENTITY)
    kept.run(plan)
    kept.judge(plan)


def use_trials(trials: tuple[dict[str, str], dict[str, tuple[float, ...]]]) -> None:
    identity, tried = trials
    for key, found in tried.items():
        assert min(found) >= 0
        str(Held(*found) if len(found) == 3 else found).encode()
        key.encode()
    json.dumps(identity).encode()


def use_comparison(stored: StoredComparison) -> None:
    assert stored.comparison.speedup > 0
    assert stored.comparison.attention.share >= 0
    assert stored.comparison.full.seconds_per_step > 0
    json.dumps(stored.comparison.to_json(), allow_nan=False)
    (stored.title + stored.command + "".join(stored.captions)).encode()


def same_comparison(a: StoredComparison, b: StoredComparison) -> bool:
    def parts(stored: StoredComparison) -> list[object]:
        values = [getattr(stored.comparison, field.name) for field in fields(stored.comparison)]
        told = [value.tobytes() if isinstance(value, np.ndarray) else value for value in values]
        return [stored.plan, stored.title, stored.command, stored.machine, stored.versions, stored.captions, *told]

    return parts(a) == parts(b)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difa_compile.files.writing.os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("files")
    plan = small_plan()
    plan.save(folder / "plan.json")
    CalibrationState(folder / "state.json", IDENTITY, list(plan.rows)).save()
    made_up(machine=Machine("cpu", "A CPU", "AVX", 2, "2", "0")).save(folder / "profile.json")
    comparison = make_comparison(plan, images=10, size=4)
    StoredComparison(plan, comparison, "Title", "difa demo", MACHINE, {"torch": "2"}, ("a",) * 10).save(folder / "kept")
    kept = folder / "kept"
    made_table(steps=3, size=2, identity=IDENTITY).save(folder / "table.json")
    write_trials(folder / "trials.json", plan)
    return {
        "plan": Reader(
            PLAN,
            folder / "plan.json",
            lambda: Plan.load(folder / "plan.json"),
            (PlanFormatError, ScheduleError),
            use_plan,
        ),
        "state": Reader(
            STATE,
            folder / "state.json",
            lambda: CalibrationState.open(folder / "state.json", IDENTITY),
            (CalibrationStateError,),
            use_state,
            lambda a, b: a.rows == b.rows,
        ),
        "profile": Reader(
            PROFILE,
            folder / "profile.json",
            lambda: Profile.load(folder / "profile.json"),
            (ProfileError,),
            lambda profile: use_profile(profile, folder / "copy.json"),
        ),
        "comparison": Reader(
            COMPARISON,
            kept / "comparison.json",
            lambda: StoredComparison.load(kept),
            (ComparisonFormatError,),
            use_comparison,
            same_comparison,
        ),
        "trials": Reader(
            TRIALS,
            folder / "trials.json",
            lambda: read_trials(folder / "trials.json"),
            (CalibrationStateError,),
            use_trials,
        ),
        "table": Reader(
            TABLE,
            folder / "table.json",
            lambda: ErrorTable.load(folder / "table.json"),
            (ErrorTableError,),
            lambda table: use_table(table, folder / "again.json"),
            same_table,
        ),
    }


@pytest.fixture(params=["plan", "state", "profile", "comparison", "table", "trials"])
def reader(request: pytest.FixtureRequest, readers: dict[str, Reader]) -> Iterator[Reader]:
    found = readers[request.param]
    original = found.path.read_bytes()
    yield found
    found.path.write_bytes(original)


def outcome(reader: Reader, data: bytes) -> Any:
    """What is read from ``data``, or None if it is refused; a message must be short and printable."""
    reader.path.write_bytes(data)
    try:
        return reader.load()
    except reader.errors as error:
        check_message(error)
        return None


def check_message(error: Exception) -> None:
    text = str(error)
    assert text.isprintable()
    assert len(text) < LONGEST
    text.encode()


def resealed(form: Format, document: Any) -> Any:
    """With the digest of what it now holds, where that has one."""
    if not isinstance(document, dict):
        return document
    content = {key: value for key, value in document.items() if key not in (form.version_key, "digest")}
    return {**document, "digest": form.digest(content)}


def test_changed_bytes(reader: Reader) -> None:
    original, whole = reader.path.read_bytes(), reader.load()
    for seed in range(COUNT // 4):
        found = outcome(reader, damaged(original, seed))
        assert found is None or reader.same(found, whole), seed


def test_edits_under_the_old_digest(reader: Reader) -> None:
    whole = reader.load()
    document = json.loads(reader.path.read_bytes())
    refused = 0
    for seed in range(COUNT // 4):
        found = outcome(reader, json.dumps(edited(document, seed)).encode())
        assert found is None or reader.same(found, whole), seed
        refused += found is None
    assert refused > 0.9 * COUNT // 4


def test_edits_with_a_digest_that_fits(reader: Reader) -> None:
    document = json.loads(reader.path.read_bytes())
    read = 0
    for seed in range(COUNT // 2):
        found = outcome(reader, json.dumps(resealed(reader.form, edited(document, seed))).encode())
        if found is not None:
            reader.use(found)
            read += 1
    assert read > 0.02 * COUNT // 2  # values that are as good as the old ones


def test_images(readers: dict[str, Reader]) -> None:
    """Bytes of the archive and of its members, with the digest that they then have."""
    path = readers["comparison"].path.with_name("images.npz")
    original = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    read = 0
    for seed in range(COUNT):
        data = damaged(original, seed)
        if seed % 2:
            whole = io.BytesIO()
            with zipfile.ZipFile(whole, "w") as archive:
                for place, (name, member) in enumerate(members.items()):
                    archive.writestr(name, damaged(member, seed) if seed // 2 % 2 == place else member)
            data = whole.getvalue()
        path.write_bytes(data)
        try:
            images = _read_images(path, hashlib.sha256(data).hexdigest(), 10)
        except ComparisonFormatError as error:
            check_message(error)
        else:
            assert all(image.dtype == np.uint8 and image.shape == (10, 4, 4, 1) for image in images)
            read += 1
    path.write_bytes(original)
    assert 0.02 * COUNT < read < 0.5 * COUNT  # bytes of the pictures themselves
