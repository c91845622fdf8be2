"""The command line: what it prints and writes, and how it fails. Only the long work is replaced, where tests say so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import difa_compile
from difa_compile.backend.verdicts import Record
from difa_compile.cli.methods import RUNS
from difa_compile.errors import NonFiniteError
from difa_compile.plan.data import SiteInfo
from difa_compile.plan.plan import Plan
from difa_compile.report.stored import StoredComparison
from tests.support.commands import Loaded, fails, run
from tests.support.tables import made_table

COMMANDS = ("demo", "calibrate", "measure", "plan", "tune", "inspect", "compare", "report")


# --- help and versions -----------------------------------------------------------------------------------------------


def test_help_names_all_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(re.search(rf"^│ {command}\b", result.stdout, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Usage: difa {command}" in result.stdout
    assert ":class:" not in result.stdout


def test_version():
    assert run("--version").stdout.strip() == f"difa-compile {difa_compile.__version__}, torch {torch.__version__}"


def test_module_of_the_console_script_needs_no_typer():
    code = """
        import importlib.abc, sys
        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "typer":
                    raise ModuleNotFoundError(name)
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "typer" else real(name, *rest)
        sys.meta_path.insert(0, Blocked())
        from difa_compile.cli import main
        main()
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    root = Path(difa_compile.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        'difa: the command line needs typer, not installed here; run: pip install "difa-compile[report]"'
    )


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_plan(plan, plan_file):
    result = run("inspect", plan_file)
    assert result.exit_code == 0, result.output
    assert plan.summary().strip() in result.stdout
    assert "a mask stands on this attention" in result.stdout


def test_inspect_plan_as_json(plan, plan_file):
    result = run("inspect", plan_file, "--json")
    content = json.loads(result.stdout)
    reasons = content.pop("not_applicable")
    assert content == json.loads(plan.to_json())
    assert {reason["site"] for reason in reasons} == {"transformer_blocks.2.attn1"}


class Inspected:
    """What was found in a model of two blocks, one of which cannot be left out."""

    model = torch.nn.Linear(1, 1)
    sites = site_infos = records = ()
    sample = None
    blocks = (
        SiteInfo("blocks.0", "block", 1, 16, 16, 16),
        SiteInfo("blocks.0..blocks.1", "block", 1, 16, 16, 16, blocks=("blocks.0", "blocks.1")),
    )
    block_records = (Record("blocks.1", "any", "skipped", "it writes into [memory] from outside"),)


def test_inspect_model_shows_its_blocks_and_why_others_are_left_alone(monkeypatch):
    monkeypatch.setattr("difa_compile.pipeline.loading.load_model", lambda name: torch.nn.Linear(1, 1))
    monkeypatch.setattr("difa_compile.pipeline.inspection.inspect_model", lambda model, trace: Inspected())
    result = run("inspect", "demo")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "Blocks that a plan can leave out: 1; spans of blocks: 1" in text
    assert "blocks.0..blocks.1 span of 2 blocks 16 16" in text
    assert "blocks.1 any skipped it writes into [memory] from outside" in text
    content = json.loads(run("inspect", "demo", "--json").stdout)
    assert [block["path"] for block in content["blocks"]] == ["blocks.0", "blocks.0..blocks.1"]
    assert content["blocks"][1]["blocks"] == ["blocks.0", "blocks.1"]
    assert content["block_records"] == [
        {
            "site": "blocks.1",
            "decision": "any",
            "outcome": "skipped",
            "reason": "it writes into [memory] from outside",
        }
    ]


def test_inspect_file_that_is_no_plan(tmp_path):
    (tmp_path / "x.json").write_text("{")
    assert fails("inspect", tmp_path / "x.json").startswith("plan format error")


def test_inspect_edited_plan(plan_file):
    plan_file.write_text(plan_file.read_text().replace('"threshold": 0.05', '"threshold": 0.5'))
    message = fails("inspect", plan_file)
    assert message.startswith("plan digest error")
    assert "difa --debug inspect … shows where it was raised" in message


def test_debug_lets_the_error_through(tmp_path):
    (tmp_path / "x.json").write_text("{")
    result = run("--debug", "inspect", tmp_path / "x.json")
    assert type(result.exception).__name__ == "PlanFormatError"


@pytest.mark.parametrize("command", ["inspect", "calibrate"])
def test_model_that_is_not_there(command, tmp_path):
    message = fails(command, tmp_path / "nothing" / "here", *(["--labels", "1"] if command == "calibrate" else []))
    assert message.startswith("model load error")
    assert "there is no folder" in message


