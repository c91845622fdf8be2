"""The command line: what it prints and writes, and how it fails. Only the long work is replaced, where tests say so."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import difa_compile
from difa_compile.cli.app import app
from difa_compile.cli.demo import require
from difa_compile.cli.inputs import call_inputs, image_captions, images_per_call, seeds_for
from difa_compile.cli.tune import measure_if_unknown
from difa_compile.errors import MissingDependencyError, NonFiniteError
from difa_compile.machine.profile import current
from difa_compile.plan.plan import Plan
from difa_compile.report.stored import StoredComparison
from tests.support.profiles import made_up
from tests.support.report_sample import MACHINE, make_comparison, make_plan

COMMANDS = ("demo", "calibrate", "tune", "inspect", "compare", "report")


def run(*arguments):
    """The result of ``difa ARGUMENTS`` at a width that breaks no line."""
    return CliRunner(env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))


def fails(*arguments, code=1):
    """What the command, which fails, says on stderr: one panel, as one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    assert result.stderr.count("╭") == 1
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.stderr).strip()


@pytest.fixture(scope="module")
def plan():
    return make_plan(10, 6)


@pytest.fixture
def plan_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def folder(plan, tmp_path):
    stored = StoredComparison(plan, make_comparison(plan, images=10), "Kept", "difa demo", MACHINE, {"torch": "2"})
    stored.save(tmp_path / "kept")
    return tmp_path / "kept"


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


class Loaded:
    """Stands in for a pipeline."""

    def to(self, device):
        return self


@pytest.fixture
def search(monkeypatch, plan):
    """Replaces the search by one that returns a plan; the dictionary it gives holds the arguments."""
    seen = {}

    def calibrate(pipe, inputs, **options):
        seen.update(options, inputs=inputs)
        if isinstance(seen.get("raises"), BaseException):
            raise seen["raises"]
        return plan

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name: Loaded())
    monkeypatch.setattr("difa_compile.calibration.calibrate.calibrate", calibrate)
    return seen


def test_calibrate_passes_options_on_and_saves(search, plan, tmp_path):
    output = tmp_path / "out" / "plan.json"
    options = ("--steps", 10, "--threshold", 0.1, "--window", "disc:4", "--candidates", "reuse, window", "--seed", 3)
    result = run("calibrate", "demo", "-o", output, *options, "--guidance", 2, "--labels", "1,2")
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
    arguments = ("calibrate", "demo", "-o", tmp_path / "plan.json", "--state", state)
    assert "Nothing was measured yet" in fails(*arguments, code=130)
    state.write_text("{}")
    assert f"What was measured so far is in {state}; the same command goes on" in fails(*arguments, code=130)
    assert not (tmp_path / "plan.json").exists()


def test_calibrate_with_nan_is_a_clear_error(search, tmp_path):
    search["raises"] = NonFiniteError("NaN in step 3 [of 10]; load the model in float32")
    message = fails("calibrate", "demo", "-o", tmp_path / "plan.json")
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


# --- compare and demo ------------------------------------------------------------------------------------------------


@pytest.fixture
def measure(monkeypatch, plan):
    """Replaces the measurement by the sample comparison; the dictionary it gives holds the arguments."""
    seen = {}

    def compare(pipe, chosen, inputs, **options):
        seen.update(options, plan=chosen, inputs=inputs)
        if isinstance(seen.get("raises"), BaseException):
            raise seen["raises"]
        return make_comparison(chosen, images=10 * len(options["seeds"]))

    import difa_compile.comparison.compare

    monkeypatch.setattr("difa_compile.pipeline.loading.load_pipeline", lambda name: Loaded())
    monkeypatch.setattr(difa_compile.comparison.compare, "compare", compare)
    return seen


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


def test_demo_goes_all_the_way(search, measure, plan, tmp_path):
    result = run("demo", "--output", tmp_path / "out", "--quick", "--samples", 20)
    assert result.exit_code == 0, result.output
    assert (search["steps"], search["threshold"]) == (20, 0.1)
    assert search["state"] == tmp_path / "out" / "calibration.json"
    assert len(measure["seeds"]) == 2
    assert measure["reference"].shape == (20, 1, 32, 32)
    assert measure["reference"].min() >= 0
    assert Plan.load(tmp_path / "out" / "plan.json") == plan
    page = tmp_path / "out" / "index.html"
    assert "digit 9" in page.read_text()
    assert page.resolve().as_uri() in result.stdout
    assert re.search(r"1 of 3.*2 of 3.*3 of 3.*1\.54×", result.stdout, re.DOTALL)


def test_demo_interrupted_in_each_part(search, measure, plan, tmp_path):
    output = tmp_path / "out"
    search["raises"] = KeyboardInterrupt()
    assert "Nothing was measured yet" in fails("demo", "--output", output, code=130)
    assert list(output.iterdir()) == []
    del search["raises"]
    measure["raises"] = KeyboardInterrupt()
    message = fails("demo", "--output", output, code=130)
    assert f"difa demo --plan {output / 'plan.json'} goes on from there" in message
    del measure["raises"]
    search.clear()
    assert run("demo", "--output", output, "--plan", output / "plan.json").exit_code == 0
    assert search == {}


