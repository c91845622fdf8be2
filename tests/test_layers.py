"""The layers of DESIGN.md hold: nothing imports what stands above it, no imports go in a circle; tests mirror it."""

import ast
import re

import pytest

from tests.support.places import ROOT

BY_NAME = {"difa_compile.ops.kernels": "difa_compile.plugins"}
"""Modules that name others in strings, to be imported when first needed, against the layers: kernels serve the ops that
are below them."""


def layers(heading):
    """The layers of a drawing in DESIGN.md, topmost first, each a list of names."""
    text = (ROOT / "DESIGN.md").read_text()
    block = re.search(rf"^## {heading}$.*?^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    drawn = [re.match(r"([\w, ]+?)(?:\s{2,}|$)", line) for line in block.splitlines()]
    return [re.split(r",\s*", found[1]) for found in drawn if found]


def modules():
    """Every module of the package: its name, and its syntax tree."""
    found = {}
    for folder in ("difa_compile", "passes", "plugins", "exporting"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            if folder == "difa_compile" and inside.parts[1] in ("passes", "plugins", "exporting"):
                continue  # the links to the folders themselves
            parts = [*([] if folder == "difa_compile" else ["difa_compile"]), *inside.with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports(name):
    """The modules of the package that a module imports, wherever in it and for whatever reason."""
    found = set()
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.Constant) and node.value in MODULES and not f"{name}.".startswith(f"{node.value}."):
            found.add(node.value)  # by name; that of a package around it is for files that lie there
    return {each for each in found if each.split(".")[0] == "difa_compile" and each in MODULES} - {name}


IMPORTS = {name: imports(name) for name in MODULES}


def place(name, order, prefix):
    """The layer of a module, counted from the top; that of the package itself is above all."""
    parts = name.removeprefix(prefix).split(".")
    return next((i for i, names in enumerate(order) if parts[0] in names), None if parts[0] else -1)


@pytest.mark.parametrize(("heading", "prefix"), [("Layers", "difa_compile."), ("Passes", "difa_compile.passes.")])
def test_imports_point_down(heading, prefix):
    order = layers(heading)
    names = [name for name in MODULES if name.startswith(prefix)]
    drawn = {name: place(name, order, prefix) for name in names}
    assert not [name for name, layer in drawn.items() if layer is None], "draw them in DESIGN.md"
    assert all(any(place(name, [[each]], prefix) == 0 for name in names) for row in order for each in row if each)
    wrong = [
        f"{name} imports {other}"
        for name in names
        for other in IMPORTS[name]
        if other in drawn and drawn[other] < drawn[name] and not other.startswith(BY_NAME.get(name, "none"))
    ]
    assert not wrong


def test_no_circle():
    """Not among packages' modules, whether they import at the top, in a function or for types alone."""
    left = {
        name: {each for each in found if not each.startswith(BY_NAME.get(name, "none"))}
        for name, found in IMPORTS.items()
    }
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "these import each other, or what does"


def test_every_package_says_what_it_is_for():
    packages = {name.rpartition(".")[0] for name in MODULES} - {"", "difa_compile"}
    for name in packages:
        told = ast.get_docstring(MODULES[name])
        assert told, name
        assert len(told.splitlines()) <= 8, name


def test_nothing_loads_modules_by_name_but_where_it_is_said():
    """``importlib`` would let an import past the tests above."""
    users = {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert users == {"difa_compile", *BY_NAME}


def test_every_module_has_its_tests():
    """``plan/cost.py`` has ``tests/plan/test_cost.py``; of packages' own modules, which say what they are for, only the
    one with code to test has tests, under its name."""
    missing = set()
    for folder in ("difa_compile", "passes", "plugins", "exporting"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / "difa_compile" if folder == "difa_compile" else ROOT)
            linked = folder == "difa_compile" and inside.parts[0] in ("passes", "plugins", "exporting")
            if path.name != "__init__.py" and not linked:
                own = ROOT / "tests" / inside.with_name(f"test_{inside.name}")
                missing |= set() if has_tests(own) else {inside.as_posix()}
    assert not missing
    assert has_tests(ROOT / "tests" / "plugins" / "cpu" / "test_kernel.py")


def has_tests(path):
    """Whether a file of tests is there and holds any."""
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
