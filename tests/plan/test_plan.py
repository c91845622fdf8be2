"""Plans: construction, files, fitting a model, other schedules, and their text forms."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from difa_compile.decision import FULL, REUSE, Decision, Kind, Window, WindowShape
from difa_compile.errors import (
    DecisionError,
    DifaError,
    LayoutError,
    OutputError,
    PlanDigestError,
    PlanFormatError,
    PlanMismatchError,
    PlanVersionError,
    ScheduleError,
)
from difa_compile.files import writing
from difa_compile.layout import Layout
from difa_compile.plan.plan import (
    SCHEMA_VERSION,
    Cell,
    Difference,
    ModelInfo,
    Plan,
    Settings,
    SiteInfo,
    Trial,
    model_digest,
    same_but_for_text,
)
from difa_compile.plan.schedule import assign_roles, uniform_progress
from tests.support.places import ROOT

BAND = Window(WindowShape.BAND, 32)
LETTERS = {
    "F": FULL,
    "f": Decision(Kind.FULL, None, True),
    "W": Decision(Kind.WINDOW, BAND),
    "R": Decision(Kind.WINDOW_RESIDUAL, BAND),
    ".": REUSE,
}
MODEL = ModelInfo("DiTTransformer2DModel", "ab" * 32, 1234567)
GREEDY = Settings("greedy", 0.05, "paper", "band:32", ("reuse", "full+cfg"), "batched", 1, "2.13.0", "0.42.1")


def site(index: int, side: int = 16) -> SiteInfo:
    return SiteInfo(f"blocks.{index}.attn1", "self", 6, 64, side * side, 384, Layout((side, side)))


def plan_of(*columns: str, settings: Settings = GREEDY, progress: tuple[float, ...] | None = None) -> Plan:
    """A plan from one string per site, one letter per step."""
    rows = tuple(tuple(Cell(LETTERS[letter]) for letter in letters) for letters in zip(*columns, strict=True))
    sites = tuple(site(index) for index in range(len(columns)))
    return Plan(MODEL, settings, sites, progress or uniform_progress(len(rows)), rows)


def letters(rows: tuple[tuple[Decision, ...], ...], index: int = 0) -> str:
    names = {decision: letter for letter, decision in LETTERS.items()}
    return "".join(names[row[index]] for row in rows)


def measured_plan() -> Plan:
    trials = (
        Trial(REUSE, 0.25, 0.025),
        Trial(LETTERS["R"], None, 0.025, "attention mask at this site"),
        Trial(LETTERS["f"], 0.0125, 0.025),
    )
    cells = (Cell(FULL), Cell(LETTERS["f"], trials, 0.5))
    text = SiteInfo("joint.0.attn", "joint", 24, 128, 28, 3072, Layout((4, 6), before=3, after=1))
    return Plan(MODEL, GREEDY, (site(0), text), (1.0, 0.98), (cells, cells))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    measured_plan().save(path)
    return path


# --- construction ----------------------------------------------------------------------------------------------------


def test_properties() -> None:
    plan = plan_of("F.F.", "FWWR")
    assert plan.steps == 4
    assert plan.decisions[3] == (REUSE, LETTERS["R"])
    assert plan.roles == assign_roles(plan.decisions)
    assert [bucket.steps for bucket in plan.buckets] == [(0,), (1,), (2,), (3,)]


def test_a_plan_that_cannot_run_does_not_exist() -> None:
    with pytest.raises(ScheduleError, match="step 0, site 1: reuse"):
        plan_of("FF", ".F")
    with pytest.raises(ScheduleError, match="progress rises"):
        plan_of("FF", progress=(0.5, 1.0))
    with pytest.raises(ScheduleError, match="at least one step"):
        Plan(MODEL, GREEDY, (site(0),), (), ())


def test_rows_sites_and_progress_must_add_up() -> None:
    cell = Cell(FULL)
    with pytest.raises(PlanFormatError, match="at least one site"):
        Plan(MODEL, GREEDY, (), (1.0,), ((),))
    with pytest.raises(PlanFormatError, match=r"blocks\.0\.attn1' twice"):
        Plan(MODEL, GREEDY, (site(0), site(0)), (1.0,), ((cell, cell),))
    with pytest.raises(PlanFormatError, match="2 rows but the progress of 1 steps"):
        Plan(MODEL, GREEDY, (site(0),), (1.0,), ((cell,), (cell,)))
    with pytest.raises(PlanFormatError, match="step 1 of the plan has 2 cells for 1 sites"):
        Plan(MODEL, GREEDY, (site(0),), (1.0, 0.5), ((cell,), (cell, cell)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SiteInfo("a", "cross", 1, 1, 1, 1, None), PlanFormatError, "self, joint"),
        (lambda: SiteInfo("a", "self", 0, 1, 1, 1, None), PlanFormatError, "heads"),
        (lambda: SiteInfo("a", "self", 1, 1, 5, 1, Layout((2, 2))), LayoutError, "4 tokens .* has 5"),
        (lambda: ModelInfo("A", "00", -1), PlanFormatError, "parameters"),
        (lambda: Trial(FULL, float("nan"), 0.1), PlanFormatError, "loss of full is nan"),
        (lambda: Trial(FULL, 0.1, float("inf")), PlanFormatError, "threshold of full is inf"),
        (lambda: Trial(FULL, 0.1, 0.2, cost=-1.0), PlanFormatError, "cost of full is -1"),
        (lambda: Cell(FULL, (), 1.5), PlanFormatError, "at most 1"),
        (lambda: Cell(FULL, (), -0.1), PlanFormatError, "flops_saved"),
        (lambda: Settings("guess"), PlanFormatError, "greedy, weighed, rule"),
        (lambda: Settings("rule", loss="mse"), PlanFormatError, "paper, code"),
        (lambda: Settings("rule", guidance="both"), PlanFormatError, "batched, two-call, none"),
        (lambda: Settings("rule", conditional_half=2), PlanFormatError, "conditional_half"),
    ],
)
def test_odd_parts_are_refused(make: Callable[[], object], error: type[DifaError], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_settings_name_the_installed_versions() -> None:
    assert Settings("rule").torch == torch.__version__.partition("+")[0] or Settings("rule").torch == torch.__version__


# --- files -----------------------------------------------------------------------------------------------------------


def test_save_and_load(path: Path) -> None:
    plan = measured_plan()
    loaded = Plan.load(path)
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert os.listdir(path.parent) == ["plan.json"]
    assert Plan.load(str(path)) == plan


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
            st.text("FfWR.", min_size=steps, max_size=steps).map(lambda text: "F" + text), min_size=1, max_size=3
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


# --- models ----------------------------------------------------------------------------------------------------------


class _Configured(nn.Module):
    def __init__(self, **config: object) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(3, 2)


class _Plain(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)


def test_model_digest_of_a_configured_model_is_its_class_and_config() -> None:
    info = model_digest(_Configured(layers=2, size=[4, 4]))
    assert info.class_name == "_Configured"
    assert info.parameters == 8
    assert len(info.config_digest) == 64
    assert model_digest(_Configured(size=[4, 4], layers=2, _name_or_path="elsewhere")) == info
    assert model_digest(_Configured(layers=3, size=[4, 4])).config_digest != info.config_digest


def test_model_digest_of_any_other_module_is_its_parameters() -> None:
    info = model_digest(_Plain())
    assert model_digest(_Plain()) == info  # other weights, same model
    assert model_digest(_Plain(4)).config_digest != info.config_digest
    assert model_digest(torch.compile(_Plain())) == info  # type: ignore[arg-type]


def test_a_plan_fits_its_own_model_and_sites() -> None:
    model = _Configured(layers=2)
    plan = dataclasses.replace(plan_of("FF", "F."), model=model_digest(model))
    plan.validate(model, plan.sites)
    plan.validate(model)
    plan.validate(sites=list(plan.sites))
    plan.validate()


@pytest.mark.parametrize(
    ("model", "sites", "message"),
    [
        (_Plain(), None, "made for _Configured, this is _Plain"),
        (_Configured(layers=3), None, "another configuration of _Configured"),
        (None, (site(0, 32), site(1, 32)), r"256 tokens \(16x16\).*1024 tokens \(32x32\).*at this image size"),
        (None, (site(0),), r"names 2 sites, the model has 1, not in the model: blocks\.1\.attn1"),
        (None, (site(0), site(1), site(2)), r"not in the plan: blocks\.2\.attn1"),
        (None, (site(1), site(0)), "another order"),
        (_Plain(), (site(0),), "this is _Plain; the plan names 2 sites"),
    ],
)
def test_a_plan_for_something_else_is_refused_saying_what_differs(
    model: nn.Module | None, sites: tuple[SiteInfo, ...] | None, message: str
) -> None:
    plan = dataclasses.replace(plan_of("FF", "F."), model=model_digest(_Configured(layers=2)))
    with pytest.raises(PlanMismatchError, match=message):
        plan.validate(model, sites)


def test_many_differences_are_shortened() -> None:
    plan = plan_of(*["F"] * 20)
    with pytest.raises(PlanMismatchError, match="and 12 more"):
        plan.validate(sites=[site(index, 8) for index in range(20)])


# --- other schedules -------------------------------------------------------------------------------------------------


def test_resolve_onto_the_same_steps_is_the_identity() -> None:
    plan = plan_of("F.F.", "FWWR")
    for resolved in (plan.resolve(4), plan.resolve(4, progress=plan.progress)):
        assert resolved.rows == resolved.decisions == plan.decisions
        assert resolved.roles == plan.roles
        assert resolved.buckets == plan.buckets
        assert resolved.source_steps == (0, 1, 2, 3)
        assert resolved.promotions == ()
        assert resolved.steps == 4
        assert resolved.plan is plan


@given(st.lists(st.text("FfWR.", min_size=49, max_size=49).map(lambda text: "F" + text), min_size=1, max_size=2))
@settings(max_examples=50)
def test_fifty_steps_onto_other_counts(columns: list[str]) -> None:
    plan = plan_of(*columns)
    assert plan.resolve(50).rows == plan.decisions
    for steps in (20, 30, 100, 1, 7):
        resolved = plan.resolve(steps)
        assert resolved.steps == len(resolved.progress) == steps
        assert resolved.progress == pytest.approx(uniform_progress(steps))
        assert len(resolved.roles) == steps  # a reader without filler would raise
        promoted = {(promotion.step, promotion.site) for promotion in resolved.promotions}
        for step, source in enumerate(resolved.source_steps):
            for index, decision in enumerate(resolved.rows[step]):
                assert ((step, index) in promoted) == (decision != plan.decisions[source][index])
    assert plan.resolve(100).promotions == ()
    assert set(plan.resolve(100).source_steps) == set(range(50))


def test_fifty_onto_twenty_and_thirty_by_hand() -> None:
    """Even steps full, odd ones reuse: step j of 20 follows step 5j/2 of 50, halves going to the earlier step."""
    plan = plan_of("F." * 25)
    twenty = plan.resolve(20)
    assert twenty.source_steps[:5] == (0, 2, 5, 7, 10)
    assert letters(twenty.rows)[:6] == "FFFFFF"  # steps 5 and 7 read 4 and 6, which fell out
    assert [promotion.step for promotion in twenty.promotions][:3] == [2, 3, 6]
    thirty = plan.resolve(30)
    assert thirty.source_steps[:7] == (0, 2, 3, 5, 7, 8, 10)
    assert letters(thirty.rows)[:7] == "FF.FFFF"
    assert [promotion.step for promotion in thirty.promotions][:2] == [3, 4]


def test_resolve_keeps_the_spacing_of_the_plan() -> None:
    """Without a schedule, a shifted plan is stretched, not mapped onto uniform steps."""
    shifted = (1.0, 0.9, 0.7, 0.3)
    assert plan_of("FFFF", progress=shifted).resolve(4).progress == shifted
    eight = plan_of("FFFF", progress=shifted).resolve(8)
    assert eight.progress == pytest.approx((1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.15))
    assert plan_of("FFFF", progress=shifted).resolve(2).progress == (1.0, 0.7)


def test_resolve_onto_part_of_a_schedule_starts_full() -> None:
    """An image-to-image run starts in the middle, where nothing has filled the caches yet."""
    plan = plan_of("F...F...")
    resolved = plan.resolve(4, progress=(0.625, 0.5, 0.375, 0.25))
    assert resolved.source_steps == (3, 4, 5, 6)
    assert letters(resolved.rows) == "FF.."
    assert [promotion.step for promotion in resolved.promotions] == [0]


def test_resolve_onto_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the schedulers are diffusers'")
    ddim = diffusers.DDIMScheduler()
    ddim.set_timesteps(50)
    progress = tuple(timestep / 1000 for timestep in ddim.timesteps.tolist())
    plan = plan_of("F" + ".F..R" * 9 + "....", progress=progress)
    assert plan.resolve(50, ddim).rows == plan.decisions
    assert plan.resolve(50, diffusers.DDIMScheduler()).source_steps == tuple(range(50))
    twenty = plan.resolve(20, ddim)  # set to 50: a copy is set to 20
    assert ddim.num_inference_steps == 50
    assert twenty.progress[:2] == (0.95, 0.9)
    heun = plan.resolve(10, diffusers.HeunDiscreteScheduler())
    assert heun.steps == 19
    assert len(heun.roles) == 19


def test_a_rule_goes_by_position_in_the_run() -> None:
    """It was written in steps, so on any schedule of as many steps it is carried out step by step."""
    rule, greedy = plan_of("F..F", settings=Settings("rule")), plan_of("F..F")
    progress = (0.4, 0.3, 0.2, 0.1)
    assert rule.resolve(4, progress=progress).rows == rule.decisions
    assert rule.resolve(4, progress=progress).progress == progress
    assert greedy.resolve(4, progress=progress).rows != greedy.decisions
    assert rule.resolve(8, progress=[0.5] * 8).source_steps == (0, 0, 1, 1, 2, 2, 3, 3)


def test_resolve_checks_what_it_is_given() -> None:
    plan = plan_of("FF")
    with pytest.raises(ScheduleError, match="number of steps is 0"):
        plan.resolve(0)
    with pytest.raises(ScheduleError, match="3 steps are asked for, but progress has 2"):
        plan.resolve(3, progress=(1.0, 0.5))
    with pytest.raises(ScheduleError, match="give one of them"):
        plan.resolve(2, object(), progress=(1.0, 0.5))
    with pytest.raises(ScheduleError, match="rises"):
        plan.resolve(2, progress=(0.5, 1.0))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_diff() -> None:
    mine, theirs = plan_of("FFFF", "F.F."), plan_of("F...", "F.F.")
    assert mine.diff(mine) == ()
    assert mine.diff(theirs) == tuple(Difference(step, 0, FULL, REUSE) for step in (1, 2, 3))
    with pytest.raises(PlanMismatchError, match="plans of 4 and 3 steps"):
        mine.diff(plan_of("FFF", "FFF"))
    with pytest.raises(PlanMismatchError, match=r"2 sites.*1 sites"):
        mine.diff(plan_of("FFFF"))


def test_diff_text() -> None:
    mine = plan_of("FFFFF", "F.F.F")
    theirs = plan_of("F..F.", "F.F.F", settings=dataclasses.replace(GREEDY, threshold=0.1))
    lines = mine.diff_text(theirs).splitlines()
    assert "settings.threshold: 0.05 -> 0.1" in lines
    assert "3 of 10 cells differ" in lines
    assert "attention FLOPs: 80.0 % -> 50.0 % of full" in lines
    assert "     3  full -> reuse" in lines
    assert "  blocks.0.attn1  steps 1-2, 4: full -> reuse" in lines
    assert mine.diff_text(mine).endswith("0 of 10 cells differ\n")


SUMMARY = """\
plan DIGEST for DiTTransformer2DModel (config abababababab, 1,234,567 parameters)
made: greedy, threshold 0.05, loss of the paper, window band:32, guidance batched (conditional half 1), VERSIONS
candidates: reuse, full+cfg
12 steps, progress 1.000 to 0.083; 2 sites, self, 6 heads x 64, 256 tokens (16x16), width 384

   decision                  cells   share
