"""What a user installs: the symlinked subpackages, the wheel, the entry points, the one hard dependency."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import difa_compile
from tests.support.places import ROOT

LINKS = ("passes", "plugins", "exporting")
OPTIONAL = (
    "accelerate",
    "diffusers",
    "matplotlib",
    "msgspec",
    "numpy",
    "onnx",
    "PIL",
    "rich",
    "safetensors",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torchmetrics",
    "tqdm",
    "transformers",
    "triton",
    "typer",
)


def run_python(code: str, *, path: Path | None = None, cwd: Path | None = None) -> str:
    """Run code in a fresh interpreter and return what it prints; ``path`` goes in front of ``sys.path``."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PYTHONPATH"] = str(path or ROOT)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources without network."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("difa_compile", *LINKS):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*pip, "--no-index", "-w", str(folder), str(sources)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("difa_compile-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder the wheel was installed into, to be put in front of ``sys.path``."""
    target = wheel.parent / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True)
    return target


@pytest.mark.parametrize("name", LINKS)
def test_subpackage_is_a_relative_symlink_that_resolves(name):
    link = ROOT / "difa_compile" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    module = importlib.import_module(f"difa_compile.{name}")
    assert Path(module.__file__).samefile(ROOT / name / "__init__.py")


@pytest.mark.parametrize("name", LINKS)
def test_lint_forbids_the_top_level_name(name):
    ruff = Path(sys.executable).with_name("ruff")
    code = f"import {name}\nfrom {name} import something\nimport difa_compile.{name}\n"
    command = [str(ruff), "check", "--select", "TID251", "--output-format", "concise", "--stdin-filename", "x.py", "-"]
    result = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, check=False)
    assert re.findall(r"x\.py:(\d):\d+: TID251", result.stdout) == ["1", "2"], result.stdout + result.stderr


def test_torch_is_the_only_hard_dependency_and_no_extra_replaces_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.11"]
    wanted = " ".join(name for extra in project["optional-dependencies"].values() for name in extra)
    # These pin a torch of their own.
    assert not re.search(r"torchvision|torchaudio|torch-fidelity|torchmetrics\[", wanted)


def test_metadata_of_the_installed_package():
    assert importlib.metadata.version("difa-compile") == difa_compile.__version__
    scripts = importlib.metadata.entry_points(group="console_scripts", name="difa")
    assert {point.value for point in scripts} == {"difa_compile.cli:main"}


def test_wheel_holds_all_sources_and_data_and_nothing_generic(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"difa_compile", f"difa_compile-{difa_compile.__version__}.dist-info"}
    sources = {
        str(Path("difa_compile", folder, path.relative_to(base)))
        for folder, base in [("", ROOT / "difa_compile"), *((link, ROOT / link) for link in LINKS)]
        for path in base.rglob("*.py")
        if not any(part in LINKS for part in path.relative_to(base).parts[:1])
    }
    assert sources <= names, sources - names
    assert {"difa_compile/py.typed", "difa_compile/demo/model/model_index.json"} <= names
    data = {
        path for path in (ROOT / "difa_compile").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    shipped = {str(path.relative_to(ROOT)) for path in data}
    assert shipped <= names, shipped - names


@pytest.mark.slow
def test_installed_wheel_serves_the_demo_model(installed, tmp_path):
    out = run_python(
        """
        import difa_compile, difa_compile.passes, difa_compile.plugins, difa_compile.exporting
        from difa_compile.pipeline.loading import load_pipeline
        pipe = load_pipeline("demo")
        print(difa_compile.__file__)
        print(type(pipe).__name__, len(pipe.transformer.transformer_blocks))
        """,
        path=installed,
        cwd=tmp_path,
    )
    file, model = out.strip().splitlines()[-2:]
    assert Path(file).is_relative_to(installed)
    assert model == "DiTPipeline 6"


def test_torch_compile_finds_the_backend_with_no_import_of_ours(tmp_path):
    out = run_python(
        """
        import sys, torch
        assert "difa" in torch._dynamo.list_backends(exclude_tags=())
        assert "difa_compile" not in sys.modules
        backend = torch._dynamo.lookup_backend("difa")
        import difa_compile.backend.entry
        print(backend is difa_compile.backend.entry.difa)
        """,
        cwd=tmp_path,
    )
    assert out.split() == ["True"]


def test_import_needs_torch_only(tmp_path):
    """All public names load in a process where every optional package is missing, but for what plans with numpy."""
    run_python(
        f"""
        import importlib.abc, sys

        class Blocked(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if any(name == blocked or name.startswith(blocked + ".") for blocked in {OPTIONAL!r}):
                    raise ModuleNotFoundError("blocked: " + name, name=name)

        sys.meta_path.insert(0, Blocked())
        import difa_compile
        from difa_compile.errors import MissingDependencyError
        needy = set()
        for name in difa_compile.__all__:
            try:
                getattr(difa_compile, name)
            except MissingDependencyError as error:
                assert "numpy" in str(error) or "msgspec" in str(error)
                needy.add(name)
        planning = {{"ErrorTable", "Limit", "measure", "plan_from_table", "plan_within"}}
        bundles = {{"adapt_bundle", "bundle_difference", "export", "load_bundle"}}
        assert needy == planning | bundles, needy
        import difa_compile.backend.entry
        """,
        cwd=tmp_path,
    )


def test_import_alone_loads_nothing_heavy(tmp_path):
    out = run_python(
        "import sys, difa_compile; print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])",
        cwd=tmp_path,
    )
    assert out.strip() == "[]"


def test_public_names_survive_the_import_of_every_module(tmp_path):
    """Importing a submodule binds its name in the package, so none may have the name of a public function."""
    modules = {info.name for info in pkgutil.iter_modules([str(ROOT / "difa_compile")])}
    assert {"calibration", "pipeline", "plan"} <= modules
    assert not modules & set(difa_compile.__all__)


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        difa_compile.aply  # noqa: B018
    assert set(difa_compile.__all__) <= set(dir(difa_compile))


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MFLAGS"}
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=ROOT, check=False, env=env)


@pytest.mark.parametrize(
    ("target", "last"), [("demo", "bin/difa demo"), ("test", '-m "not slow"'), ("test-slow", "-m slow")]
)
def test_make_installs_torch_first_and_holds_it(target, last, tmp_path):
    result = make("-n", target, f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", "TORCH=2.12.1")
    assert result.returncode == 0, result.stderr
    installs = [line for line in result.stdout.splitlines() if "pip" in line and "install" in line]
    assert installs[0].endswith("install torch==2.12.1")
    assert all("--constraint" in line and "--editable" in line for line in installs[1:])
    assert len(installs) == 2
    assert last in result.stdout.splitlines()[-1]


def test_what_ci_runs_leaves_no_test_out():
    """``make test`` and ``make test-slow`` differ in the choice of tests alone, and one takes what the other leaves."""
    run = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in run if line.startswith("make")] == ["make lint", "make test", "make test-slow"]
    quick, slow = (make("-n", name, f"VENV={ROOT / '.venv'}").stdout.splitlines()[-1] for name in ("test", "test-slow"))
    assert quick.replace('-m "not slow"', "-m slow").split() == slow.split()


def test_make_says_which_python_it_needs(tmp_path):
    result = make("demo", f"VENV={tmp_path / 'venv'}", "PYTHON=false")
    assert result.returncode != 0
    assert "Python 3.11 to 3.13" in result.stderr
    assert not (tmp_path / "venv").exists()