def test_folder_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert fails("inspect", tmp_path).startswith("model load error")


# --- report ----------------------------------------------------------------------------------------------------------


def test_report_writes_the_page(folder, tmp_path):
    result = run("report", folder, "--output", tmp_path / "page", "--title", "Other [title]")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page" / "index.html").resolve().as_uri() in result.stdout
    assert "<title>Other [title]</title>" in (tmp_path / "page" / "index.html").read_text()


def test_report_of_an_empty_folder(tmp_path):
    message = fails("report", tmp_path)
    assert message.startswith("comparison format error")
    assert "name a folder written by difa compare or difa demo" in message


def test_report_into_a_folder_that_cannot_be_written(folder):
    assert fails("report", folder, "--output", "/proc/difa").startswith("output error")


# --- calibrate -------------------------------------------------------------------------------------------------------


def test_calibrate_passes_options_on_and_saves(search, plan, tmp_path):
    output = tmp_path / "out" / "plan.json"
    options = ("--steps", 10, "--threshold", 0.1, "--window", "disc:4", "--candidates", "reuse, window", "--seed", 3)
    result = run("calibrate", "demo", "--method", "weighed", "-o", output, *options, "--guidance", 2, "--labels", "1,2")
    assert result.exit_code == 0, result.output
    assert Plan.load(output) == plan
    assert (search["steps"], search["threshold"], search["window"]) == (10, 0.1, "disc:4")
    assert search["candidates"] == ["reuse", "window"]
    assert search["state"] == tmp_path / "out" / "plan.json.state"
    assert search["inputs"].pop("generator").initial_seed() == 3
    assert search["inputs"] == {"class_labels": [1, 2], "guidance_scale": 2.0}
    assert plan.summary().strip() in result.stdout


def test_calibrate_interrupted_says_where_it_goes_on(search, tmp_path):
    search["raises"] = KeyboardInterrupt()
    state = tmp_path / "state.json"
    arguments = ("calibrate", "demo", "--method=weighed", "-o", tmp_path / "plan.json", "--state", state)
    assert "Nothing was measured yet" in fails(*arguments, code=130)
    state.write_text("{}")
    assert f"What was measured so far is in {state}; the same command goes on" in fails(*arguments, code=130)
    assert not (tmp_path / "plan.json").exists()


def test_calibrate_with_nan_is_a_clear_error(search, tmp_path):
    search["raises"] = NonFiniteError("NaN in step 3 [of 10]; load the model in float32")
    message = fails("calibrate", "demo", "--method=published", "-o", tmp_path / "plan.json")
    assert message.startswith("non finite error NaN in step 3 [of 10]; load the model in float32")
    assert list(tmp_path.iterdir()) == []


def test_calibrate_refuses_a_folder_as_plan_before_it_works(search, tmp_path):
    assert fails("calibrate", "demo", "-o", tmp_path).startswith("output error")
    assert fails("calibrate", "demo", "-o", "/proc/difa/plan.json").startswith("output error")
    assert "inputs" not in search


def test_calibrate_on_a_device_that_does_not_take_the_model(search, tmp_path, monkeypatch):
    def to(self, device):
        raise RuntimeError("it has no room")

    monkeypatch.setattr(Loaded, "to", to)
    message = fails("calibrate", "demo", "-o", tmp_path / "plan.json", "--device", "cpu", code=2)
    assert "cannot be moved to 'cpu': it has no room" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to sample"),
        (["--labels", "one"], "'one' is not a list of class numbers"),
        (["--inputs", "{"], "not valid JSON"),
        (["--inputs", "nowhere.json"], "neither a JSON object nor a file"),
        (["--steps", "many"], "--steps"),
    ],
)
def test_calibrate_options_that_make_no_sense(options, message):
    result = run("calibrate", "owner/name", *options)
    assert result.exit_code == 2
    assert message in result.stderr


# --- measure and plan ------------------------------------------------------------------------------------------------


