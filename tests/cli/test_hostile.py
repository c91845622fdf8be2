"""The command line under hostile arguments, files and streams: one panel, an exit code, never a traceback.

What is wrong is refused before anything long begins: loading a pipeline and everything after it are replaced by stubs
that note that they were reached.
"""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

import difa_compile
from difa_compile.cli import terminal
from difa_compile.cli.app import app
from difa_compile.cli.inputs import LARGEST_FILE, LARGEST_SEED, call_inputs, image_captions
from difa_compile.cli.tables import print_plan, print_records, print_sites
from difa_compile.errors import DifaError, PlanFormatError
from difa_compile.machine.profile import ELEMENTWISE
from difa_compile.wording import shown
from tests.support.report_sample import make_plan

ROOT = Path(difa_compile.__file__).parents[1]
WIDTH = 400


class Pipeline:
    """Stands in for a class-conditional pipeline."""

    def to(self, device):
        return self

    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        height: int | None = None,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
    ):
        raise AssertionError("a pipeline was called")


@pytest.fixture
def reached(monkeypatch, tmp_path):
    """Where a command got to: "loaded" a pipeline, began to "search", "measure" or "tune"."""
    seen = []

    def noting(name, value=None):
        def stand_in(*args, **kwargs):
            seen.append(name)
            if value is None:
                raise DifaError("this far")
            return value

        return stand_in

    import difa_compile.calibration.calibrate
    import difa_compile.comparison.compare
    import difa_compile.pipeline.loading
    from difa_compile.cli import tune

    monkeypatch.setattr(difa_compile.pipeline.loading, "load_pipeline", noting("loaded", Pipeline()))
    monkeypatch.setattr(difa_compile.calibration.calibrate, "calibrate", noting("search"))
    monkeypatch.setattr(difa_compile.comparison.compare, "compare", noting("measure"))
    monkeypatch.setattr(sys.modules[tune.__name__], "tune", noting("tune"))
    monkeypatch.setattr("difa_compile.cli.demo.measure_if_unknown", lambda console, pipe: None)
    monkeypatch.setattr("difa_compile.cli.tune.measure_if_unknown", lambda console, pipe: None)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def plan_file(tmp_path):
    make_plan(4, 2).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def run(*arguments, **env):
    runner = CliRunner(env={"COLUMNS": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1", **env})
    return runner.invoke(app, list(map(str, arguments)))


def refused(*arguments, code=None, **env):
    """What a command that fails says, as one line; its form is checked."""
    result = run(*arguments, **env)
    said = result.stderr
    assert result.exit_code in ((1, 2) if code is None else (code,)), (result.exit_code, result.output)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "unexpected error" not in said, said
    assert said.count("╭") == 1
    assert said.count("╰") == 1
    assert all(character.isprintable() or character == "\n" for character in said)
    assert len(said) < 12 * WIDTH
    return re.sub(r"[\s│╭╮╰╯─]+", " ", said).strip()


# --- a table of values that make no sense, by option -----------------------------------------------------------------

DEEP = "[" * 100_000
LONG = "x" * 100_000
STEER = "\x1b[2J\x07[red]\u202e\ud800\n"

WHOLE_NUMBERS = ["", " ", "nan", "1.5", "1e3", "0x10", "-1", "9" * 20, "9" * 5000, LONG, STEER, "½"]
NUMBERS = ["", "nan", "inf", "-inf", "1,5", LONG, STEER]
NAMES = ["", " ", "nothing", LONG, STEER, "__class__", "a" * 300]

HOSTILE = {
    ("calibrate", "--steps"): ["0", "-0", "10001", *WHOLE_NUMBERS],
    ("calibrate", "--threshold"): ["0", "-1", "11", "1e999", *NUMBERS],
    ("calibrate", "--window"): [
        "band",
        "band:",
        "band:0",
        "band:-1",
        "band:x",
        "cone:3",
        "band:1.5",
        "band:" + "9" * 5000,
        *NAMES,
    ],
    ("calibrate", "--candidates"): ["reuse,", ",", "reuse;window", *NAMES],
    ("calibrate", "--loss"): NAMES,
    ("calibrate", "--rank"): NAMES,
    ("calibrate", "--seed"): WHOLE_NUMBERS,
    ("calibrate", "--device"): ["meta", "cuda:99", "cuda:-1", "CPU:", "mps:7", *NAMES],
    ("calibrate", "--labels"): ["", ",", "1,", "-1", "1.5", "10", "1;2", "9" * 5000, "１", "1_0", LONG, STEER],
    ("calibrate", "--guidance"): NUMBERS,
    ("calibrate", "--inputs"): [
        "{",
        "{]",
        "[]",
        "nowhere.json",
        ".",
        '{"class_labels": []}',
        '{"class_labels": 3}',
        '{"class_labels": [true]}',
        '{"class_labels": ["one"]}',
        '{"class_labels": [10]}',
        '{"class_labels": [NaN]}',
        '{"class_labels": [1], "guidance_scale": Infinity}',
        '{"class_labels": [1], "guidance_scale": 1e999}',
        '{"class_labels": [1], "guidance_scale": "4"}',
        '{"class_labels": [1], "guidance": 4}',
        '{"class_labels": [1], "height": 0}',
        '{"class_labels": [1], "height": 512.5}',
        '{"class_labels": [1], "num_images_per_prompt": -3}',
        '{"class_labels": [1], "num_images_per_prompt": "two"}',
        '{"class_labels": [1], "prompt": []}',
        '{"class_labels": [1], "prompt": "\\ud800"}',
        '{"class_labels": [1], "generator": 3}',
        '{"class_labels": [1], "num_inference_steps": 3}',
        '{"class_labels": [1], "output_type": "pil"}',
        '{"class_labels": [1], "\\u001b[31m": 1}',
        '{"class_labels": [' + "9" * 6000 + "]}",
        '{"a": ' + DEEP,
        *NAMES,
    ],
    ("calibrate", "--output"): [
        ".",
        "/",
        "/dev/null",
        "/proc/difa/plan.json",
        "a" * 300,
        "a" * 300 + "/plan.json",
        "\0",
    ],
    ("calibrate", "--state"): [".", "/", "/dev/null", "/proc/difa/x", "a" * 300, "\0"],
    ("demo", "--steps"): ["0", "10001", *WHOLE_NUMBERS],
    ("demo", "--threshold"): ["0", "11", *NUMBERS],
    ("demo", "--samples"): ["0", "100001", *WHOLE_NUMBERS],
    ("demo", "--seed"): WHOLE_NUMBERS,
    ("demo", "--window"): ["band", "band:0", *NAMES],
    ("demo", "--output"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
    ("demo", "--plan"): [".", "/dev/null", *NAMES],
    ("compare", "--steps"): ["0", "10001", *WHOLE_NUMBERS],
    ("compare", "--samples"): ["0", "100001", *WHOLE_NUMBERS],
    ("compare", "--repeats"): ["0", *WHOLE_NUMBERS],
    ("compare", "--seed"): WHOLE_NUMBERS,
    ("compare", "--labels"): ["", "10", "-1", LONG],
    ("compare", "--guidance"): NUMBERS,
    ("compare", "--inputs"): ["{", '{"class_labels": [1], "guidance": 4}', *NAMES],
    ("compare", "--device"): ["meta", *NAMES],
    ("compare", "--output"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
    ("tune", "--dtype"): ["float8_e4m3fn", "int8", "float33", *NAMES],
    ("tune", "--device"): ["meta", "cuda:99", *NAMES],
    ("inspect", "--trace"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
    ("report", "--output"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
}
"""Values that must be refused. None of them may reach a search, a measurement or, but for names of places and what only
the pipeline's signature tells, a model."""
ONE_IS_ENOUGH = {
    "calibrate": ("demo",),
    "demo": (),
    "compare": ("demo", "plan.json"),
    "inspect": ("demo",),
    "tune": (),
    "report": ("kept",),
}
NEEDS_PIPELINE = {"--inputs", "--output", "--state"}


@pytest.mark.parametrize(("command", "option"), HOSTILE, ids=" ".join)
def test_what_makes_no_sense_is_refused_at_once(command, option, reached, plan_file, kept):
    for value in HOSTILE[command, option]:
        message = refused(command, *ONE_IS_ENOUGH[command], f"{option}={value}")
        assert set(reached) <= ({"loaded"} if option in NEEDS_PIPELINE else set()), (value, reached)
        reached.clear()
        assert message
    assert sorted(path.name for path in Path().iterdir() if path.name.endswith(".tmp")) == []


@pytest.fixture
def kept(tmp_path):
    """A comparison on disk, in the folder ``kept``."""
    from difa_compile.report.stored import StoredComparison
    from tests.support.report_sample import MACHINE, make_comparison

    plan = make_plan(4, 2)
    StoredComparison(plan, make_comparison(plan, images=10), "Kept", "difa", MACHINE, {}).save(tmp_path / "kept")
    return tmp_path / "kept"


def test_every_option_with_a_value_is_in_the_table():
    """An option that somebody adds must be thought of here, or be among those that take anything."""
    anything = {("report", "--title"), ("calibrate", "--prompt"), ("compare", "--prompt")}
    group = get_command(app)
    found = {
        (name, parameter.opts[0])
        for name, command in group.commands.items()
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_flag and parameter.opts[0] != "--help"
    }
    assert found == set(HOSTILE) | anything


@pytest.mark.parametrize("option", ["--labels", "--steps", "--seed", "--guidance", "--inputs", "--device"])
def test_the_message_names_the_option(option, reached):
    assert option in refused("calibrate", "demo", f"{option}=nonsense")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--threshold=nan", "threshold is nan"),
        ("--window=cone:3", "cone"),
        ("--candidates=reuse,skip", "candidate 'skip' is unknown"),
        ("--loss=papers", "loss 'papers' is unknown; choose paper or code"),
        ("--rank=best", "rank is 'best'"),
        ('--inputs={"class_labels": [1], "guidance": 4}', "no argument 'guidance'; did you mean guidance_scale?"),
        (
            '--inputs={"class_labels": [1], "guidance_scale": "4"}',
            "guidance_scale is '4', but a call of Pipeline takes float",
        ),
        ('--inputs={"class_labels": [1], "generator": 1}', "leave generator out; give --seed"),
        ("--labels=3,12", "12 is no class of the demo model"),
        ("--seed=" + "9" * 20, "--seed"),
        ("--steps=0", "--steps"),
    ],
)
def test_the_message_says_what_is_wrong(option, said, reached):
    assert said in refused("calibrate", "demo", option)


def test_what_is_allowed_still_is(reached, plan_file, kept):
    """The other side of the table: nothing sensible is refused by it."""
    for options in (
        ("--seed", LARGEST_SEED),
        ("--seed", 0),
        ("--steps", 1),
        ("--labels", " 1 , 2"),
        ("--guidance", 1),
        ("--guidance", -1.5),
        ("--threshold", 10),
        ("--window", "disc:8"),
        ("--candidates", "reuse, full+cfg"),
        ("--rank", "published", "--loss", "code"),
        ("--device", "cpu"),
        ("--inputs", '{"class_labels": [1, 1], "guidance_scale": 3, "height": 32}'),
        ("--output", "new/folder/plan.json"),
        ("--output", "b" * 240),
    ):
        message = refused("calibrate", "demo", *options)
        assert message.startswith("difa error this far"), message
    for options in (("--samples", 100_000), ("--seed", LARGEST_SEED), ("--repeats", 1)):
        assert "this far" in refused("compare", "demo", plan_file, *options)
    assert "this far" in refused("tune", "--dtype", "float16", "--device", "cpu", DIFA_PROFILE="profile.json")
    assert run("report", kept, "--title", STEER + LONG).exit_code == 0


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_of_arguments_that_are_none(reached, tmp_path):
    """No file makes the command wait, or read without end."""
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "utf16").write_text('{"class_labels": [1]}', encoding="utf-16")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "deep").write_text('{"a": ' + DEEP)
    (tmp_path / "link").symlink_to(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(LARGEST_FILE + 1)
    for name in ("binary", "utf16", "empty", "deep", "link", "pipe", "huge", "/dev/zero"):
        assert "--inputs" in refused("calibrate", "demo", "--inputs", name, code=2)
    assert reached == []


INDEXES = [
    "",
    "{",
    "[]",
    "null",
    '"x"',
    "{}",
    '{"_class_name": 3}',
    '{"_class_name": "os"}',
    '{"_class_name": ' + DEEP,
    '{"_class_name": "\\u001b[2J[red]"}',
    '{"_class_name": "DiTPipeline"}',
    '{"_class_name": "DiTPipeline", "transformer": ["os", "system"]}',
    '{"_class_name": "DiTPipeline", "transformer": [null, null]}',
    "\x00\x1b",
]
"""What a model_index.json may hold that is none."""


def test_models_that_are_none(tmp_path):
    """Names, files and damaged folders: nothing of this is ours to crash on."""
    (tmp_path / "file").write_text("")
    for number, index in enumerate(INDEXES):
        folder = tmp_path / f"model{number}"
        folder.mkdir()
        (folder / "model_index.json").write_text(index)
        refused("calibrate", folder, "--labels", "1", code=1)
        refused("inspect", folder, code=1)
    for name in ("", "/", "~nobody/model", "a/b/c", "..", "./x", "a" * 300, "a/" * 3000, STEER, tmp_path / "file"):
        refused("calibrate", name, "--labels", "1", code=1)
    refused("inspect", "a" * 300, code=1)
    assert "NUL" in refused("inspect", "a\0b", code=2)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """A copy of the built-in model."""
    from difa_compile.demo import demo_model_path

    folder = tmp_path_factory.mktemp("models") / "demo"
    for file in demo_model_path().rglob("*"):
        if file.is_file():
            target = folder / file.relative_to(demo_model_path())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    return folder


def replaced(path, content):
    path.unlink()
    if content is not None:
        path.write_bytes(content)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "weights missing": (WEIGHTS, lambda data: None),
    "weights cut off": (WEIGHTS, lambda data: data[: len(data) // 2]),
    "weights empty": (WEIGHTS, lambda data: b""),
    "weights noise": (WEIGHTS, lambda data: bytes(range(256)) * 50),
    "config missing": ("transformer/config.json", lambda data: None),
    "config of other sizes": (
        "transformer/config.json",
        lambda data: data.replace(b'"num_layers": 6', b'"num_layers": 7'),
    ),
    "config of nonsense": (
        "transformer/config.json",
        lambda data: data.replace(b'"num_layers": 6', b'"num_layers": "x"'),
    ),
    "config cut off": ("transformer/config.json", lambda data: data[:40]),
    "scheduler missing": ("scheduler/scheduler_config.json", lambda data: None),
    "scheduler of nonsense": ("scheduler/scheduler_config.json", lambda data: b"[1, 2]"),
    "decoder cut off": ("vae/diffusion_pytorch_model.safetensors", lambda data: data[:100]),
    "other classes": (
        "model_index.json",
        lambda data: data.replace(b'"DiTTransformer2DModel"', b'"AutoencoderTiny"'),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_not_loaded(damage, demo_folder, monkeypatch):
    monkeypatch.setattr("difa_compile.calibration.calibrate.calibrate", explode(AssertionError("it was loaded")))
    monkeypatch.setattr("difa_compile.cli.tune.measure_if_unknown", lambda console, pipe: None)
    name, change = DAMAGE[damage]
    path = demo_folder / name
    original = path.resolve()
    replaced(path, change(original.read_bytes()))
    try:
        refused(
            "calibrate", demo_folder, "--labels", "1", "--threshold", "0.1", "-o", demo_folder / "plan.json", code=1
        )
    finally:
        path.unlink(missing_ok=True)
        path.symlink_to(original)


def test_a_plan_of_another_model_is_refused_before_sampling(plan_file, tmp_path, monkeypatch):
    from diffusers import DiTPipeline

    monkeypatch.setattr(DiTPipeline, "__call__", explode(AssertionError("it was called")))
    monkeypatch.setattr("difa_compile.comparison.compare.check_call", lambda pipe, call: None)
    monkeypatch.setattr("difa_compile.cli.inputs.check_call", lambda pipe, call: None)
    assert refused("compare", "demo", plan_file, "-o", tmp_path / "out", code=1).startswith("plan mismatch error")


# --- many values at random -------------------------------------------------------------------------------------------

PIECES = [
    "",
    "0",
    "-1",
    "1",
    "9" * 20,
    "nan",
    "{",
    "}",
    "[",
    "]",
    '"',
    ",",
    ":",
    "/",
    ".",
    "..",
    "~",
    "=",
    "-",
    "--",
    " ",
]
PIECES += ["\0", "\n", "\x1b[31m", "\ud800", "\u202e", "[red]", "[/]", "é", "×", "band:3", "reuse", "cpu", "demo", "%s"]
PIECES += ["a" * 300, "plan.json", '{"class_labels": [1]}', "\\", "'", "$HOME", "{0}", "1e9"]


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_a_panel_comes_of_any_arguments(seed, reached, plan_file):
    """Any command, any options, any values: success, or one panel."""
    chance = random.Random(seed)
    group = get_command(app)
    for _ in range(60):
        name = chance.choice([*group.commands, chance.choice(PIECES)])
        known = [parameter.opts[0] for parameter in group.commands[name].params] if name in group.commands else ["--x"]
        words = [name, *ONE_IS_ENOUGH.get(name, ())][: chance.choice([1, 3, 3, 3])]
        for _ in range(chance.randrange(4)):
            value = "".join(chance.choices(PIECES, k=chance.choice([1, 1, 1, 2, 3])))
            option = chance.choice(known)
            words += [f"{option}={value}"] if option.startswith("--") and chance.random() < 0.8 else [option, value]
        if "--help" in words:
            continue
        result = run(*words)
        assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exception)
        assert "Traceback" not in result.output
        assert "unexpected error" not in result.stderr, (words, result.stderr)
        if result.exit_code:
            assert result.stderr.count("╭") == 1 or not result.stderr, (words, result.stderr)
            assert all(character.isprintable() or character == "\n" for character in result.stderr), words


# --- what was not foreseen -------------------------------------------------------------------------------------------


def explode(error):
    def load(*args):
        raise error

    return load


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(AssertionError("never [red]\x1b[2J" + "x" * 9000)))
    result = run("inspect", __file__)
    assert result.exit_code == 1
    assert "unexpected error" in result.stderr
    assert "AssertionError: never" in result.stderr
    assert r"[red]\x1b[2Jxxx" in result.stderr
    (file,) = tmp_path.iterdir()
    assert str(file) in result.stderr
    assert "raise error" in file.read_text()
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 12 * WIDTH


def test_a_traceback_that_cannot_be_kept_is_shown(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/difa")
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(KeyError("never")))
    assert "Traceback (most recent call last)" in run("inspect", __file__).stderr


@pytest.mark.parametrize("option", [("--debug",), ()], ids=["option", "environment"])
@pytest.mark.parametrize("error", [KeyError("x"), PlanFormatError("x"), KeyboardInterrupt(), MemoryError()])
def test_debug_raises_whatever_it_is(error, option, monkeypatch):
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(error))
    assert get_raised(*option, "inspect", __file__, DIFA_DEBUG="" if option else "1") is error


def get_raised(*arguments, **env):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            get_command(app).main(list(arguments), prog_name="difa")
        except BaseException as error:
            return error


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce] can't allocate memory")],
)
def test_a_lack_of_memory_is_no_mistake_of_ours(error, monkeypatch):
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(error))
    assert refused("inspect", __file__, code=1).startswith("out of memory")


