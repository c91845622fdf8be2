"""Plan files: what is written, what is read back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difa_compile.decision import FULL, REUSE
from difa_compile.errors import OutputError, PlanDigestError, PlanFormatError, PlanVersionError
from difa_compile.files import writing
from difa_compile.plan.data import Promise
from difa_compile.plan.plan import SCHEMA_VERSION, Cell, ModelInfo, Plan, Settings, SiteInfo, Trial
from tests.support.places import ROOT
from tests.support.plans import GREEDY, measured_plan, plan_of, site


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    measured_plan().save(path)
    return path


def test_save_and_load(path: Path) -> None:
    plan = measured_plan()
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert os.listdir(path.parent) == ["plan.json"]
    assert Plan.load(str(path)) == plan


@pytest.mark.parametrize("promise", [Promise("budget 1", 1, None), Promise("40 dB", 0.5, 41.0, 0.6, 40.5, None, "ä")])
def test_a_promise_is_read_back(promise: Promise, tmp_path: Path) -> None:
    plan = measured_plan()
    plan = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, promise=promise))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.settings.promise == promise
    assert loaded.digest != measured_plan().digest
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"limit"', '"limits"'))
    with pytest.raises(PlanFormatError, match="without the key 'limit'"):
        Plan.load(tmp_path / "plan.json")


finite = st.floats(0, 10, allow_nan=False)
plans = st.builds(
    lambda columns, loss, threshold, saved, reason, cost: dataclasses.replace(
        plan_of(*columns),
        rows=tuple(
            tuple(
                dataclasses.replace(cell, trials=(Trial(FULL, loss, threshold, reason, cost),), flops_saved=saved)
                for cell in row
            )
            for row in plan_of(*columns).rows
        ),
    ),
    st.integers(1, 6).flatmap(
        lambda steps: st.lists(
            st.text("FfWR.Pp", min_size=steps, max_size=steps).map(lambda text: "FFF" + text), min_size=1, max_size=3
        )
    ),
    st.none() | finite,
    finite,
    st.floats(0, 1),
    st.text(),
    st.none() | finite,
)


@settings(max_examples=50)
@given(plans)
def test_json_round_trip(plan: Plan) -> None:
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_fitted_weights_are_kept_and_others_take_no_room() -> None:
    rows = [list(row) for row in plan_of("FFPP").rows]
    rows[2] = [dataclasses.replace(rows[2][0], weights=(1.75, -0.75))]
    plan = dataclasses.replace(plan_of("FFPP"), rows=tuple(map(tuple, rows)))
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert text.count('"weights": [1.75, -0.75]') == text.count("weights") == 1
    assert plan.digest != plan_of("FFPP").digest
    for wrong in ("[1.75]", "[1.75, -0.7]", '["1.75", -0.75]', "1.75", "[1.75, -0.75, 0.0]"):
        with pytest.raises(PlanFormatError, match="weight"):
            Plan.from_json(text.replace("[1.75, -0.75]", wrong))


def test_file_is_laid_out_for_reading() -> None:
    """One line per site and per cell."""
    lines = measured_plan().to_json().splitlines()
    assert lines[1] == '  "schema_version": 1,'
    assert sum('"path":' in line for line in lines) == 2
    assert sum('"flops_saved":' in line for line in lines) == 4
    assert '      {"decision": "full", "flops_saved": 0.0, "trials": []},' in lines


def test_digest_is_stable() -> None:
    """Cache keys and files of earlier releases hang on it: it changes with the schema version and never otherwise."""
    assert SCHEMA_VERSION == 1
    assert measured_plan().digest == "ee4946fa3838561525ebd5b6c79f6bbe98a975f9b3e8a3ded812d596d8e89e75"
    whole = ModelInfo("DiTTransformer2DModel", "ab" * 32, 1234567)
    same = dataclasses.replace(measured_plan(), model=whole, progress=(1, 0.98))
    assert same.digest == measured_plan().digest  # 1 and 1.0 are one number


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelInfo("DiTTransformer2DModel", "ac" * 32, 1234567)},
        {"settings": dataclasses.replace(GREEDY, threshold=0.06)},
        {"progress": (1.0, 0.97)},
        {"sites": (site(0, 8), measured_plan().sites[1])},
        {"rows": (measured_plan().rows[0], (Cell(REUSE), Cell(FULL)))},
    ],
)
def test_everything_enters_the_digest(change: dict[str, object]) -> None:
    assert dataclasses.replace(measured_plan(), **change).digest != measured_plan().digest


@settings(max_examples=200)
@given(st.data())
def test_a_truncated_file_is_refused(data: st.DataObject) -> None:
    text = measured_plan().to_json()
    cut = text[: data.draw(st.integers(0, len(text) - 3))]
    with pytest.raises(PlanFormatError, match="cut off"):
        Plan.from_json(cut)


def edited(change: Callable[[dict], object]) -> str:  # type: ignore[type-arg]
    document = json.loads(measured_plan().to_json())
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "the file is with the unknown key 'extra'"),
        (lambda d: d.pop("rows"), "the file is without the key 'rows'"),
        (lambda d: d.pop("schema_version"), "without the key 'schema_version'"),
        (lambda d: d["model"].update(weights="x"), "model is with the unknown key 'weights'"),
        (lambda d: d["model"].update(class_name=3), "class_name is 3"),
        (lambda d: d["settings"].pop("loss"), "settings is without the key 'loss'"),
        (lambda d: d["settings"].update(threshold="0.05"), "threshold is '0.05'"),
        (lambda d: d["settings"].update(candidates="reuse"), "settings.candidates is a string; it must be a list"),
        (lambda d: d["sites"][1].update(heads=True), "heads is True"),
        (lambda d: d["sites"][0]["layout"].update(grid=[16]), "16 tokens but the attention sequence has 256"),
        (lambda d: d["sites"][0]["layout"].update(grid=["16", 16]), r"sites\[0\].layout.grid is a string"),
        (lambda d: d["sites"][0]["layout"].update(step=1), r"sites\[0\].layout is with the unknown key 'step'"),
        (lambda d: d.update(sites={}), "sites is an object; it must be a list"),
        (lambda d: d["progress"].__setitem__(0, None), r"progress\[0\] is null"),
        (lambda d: d["rows"][1][0].update(decision="ful"), r"rows\[1\]\[0\]: decision 'ful' is not understood"),
        (lambda d: d["rows"][1][1]["trials"][2].update(loss="low"), r"rows\[1\]\[1\].trials\[2\].loss is a string"),
        (lambda d: d["rows"][1][1]["trials"][2].update(mse=1), r"trials\[2\] is with the unknown key 'mse'"),
        (lambda d: d["rows"][1][1]["trials"][2].update(cost="low"), r"rows\[1\]\[1\].trials\[2\].cost is a string"),
        (lambda d: d["rows"][0].__setitem__(0, "full"), r"rows\[0\]\[0\] is a string"),
    ],
)
def test_missing_unknown_and_ill_typed_keys_are_refused(change: Callable[[dict], object], message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanFormatError, match=message) as caught:
        Plan.from_json(edited(change), "here.json")
    assert not isinstance(caught.value, (PlanDigestError, PlanVersionError))
    assert "here.json" in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_other_schema_versions_are_refused_before_anything_else(version: object) -> None:
    text = edited(lambda d: d.update(schema_version=version, new_key=1))
    with pytest.raises(PlanVersionError, match="reads version 1"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["rows"][1][0].update(decision="reuse"),
        lambda d: d["progress"].__setitem__(1, 0.97),
        lambda d: d["settings"].update(threshold=0.1),
        lambda d: d.update(digest="0" * 64),
        lambda d: d["rows"][0][0].update(decision="reuse"),  # also not runnable: the edit is what to report
    ],
)
def test_an_edited_file_is_refused(change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    with pytest.raises(PlanDigestError, match="changed after it was written"):
        Plan.from_json(edited(change))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    text = measured_plan().to_json().replace("0.0125", number)
    with pytest.raises(PlanFormatError, match=r"not a number|must be finite"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "not json",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"schema_version": 1}',
        '{"schema_version": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_plan_at_all_is_refused(text: str) -> None:
    with pytest.raises(PlanFormatError):
        Plan.from_json(text)


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanFormatError, match="No such file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanFormatError, match="cannot be read"):
        Plan.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFormatError, match="not text"):
        Plan.load(tmp_path / "binary")


def test_saving_makes_missing_folders(tmp_path: Path) -> None:
    measured_plan().save(tmp_path / "a" / "b" / "plan.json")
    assert Plan.load(tmp_path / "a" / "b" / "plan.json") == measured_plan()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="in a folder you may write to"):
        measured_plan().save(tmp_path / "file" / "plan.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        measured_plan().save(tmp_path / "plan.json")


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(writing.os, "replace", fail)
    expected = OutputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        plan_of("F").save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["plan.json"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/plans").glob("*.json")), ids=lambda path: path.stem)
def test_plans_kept_with_the_benchmarks_are_read_and_written_as_they_are(path: Path) -> None:
    """The form of plan files and their digests does not change within a schema version."""
    assert Plan.load(path).to_json() == path.read_text()


@pytest.mark.parametrize(
    "value",
    [10**400, -(10**5000), float("nan"), True, "1", None, [10**5000]],
    ids=["400 digits", "5000 digits", "nan", "true", "text", "none", "list"],
)
def test_numbers_that_no_plan_can_hold_are_errors_of_ours(value: object) -> None:
    for make in (
        lambda: Trial(FULL, 0.1, value),  # type: ignore[arg-type]
        lambda: Cell(FULL, (), value),  # type: ignore[arg-type]
        lambda: Settings("greedy", threshold=value, conditional_half=2),  # type: ignore[arg-type]
        lambda: SiteInfo("site", "self", value, 8, 16, 16),  # type: ignore[arg-type]
        lambda: ModelInfo("Model", "ab", value),  # type: ignore[arg-type]
    ):
        with pytest.raises(PlanFormatError) as caught:
            make()
        assert len(str(caught.value)) < 500