def test_measure_passes_options_on_and_shows_what_budgets_buy(tmp_path, monkeypatch):
    seen = {}

    def measure(pipe, inputs, steps, **options):
        seen.update(options, inputs=inputs, steps=steps)
        return made_table(5)

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name, dtype: Loaded())
    monkeypatch.setattr("difa_compile.calibration.measure.measure", measure)
    output = tmp_path / "errors.json"
    tried = ("--window", "band:2", "--window", "disc:3", "--try", "full+cfg", "--no-attention")
    tried += ("--try", "window(band:2)+residual", "--heads", "box:2", "--heads", "band:03")
    options = ("--steps", 5, *tried, "--seed", 4)
    result = run("measure", "demo", "-o", output, *options, "--labels", "1,2")
    assert result.exit_code == 0, result.output
    assert (seen["steps"], seen["state"], seen["attention"]) == (5, output, False)
    assert seen["decisions"] == ["window(band:2)", "window(disc:3)", "full+cfg", "window(band:2)+residual"]
    assert seen["heads"] == ["box:2", "band:3"]
    assert seen["inputs"].pop("generator").initial_seed() == 4
    assert seen["inputs"] == {"class_labels": [1, 2], "guidance_scale": 4.0}
    assert "predicted PSNR" in result.stdout
    assert str(output) in result.stdout


def test_plan_makes_a_plan_or_shows_what_budgets_buy(tmp_path):
    made_table(5).save(tmp_path / "errors.json")
    shown = run("plan", tmp_path / "errors.json")
    assert shown.exit_code == 0, shown.output
    assert "distinct rows" in shown.stdout
    assert "squared errors differ by 25 % for blocks and 25 % for attention" in " ".join(shown.stdout.split())
    output = tmp_path / "out" / "plan.json"
    result = run("plan", tmp_path / "errors.json", "-o", output, "--budget", 0.6, "--max-rows", 3)
    assert result.exit_code == 0, result.output
    made = Plan.load(output)
    assert made.settings.promise.limit == "budget 0.6, at most 3 distinct rows"
    assert len(set(made.decisions)) <= 3
    alone = run("plan", tmp_path / "errors.json", "-o", output, "--budget", 0.85, "--no-blocks")
    assert alone.exit_code == 0, alone.output
    assert Plan.load(output).settings.promise.limit == "budget 0.85, attention alone"
    front = run("plan", tmp_path / "errors.json", "--no-blocks").stdout
    assert "25 % for attention (standard deviation)" in front
    assert "blocks" not in front
    assert "0.79 of full's time" in front, "with blocks computed there is little to save"
    few = run("plan", tmp_path / "errors.json", "-o", output, "--psnr", 30, "--max-rows", 1)
    assert few.exit_code == 0, few.output
    assert "where these give the same images at 1.00" in few.stdout


def test_plan_from_what_is_no_whole_table(tmp_path):
    assert fails("plan", tmp_path / "none.json").startswith("error table error")
    (tmp_path / "bad.json").write_text("{")
    assert "measure again" in fails("plan", tmp_path / "bad.json", "--budget", 0.5)
    made_table(5, done=2, seconds={}).save(tmp_path / "half.json")
    assert "start difa measure with the same arguments again" in fails("plan", tmp_path / "half.json")
    assert fails("plan", tmp_path / "half.json", "--budget", 0.5, "--psnr", 30).startswith("budget error")


@pytest.fixture
def searching(plan, monkeypatch):
    """Replaces measuring and trying plans: a state and a record of trials are written. Holds what was asked for."""
    seen = {}

    def plan_within(pipe, inputs, limit, steps, **options):
        seen.update(options, limit=limit, steps=steps)
        options["told"]("one [try]")
        if options["table"] is None:
            options["state"].write_text("measured")
        Path(f"{options['state']}.trials").write_text("tried")
        if "raises" in seen:
            raise seen["raises"]
        return plan

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name, dtype: Loaded())
    monkeypatch.setattr("difa_compile.comparison.planned.plan_within", plan_within)
    return seen


def test_calibrate_within_a_budget(searching, plan, tmp_path):
    seen = searching
    output = tmp_path / "plan.json"
    result = run("calibrate", "demo", "-o", output, "--budget", 0.5, "--max-rows", 4, "--seed", 6, "--steps", 7)
    assert result.exit_code == 0, result.output
    assert str(seen["limit"]) == "budget 0.5, at most 4 distinct rows"
    assert (seen["seeds"], seen["held_out"], seen["steps"], seen["runs"]) == ((6, 7), (8,), 7, RUNS)
    assert seen["state"] == tmp_path / "plan.json.state"
    assert "tried: one [try]" in result.stdout
    assert Plan.load(output) == plan
    assert run("calibrate", "demo", "-o", output, "--runs", 3).exit_code == 0
    assert (str(seen["limit"]), seen["runs"]) == ("budget 0.5", 3)
    assert run("calibrate", "demo", "-o", output, "--no-blocks").exit_code == 0
    assert str(seen["limit"]) == "budget 0.5, attention alone"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"], "what was kept on the way is gone"