def test_demo_into_a_folder_that_cannot_be_written(search):
    assert fails("demo", "--output", "/proc/difa").startswith("output error")
    assert search == {}


def test_demo_without_scikit_learn_says_what_is_left_out(search, measure, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    result = run("demo", "--output", tmp_path / "out")
    assert "no Fréchet distance to real digits" in result.stdout
    assert "difa-compile[train]" in result.stdout
    assert measure["reference"] is None


# --- parts -----------------------------------------------------------------------------------------------------------


def test_missing_packages_name_their_extras(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r'Pillow is not installed; run: pip install "difa-compile\[report\]"'
    ):
        require("PIL")
    with pytest.raises(MissingDependencyError, match=r"diffusers and jinja2 are .*\[diffusers,report\]"):
        require("diffusers", "jinja2")


def test_call_inputs(tmp_path):
    (tmp_path / "call.json").write_text('{"prompt": "a cat", "height": 512}')
    assert call_inputs("a/b", str(tmp_path / "call.json"), None, ["a dog"], 3.0) == {
        "prompt": ["a dog"],
        "height": 512,
        "guidance_scale": 3.0,
    }
    assert call_inputs("demo", None, None, None, None) == {"class_labels": list(range(10)), "guidance_scale": 4.0}
    assert call_inputs("demo", '{"guidance_scale": 1}', "3", None, None) == {"class_labels": [3], "guidance_scale": 1}


@pytest.mark.parametrize(
    ("call", "images", "captions"),
    [
        ({"class_labels": [1, 2]}, 4, ("one", "class 2", "one", "class 2")),
        ({"prompt": "a cat"}, 2, ("a cat", "a cat")),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 2}, 4, ("a", "a", "b", "b")),
        ({"prompt": ["a", "b"]}, 3, ()),
        ({"prompt_embeds": 0}, 3, ()),
        ({"prompt": "x" * 100}, 1, ("x" * 59 + "…",)),
    ],
)
def test_image_captions(call, images, captions):
    assert image_captions(call, {1: "one"}, images) == captions


def test_seeds_cover_the_samples():
    assert seeds_for(21, 10, 5) == (5, 6, 7)
    assert seeds_for(1, 10, 0) == (0,)
    assert images_per_call({"class_labels": [1, 2, 3]}) == 3
    assert images_per_call({"prompt": "a", "num_images_per_prompt": 4}) == 4


# --- profiles --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Measuring is replaced by a made-up profile; the dtypes asked for so far."""
    asked = []

    def made(device, dtypes, *, quick=False, progress):
        progress(1, 1)
        asked.append((str(device), [str(dtype) for dtype in dtypes], quick))
        return made_up()

    monkeypatch.setattr(importlib.import_module("difa_compile.cli.tune"), "tune", made)
    monkeypatch.setenv("DIFA_PROFILE", str(tmp_path / "profile.json"))
    return asked


def test_tune_measures_keeps_and_shows(tuned, tmp_path):
    result = run("tune", "--device", "cpu", "--quick")
    assert result.exit_code == 0, result.output
    assert tuned == [("cpu", ["torch.float32", "torch.bfloat16"], True)]
    assert current("cpu") == made_up()
    assert re.search(r"local CPU +float32 +1 .*0\.0 %", result.stdout)
    assert str(tmp_path / "profile.json") in result.stdout


def test_tune_says_what_it_cannot_do(tuned, monkeypatch):
    assert "is no dtype of attention; choose from float32, bfloat16" in run("tune", "--dtype", "float33").output
    monkeypatch.setenv("DIFA_PROFILE", "off")
    assert "DIFA_PROFILE is off" in fails("tune")
    assert tuned == []


def test_a_profile_is_measured_once_before_calibrating(tuned):
    console = Console(quiet=True)
    for _ in range(2):
        measure_if_unknown(console, torch.nn.Linear(2, 2))
    assert tuned == [("cpu", ["torch.float32"], False)]
    measure_if_unknown(console, torch.nn.Linear(2, 2).half())
    assert tuned[1:] == [("cpu", ["torch.float16"], False)]


def test_without_profiles_nothing_is_measured(tuned, monkeypatch):
    measure_if_unknown(Console(quiet=True), torch.nn.Linear(2, 2, device="meta"))
    monkeypatch.setenv("DIFA_PROFILE", "off")
    measure_if_unknown(Console(quiet=True), torch.nn.Linear(2, 2))
    assert tuned == []


def test_what_stops_a_measurement_does_not_stop_the_calibration(tuned, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFA_PROFILE", str(tmp_path / "file" / "profile.json"))
    measure_if_unknown(Console(width=400), torch.nn.Linear(2, 2))
    assert "going on without predicted times: the profile cannot be written to" in capsys.readouterr().out


def test_inspecting_a_plan_shows_predicted_times(plan_file, profile_at):
    profile_at(full=1e-6, window=1e-7)
    assert "predicted time, float32" in run("inspect", plan_file).stdout