def test_an_error_that_says_too_much_is_cut(monkeypatch):
    monkeypatch.setattr("difa_compile.plan.plan.Plan.load", explode(PlanFormatError("\x1b[2J" + "y" * 100_000)))
    assert "characters more" in refused("inspect", __file__, code=1)


def test_ctrl_c_at_any_point_of_a_command(monkeypatch, plan_file):
    """Wherever it arrives: while options are read, files loaded, tables printed, the plan saved."""
    for place in (
        "difa_compile.plan.plan.Plan.load",
        "difa_compile.cli.app.print_plan",
        "difa_compile.plan.plan.Plan.summary",
        "difa_compile.cli.failures.GuardedGroup.make_context",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, explode(KeyboardInterrupt()))
            assert "Stopped by Ctrl-C" in refused("inspect", plan_file, code=130)


# --- streams ---------------------------------------------------------------------------------------------------------


def ended(stdout, stderr, *arguments):
    """The exit code of a command with these streams, flushed as Python does at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        patch.setenv("COLUMNS", str(WIDTH))
        with pytest.raises(SystemExit) as stop:
            get_command(app).main(list(map(str, arguments)), prog_name="difa")
        stdout.flush()
    return stop.value.code


def texts(encoding="utf-8"):
    """A stream in memory, as :func:`terminal.prepare_streams` leaves one."""
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="difa.plain", write_through=True)


def said(stream):
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_output_onto_a_full_disk_is_one_line_and_a_failure(options, plan_file):
    errors = texts()
    with open("/dev/full", "w") as full:
        assert ended(full, errors, "inspect", plan_file, *options) == 1
    assert said(errors) == "difa: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["table", "json"])
def test_a_reader_that_goes_is_no_failure_to_speak_of(options, tmp_path):
    make_plan(50, 40).save(tmp_path / "plan.json")
    errors = texts()
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        assert ended(gone, errors, "inspect", tmp_path / "plan.json", *options) == terminal.PIPE_CLOSED
    assert said(errors) == ""


def test_a_full_stderr_leaves_the_exit_code(plan_file):
    with open("/dev/full", "w") as full:
        assert ended(texts(), full, "inspect", "no/such/model") == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_encoding_takes_what_is_printed(encoding, plan_file, kept):
    for arguments in (("inspect", plan_file), ("inspect", "日本/模型/×"), ("report", kept), ("--help",)):
        output, errors = texts(encoding), texts(encoding)
        ended(output, errors, *arguments)
        assert said(output) + said(errors)


def test_characters_that_an_encoding_lacks_become_near_ones():
    assert "1.54× – é…\u00a0→ 日 \udcff".encode("ascii", "difa.plain") == rb"1.54x - e... -> \u65e5 \udcff"


@pytest.mark.parametrize("columns", ["0", "1", "5", "20", "x", "-3", "1000000"])
def test_any_width_does(columns, plan_file):
    assert run("inspect", plan_file, COLUMNS=columns).exit_code == 0
    result = run("inspect", "no/such/model", COLUMNS=columns)
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def start(shell, **env):
    """``shell`` with ``$difa`` as the command, in a session of its own."""
    program = f"{sys.executable} -c 'from difa_compile.cli import main; main()'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        ["bash", "-c", shell.replace("difa ", program + " ")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_libraries_are_imported():
    """Before typer is there to hear of it: one line, and the exit code of an interrupted program."""
    code = """
        import sys, types
        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    print("importing", flush=True)
                    import time
                    try:
                        time.sleep(60)
                    except BaseException:  # as some libraries do
                        raise ImportError("torch is broken")
        sys.meta_path.insert(0, Slow())
        from difa_compile.cli import main
        main()
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "difa: stopped by Ctrl-C\n")