.  reuse                        13   54.2 %
F  full                          4   16.7 %
f  full+cfg                      4   16.7 %
R  window(band:32)+residual      2    8.3 %
W  window(band:32)               1    4.2 %

attention FLOPs, q k^T and p v    29.0 % of full  (699.7 MFLOP of 2.416 GFLOP, 23.94 MFLOP of it for residuals)
attention FLOPs with projections  35.4 % of full  (3.418 GFLOP of 9.664 GFLOP, 23.94 MFLOP of it for residuals)
distinct rows: 7 of 12 (each is one variant of the graph)

step            0         10
blocks.0.attn1  FWRRff......
blocks.1.attn1  FF..ff.F....
F full  W window  R window+residual  . reuse; f w r , the same with the CFG halves shared
"""


def test_summary() -> None:
    plan = plan_of("FWRRff......", "FF..ff.F....")
    assert plan.summary() == SUMMARY.replace("DIGEST", plan.digest[:12]).replace(
        "VERSIONS", "torch 2.13.0, diffusers 0.42.1"
    )


def test_summary_of_measurements() -> None:
    text = measured_plan().summary()
    assert "candidates measured: 4, accepted: 2, largest accepted loss 0.0125 (step 1, joint.0.attn)" in text
    assert "2 sites: 1 x (self, 6 heads x 64, 256 tokens (16x16), width 384); 1 x (joint, 24 heads" in text


def test_summary_of_a_resolved_plan_names_the_promotions() -> None:
    text = plan_of("F." * 5).resolve(4).summary()
    assert "of 10 steps on a schedule of 4" in text
    assert "fell out: 2\n" in text
    assert "  step 2, blocks.0.attn1: reuse; it reads the output of the plan's step 4" in text
    assert "blocks.0.attn1  FFFF\n" in text


# --- other image sizes ------------------------------------------------------------------------------------------------


def test_windows_are_carried_onto_another_size_as_a_share_or_as_they_are():
    rows = [[FULL, FULL], [Decision(Kind.WINDOW, BAND), Decision.parse("window(disc:4)+cfg")], [REUSE, FULL]]
    cells = tuple(tuple(Cell(decision, (Trial(decision, 0.1, 0.2),), 0.5) for decision in row) for row in rows)
    plan = Plan(MODEL, GREEDY, (site(0), site(1)), uniform_progress(3), cells)
    larger = [site(0, 32), site(1, 32)]
    with pytest.raises(PlanMismatchError, match='resize="fraction"'):
        plan.validate(sites=larger)
    wide = plan.resized(larger)
    assert [str(cell.decision) for cell in wide.rows[1]] == ["window(band:128)", "window(disc:8)+cfg"]
    assert wide.sites == tuple(larger)
    assert wide.rows[1][0].trials == ()
    assert 0 < wide.rows[1][0].flops_saved < 1
    wide.validate(sites=larger)
    same = plan.resized(larger, "tokens")
    assert same.decisions == plan.decisions
    assert wide.resized(plan.sites).decisions == plan.decisions
    assert plan.resized([site(0, 2), site(1, 2)]).rows[1][0].decision.window.radius == 1
    with pytest.raises(DecisionError, match="fraction, tokens"):
        plan.resized(larger, "half")


def test_only_the_size_may_differ():
    plan = Plan(MODEL, GREEDY, (site(0),), uniform_progress(1), ((Cell(FULL),),))
    for other in ([dataclasses.replace(site(0, 32), heads=5)], [site(1, 32)], [site(0, 32), site(1, 32)]):
        with pytest.raises(PlanMismatchError):
            plan.resized(other)


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


def test_texts_of_other_lengths_are_no_other_image():
    """A site's grid shows its image; where a site has none, the noisy sample has to be known, and the same."""
    known = SiteInfo("a", "joint", 2, 16, 7 + 24, 32, Layout((4, 6), before=7))
    unknown = SiteInfo("b", "joint", 2, 16, 31, 32)
    longer = dataclasses.replace(known, tokens=9 + 24, layout=Layout((4, 6), before=9))
    wider = dataclasses.replace(known, tokens=7 + 26, layout=Layout((2, 13), before=7))
    more = dataclasses.replace(unknown, tokens=33)
    same, other, nothing = ((8, 12), (8, 12)), ((8, 12), (4, 26)), (None, None)
    for samples in (same, other, nothing):
        assert same_but_for_text([known], [longer], samples)
        assert not same_but_for_text([known], [wider], samples)
        assert same_but_for_text([unknown], [unknown], samples)
        assert same_but_for_text([unknown], [more], samples) is (samples is same)
        assert same_but_for_text([known], [dataclasses.replace(longer, layout=None)], samples) is (samples is same)
        assert same_but_for_text([longer, more], [known, unknown], samples) is (samples is same)
        assert not same_but_for_text([known, unknown], [known], samples)
    for change in ({"path": "c"}, {"kind": "self"}, {"heads": 4}, {"head_dim": 8}, {"width": 64}):
        assert not same_but_for_text([unknown], [dataclasses.replace(more, **change)], same)


def test_the_sample_of_a_plan_is_kept_as_long_as_it_is_known():
    settings = dataclasses.replace(GREEDY, sample=(4, 32, 32))
    plan = Plan(MODEL, settings, (site(0),), uniform_progress(1), ((Cell(FULL),),))
    assert Plan.from_json(plan.to_json()).settings.sample == (4, 32, 32)
    assert "sample" not in dataclasses.replace(plan, settings=GREEDY).to_json()
    assert plan.resized([site(0)]).settings.sample == (4, 32, 32)
    assert plan.resized([site(0, 32)]).settings.sample is None
    with pytest.raises(PlanFormatError, match=r"settings: sample is 1\.5"):
        dataclasses.replace(GREEDY, sample=(4, 1.5))