@pytest.mark.parametrize("method", ["planner", "weighed"])
def test_a_state_that_the_user_names_is_the_users(method, searching, search, plan, tmp_path):
    """It may be the table that difa measure made."""
    state = tmp_path / "errors.json"
    state.write_text("measured")
    result = run("calibrate", "demo", "--method", method, "-o", tmp_path / "plan.json", "--state", state)
    assert result.exit_code == 0, result.output
    assert Plan.load(tmp_path / "plan.json") == plan
    assert state.read_text() == "measured"
    assert (tmp_path / "errors.json.trials").exists() == (method == "planner")


def test_calibrate_from_a_table(searching, plan, tmp_path):
    """The plan is made of what was measured before, and held to its word."""
    made_table(5).save(tmp_path / "errors.json")
    before = (tmp_path / "errors.json").read_bytes()
    arguments = ("calibrate", "demo", "-o", tmp_path / "plan.json", "--table", tmp_path / "errors.json", "--psnr", 40)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert searching["table"].progress == made_table(5).progress
    assert (searching["steps"], str(searching["limit"])) == (5, "40 dB")
    assert run(*arguments, "--steps", 7).exit_code == 0
    assert searching["steps"] == 7, "the search refuses it"
    assert (tmp_path / "errors.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.json", "plan.json"]
    searching["raises"] = KeyboardInterrupt()
    kept = tmp_path / "plan.json.state.trials"
    assert f"is in {kept}; the same command goes on" in fails(*arguments, code=130)
    assert kept.is_file()


def test_calibrate_from_what_is_no_table_of_use(searching, tmp_path):
    made_table(5, done=2, seconds={}).save(tmp_path / "half.json")
    message = fails("calibrate", "demo", "--table", tmp_path / "half.json")
    assert "start difa measure with the same arguments again" in message
    made_table(5).save(tmp_path / "errors.json")
    message = fails("calibrate", "demo", "--table", tmp_path / "errors.json", "--window", "band:2", code=2)
    assert "give --window to difa measure" in message
    assert "limit" not in searching


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", 0.1], "--threshold: it belongs to --method weighed and published, and this is planner"),
        (["--method", "published", "--rank", "time"], "--rank: it belongs to --method weighed"),
        (["--method", "weighed", "--budget", 0.5], "--budget: it belongs to --method planner, and this is weighed"),
        (["--method", "greedy"], "'greedy' is not one of"),
    ],
)
def test_options_of_other_methods_are_refused(options, message):
    result = run("calibrate", "demo", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_published_search_takes_the_first_below_the_threshold(search, tmp_path):
    assert run("calibrate", "demo", "--method=published", "-o", tmp_path / "plan.json").exit_code == 0
    assert (search["rank"], search["threshold"], search["loss"]) == ("published", 0.05, "paper")


# --- compare ---------------------------------------------------------------------------------------------------------


def test_compare_writes_folder_and_page(measure, plan, plan_file, tmp_path):
    result = run("compare", "demo", plan_file, "-o", tmp_path / "out", "--samples", 15, "--seed", 7, "--eager")
    assert result.exit_code == 0, result.output
    assert (measure["steps"], measure["seeds"], measure["backend_full"]) == (10, (7, 8), "eager")
    assert measure["allow_slower"] is False
    assert measure["judge"] is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html",
        "plan.json",
        "comparison.json",
        "images.npz",
    }
    assert StoredComparison.load(tmp_path / "out").captions[:2] == ("digit 0", "digit 1")
    for words in ("1.54×", "PSNR", "33.9 dB", "1.88 MiB", "1 decision skipped", "index.html"):
        assert words in result.stdout.replace("\u00a0", " ")


def test_compare_carries_out_slower_windows_if_asked(measure, plan_file, tmp_path):
    result = run("compare", "demo", plan_file, "-o", tmp_path / "out", "--samples", 10, "--allow-slower")
    assert result.exit_code == 0, result.output
    assert measure["allow_slower"] is True


def test_compare_with_a_missing_plan(tmp_path):
    message = fails("compare", "demo", tmp_path / "none.json", "-o", tmp_path / "out")
    assert message.startswith("plan format error")
    assert not (tmp_path / "out").exists()


# --- profiles --------------------------------------------------------------------------------------------------------


def test_inspecting_a_plan_shows_predicted_times(plan_file, profile_at):
    profile_at(full=1e-6, window=1e-7)
    assert "predicted time, float32" in run("inspect", plan_file).stdout