def test_a_broken_installation_is_one_line_with_the_traceback_kept(tmp_path):
    code = """
        import sys
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    raise OSError("libtorch.so: cannot open shared object file")
        sys.meta_path.insert(0, Broken())
        from difa_compile.cli import main
        main()
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    (kept,) = tmp_path.iterdir()
    assert result.returncode == 1
    assert result.stderr == (
        f"difa: cannot start: OSError: libtorch.so: cannot open shared object file; the traceback is in {kept}\n"
    )
    assert "Traceback" in kept.read_text()


def test_closed_streams_are_opened(tmp_path):
    """What is opened next must not take the number of stderr, or warnings would end up inside it."""
    code = (
        "from difa_compile.cli.terminal import *; prepare_streams(); import sys\n"
        "out = sys.stdout = Watched(sys.stdout)\n"
        "with open('file', 'w') as file:\n"
        "    print('lost', file=sys.stderr, flush=True); file.write(str(file.fileno() > 2))\n"
        "print('lost'); sys.exit(finished(0, out))"
    )
    for closed in ("0<&-", "2>&-", "0<&- 2>&-"):
        shell = f'"{sys.executable}" -c "$code" > output {closed}'
        result = subprocess.run(
            ["bash", "-c", shell], cwd=tmp_path, env={**os.environ, "code": code, "PYTHONPATH": str(ROOT)}, check=False
        )
        assert result.returncode == 0
        assert (tmp_path / "file").read_text() == "True"
        assert (tmp_path / "output").read_text() == "lost\n"
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "$code" 1>&-'],
        cwd=tmp_path,
        env={**os.environ, "code": code, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "lost\ndifa: the output cannot be written: Bad file descriptor\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code", "errors"),
    [
        ("difa inspect {plan} > /dev/full", 1, r"difa: the output cannot be written: No space left on device\n"),
        ("difa inspect {plan} --json | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}", 141, ""),
        ("difa inspect {plan} 2>&- > /dev/null", 0, ""),
        ("PYTHONIOENCODING=ascii LC_ALL=C difa inspect a/b/c", 1, r"\+- model load error.*"),
        ("difa inspect $'\\xff\\e[2J'", 1, r".*\\udcff\\x1b\[2J.*"),
    ],
    ids=["full", "pipe", "closed", "ascii", "bytes"],
)
def test_the_whole_program_on_such_streams(shell, code, errors, tmp_path):
    make_plan(50, 40).save(tmp_path / "plan.json")
    process = start(shell.format(plan=tmp_path / "plan.json"), TERM="dumb")
    _, found = process.communicate(timeout=120)
    assert process.returncode == code
    assert re.fullmatch(errors, found, re.DOTALL), found


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("after", [0.5, 4.0, 11.0])
def test_ctrl_c_at_any_time_of_a_calibration(after, tmp_path):
    process = start(
        f"exec difa calibrate demo -o {tmp_path}/plan.json --steps 50", DIFA_PROFILE="off", TERM="dumb", COLUMNS="200"
    )
    time.sleep(after)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "topped by Ctrl-C" in errors


# --- foreign names in tables -----------------------------------------------------------------------------------------

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


class Called:
    """A site of a model, or a record, in which every text is the one given."""

    def __init__(self, text):
        self.path = self.kind = self.layout_reason = self.mask = self.site = self.reason = text
        self.decision = self.outcome = text
        self.layout, self.tokens, self.query_shape = None, 4, (1, 2, 4, 8)


@pytest.mark.parametrize("text", FOREIGN, ids=ascii)
def test_foreign_names_in_tables_stand_as_they_are(text, capsys):
    from dataclasses import replace

    from difa_compile.cli.tune import print_profile
    from tests.support.profiles import made_up

    console = Console(width=20_000)
    plan = make_plan(4, 2)
    sites = tuple(replace(site, path=f"{text}.{index}") for index, site in enumerate(plan.sites))
    settings = replace(plan.settings, torch=text, diffusers=text, candidates=(text,))
    hostile = replace(plan, sites=sites, settings=settings, model=replace(plan.model, class_name=text))
    profile = made_up()
    fits = tuple(replace(fit, operation=text, dtype=text) for fit in profile.fits if fit.operation != ELEMENTWISE)
    for name, show in {
        "sites": lambda: print_sites(console, text, [Called(text)]),
        "records": lambda: print_records(console, [Called(text)]),
        "profile": lambda: print_profile(console, replace(profile, fits=fits)),
        "plan": lambda: print_plan(console, hostile),
    }.items():
        show()
        printed = capsys.readouterr().out
        assert all(one.isprintable() or one in "\n\u00a0" for one in printed), name
        assert shown(text, 60)[:20] in printed, name
        printed.encode()


@pytest.mark.parametrize("text", FOREIGN, ids=ascii)
def test_captions_and_inputs_take_any_text(text):
    (caption,) = image_captions({"prompt": text}, {}, 1)
    assert len(caption) <= 60
    assert caption.isprintable()
    assert call_inputs("a/b", None, None, [text], None) == {"prompt": [text]}
