"""The command line under hostile arguments, files and streams: one panel, an exit code, never a traceback.

What is wrong is refused before anything long begins: loading a pipeline and everything after it are replaced by stubs
that note that they were reached.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.main import get_command

from difa_compile.cli.app import app
from difa_compile.cli.inputs import LARGEST_FILE, LARGEST_SEED
from difa_compile.errors import DifaError
from tests.support import bundles
from tests.support.commands import explode, refused, run
from tests.support.places import ROOT
from tests.support.report_sample import make_plan
from tests.support.tables import made_table


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

    def set_progress_bar_config(self, disable):
        pass


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
    monkeypatch.setattr("difa_compile.calibration.measure.measure", noting("measure"))
    monkeypatch.setattr("difa_compile.comparison.planned.plan_within", noting("search"))
    monkeypatch.setattr(sys.modules[tune.__name__], "tune", noting("tune"))
    monkeypatch.setattr("difa_compile.exporting.write.export", noting("search"))
    monkeypatch.setattr("difa_compile.cli.tune.measure_if_unknown", lambda console, pipe: None)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def plan_file(tmp_path):
    make_plan(4, 2).save(tmp_path / "plan.json")
    made_table(4).save(tmp_path / "errors.json")
    (tmp_path / "bundle").symlink_to(bundles.kept())
    lora = {"proj_out_1.lora_A.weight": torch.ones(1, 16), "proj_out_1.lora_B.weight": torch.ones(32, 1)}
    safetensors.torch.save_file(lora, tmp_path / "lora.safetensors")
    return tmp_path / "plan.json"


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
    ("calibrate", "--rank"): ["published", *NAMES],
    ("calibrate", "--method"): NAMES,
    ("calibrate", "--runs"): ["0", *WHOLE_NUMBERS],
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
    ("calibrate", "--table"): ["plan.json", ".", "/dev/null", *NAMES],
    ("calibrate", "--state"): [".", "/", "/dev/null", "/proc/difa/x", "a" * 300, "\0"],
    **{(command, "--budget"): ["0", "-1", "1.5", *NUMBERS] for command in ("calibrate", "plan")},
    **{(command, "--psnr"): ["0", "-1", "201", *NUMBERS] for command in ("calibrate", "plan")},
    **{(command, "--error"): ["0", "-1", *NUMBERS] for command in ("calibrate", "plan")},
    **{(command, "--max-rows"): ["0", *WHOLE_NUMBERS] for command in ("calibrate", "plan")},
    ("plan", "--output"): [".", "/", "/dev/null", "/proc/difa/plan.json", "a" * 300, "\0"],
    ("plan", "--steps"): ["0", "10001", *WHOLE_NUMBERS],
    ("measure", "--output"): [".", "/", "/dev/null", "/proc/difa/errors.json", "a" * 300, "\0"],
    ("measure", "--steps"): ["0", "10001", *WHOLE_NUMBERS],
    ("measure", "--window"): ["band", "band:0", "cone:3", *NAMES],
    ("measure", "--try"): ["window", "heads(0:full)", "heads(0-1:full;1:reuse)", "forecast:9", "full +cfg", *NAMES],
    ("measure", "--heads"): ["band", "box:0", "cone:3", "full", *NAMES],
    ("measure", "--labels"): ["", "10", "-1", LONG],
    ("measure", "--inputs"): ["{", '{"class_labels": [1], "guidance": 4}', *NAMES],
    ("measure", "--guidance"): NUMBERS,
    ("measure", "--seed"): WHOLE_NUMBERS,
    ("measure", "--device"): ["meta", "cuda:99", *NAMES],
    ("demo", "--steps"): ["0", "10001", *WHOLE_NUMBERS],
    ("demo", "--budget"): ["0", "-1", "1.5", *NUMBERS],
    ("demo", "--samples"): ["0", "100001", *WHOLE_NUMBERS],
    ("demo", "--seed"): WHOLE_NUMBERS,
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
    ("export", "--plan"): [".", "/dev/null", "fast=", "=plan.json", "a/b=plan.json", *NAMES],
    ("export", "--out"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
    ("export", "--target"): ["tensorflow", "onnx;aoti", ",", *NAMES],
    ("export", "--gpus"): ["sm_89", "8.9;12.0", "8.", ",", *NAMES],
    ("export", "--steps"): ["0", "10001", "4,", "4;6", *WHOLE_NUMBERS],
    ("export", "--size"): ["0x8", "8", "8x8x8", "8x8;9x9", ",", "-8x8", LONG],
    ("export", "--dtype"): ["float8_e4m3fn", "int8", "float33", *NAMES],
    ("export", "--batch"): ["0", "1025", "1:2", "1:9:8", "2:4:8", "1:0:8", "1::8", "1:2:8:16", "", *WHOLE_NUMBERS],
    ("export", "--max-engines"): ["0", *WHOLE_NUMBERS],
    ("export", "--labels"): ["", "10", "-1", LONG],
    ("export", "--inputs"): ["{", '{"class_labels": [1], "guidance": 4}', *NAMES],
    ("export", "--guidance"): NUMBERS,
    ("run", "--output"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
    ("run", "--labels"): ["", "-1", "1,2,3", LONG],
    ("run", "--conditions"): [".", "/dev/null", "plan.json", *NAMES],
    ("run", "--images"): ["0", "1025", *WHOLE_NUMBERS],
    ("run", "--steps"): ["0", "3", "10001", *WHOLE_NUMBERS],
    ("run", "--size"): ["0x8", "8", "8x8", LONG],
    ("run", "--tier"): NAMES,
    ("run", "--guidance"): ["0.5", *NUMBERS],
    ("run", "--seed"): WHOLE_NUMBERS,
    ("run", "--preview"): ["0", "10001", *WHOLE_NUMBERS],
    ("run", "--target"): ["aoti", *NAMES],
    ("report", "--output"): ["/dev/null", "/proc/difa", "a" * 300, "\0"],
    ("bundle adapt", "--out"): [".", "/", "/dev/null", "/proc/difa", "a" * 300, "\0", "bundle", "bundle/plans/x"],
    ("bundle adapt", "--scale"): NUMBERS,
    ("bundle adapt", "--without"): ["proj_out", "proj_out_", "proj_out_1.", *NAMES],
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
    "measure": ("demo",),
    "plan": ("errors.json",),
    "export": ("demo", "--plan=plan.json"),
    "run": ("bundle", "--labels=1"),
    "bundle adapt": ("bundle", "lora.safetensors", "--out=out"),
}
BESIDE = {
    "--max-rows": ("--budget", "0.9"),
    ("plan", "--output"): ("--budget", "0.9"),
    **{
        ("calibrate", option): ("--method", "weighed") for option in ("--threshold", "--candidates", "--loss", "--rank")
    },
}
"""What must be given with an option for it to count."""
NEEDS_PIPELINE = {"--inputs", "--output", "--state"}


@pytest.mark.parametrize(("command", "option"), HOSTILE, ids=" ".join)
def test_what_makes_no_sense_is_refused_at_once(command, option, reached, plan_file, kept):
    for value in HOSTILE[command, option]:
        beside = BESIDE.get((command, option), BESIDE.get(option, ()))
        message = refused(*command.split(), *ONE_IS_ENOUGH[command], *beside, f"{option}={value}")
        assert set(reached) <= ({"loaded"} if option in NEEDS_PIPELINE else set()), (value, reached)
        reached.clear()
        assert message
    assert sorted(path.name for path in Path().iterdir() if path.name.endswith(".tmp")) == []


def test_every_option_with_a_value_is_in_the_table():
    """An option that somebody adds must be thought of here, or be among those that take anything."""
    anything = {("report", "--title"), ("calibrate", "--prompt"), ("compare", "--prompt"), ("measure", "--prompt")}
    anything |= {("export", "--prompt"), ("run", "--prompt"), ("run", "--negative-prompt")}
    group = get_command(app)
    commands = {name: command for name, command in group.commands.items() if not hasattr(command, "commands")} | {
        f"{name} {inner}": command
        for name, inside in group.commands.items()
        for inner, command in getattr(inside, "commands", {}).items()
    }
    found = {
        (name, parameter.opts[0])
        for name, command in commands.items()
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
    beside = BESIDE.get(("calibrate", option.split("=")[0]), ())
    assert said in refused("calibrate", "demo", *beside, option)


def test_what_is_allowed_still_is(reached, plan_file, kept):
    """The other side of the table: nothing sensible is refused by it."""
    for options in (
        ("--seed", LARGEST_SEED),
        ("--seed", 0),
        ("--steps", 1),
        ("--labels", " 1 , 2"),
        ("--guidance", 1),
        ("--guidance", -1.5),
        ("--method", "weighed", "--threshold", 10),
        ("--window", "disc:8"),
        ("--method", "weighed", "--candidates", "reuse, full+cfg"),
        ("--method", "published", "--loss", "code"),
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
            "calibrate", demo_folder, "--labels", "1", "--method", "weighed", "-o", demo_folder / "plan.json", code=1
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
        known = known or ["--x"]  # a group of commands
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


# --- the whole program -----------------------------------------------------------------------------------------------


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
