"""AOTInductor packages of programs: what they give, that weights are shared, and what they say of themselves."""

import os
import platform
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import config

from difa_compile.bundle.manifest import Port
from difa_compile.bundle.sessions import AotiSession, hand_over, load_kernel, load_package
from difa_compile.bundle.weights import WeightFile, write_weights
from difa_compile.decision import Window
from difa_compile.errors import TargetError
from difa_compile.exporting.lowered import Wanted
from difa_compile.exporting.targets import aoti
from difa_compile.exporting.targets.aoti import instruction_set_of, lowered
from difa_compile.layout import Layout
from difa_compile.ops.local_attention import local_attention
from tests.support.places import ROOT
from tests.support.small_programs import (
    TOKENS,
    WIDTH,
    full,
    packaged,
    parts,
    program_of,
    two_windows,
    wanted_of,
)


def check(attend, folder, tokens=TOKENS, **options):
    """What the package computes with weights out of the one file, for several batches."""
    module, program = program_of(attend, tokens)
    engine = lowered(wanted_of(program, **options), folder / "engine")
    assert engine.file == folder / "engine.pt2"
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    read = {name: engine.tables[name] if name in engine.tables else state[name] for name in engine.weights.values()}
    write_weights(folder / "weights.safetensors", read)
    weights = WeightFile(folder / "weights.safetensors")
    if engine.kernel:
        load_kernel()
    model = load_package(folder / "engine.pt2")
    handed = {fqn: weights[name] for fqn, name in engine.weights.items()}
    hand_over(model, handed)
    for batch in (1, 2, 5):
        args = [torch.randn(batch, tokens, WIDTH) for _ in range(2)]
        with torch.no_grad():
            for found, wanted in zip(model(*args), module(*args), strict=True):
                torch.testing.assert_close(found, wanted, atol=3e-6, rtol=0)
    return module, engine, model, handed


@pytest.mark.slow
def test_windows_and_heads_run_on_our_kernel(tmp_path):
    def attend(q, k, v):
        return two_windows(q, k, v) + parts(q, k, v)

    _, engine, _, _ = check(attend, tmp_path)
    assert engine.kernel


def test_weights_are_not_in_the_package_and_are_shared_by_sessions_and_threads():
    module, engine, folder = packaged()
    assert not engine.kernel
    assert sorted(engine.weights.values()) == sorted(module.state_dict())
    assert engine.instruction_set == instruction_set_of(folder / engine.file)
    weights = WeightFile(folder / "weights.safetensors")
    sessions = [AotiSession(engine, folder / engine.file, weights) for _ in range(2)]
    calls = [(torch.randn(count, TOKENS, WIDTH), torch.arange(count)) for count in (1, 2, 5)] * 4
    with torch.no_grad():
        rights = [module(*call) for call in calls]
    found = {}

    def run(session, first):
        for i, call in enumerate(calls[first:], first):
            found[session, i] = sessions[session].run(call, [None], len(call[0]))[0]

    threads = [threading.Thread(target=run, args=(i % 2, i)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 * len(calls) - 1, "each thread ends"
    for (_, i), value in found.items():
        torch.testing.assert_close(value, rights[i], atol=3e-6, rtol=0)
    bias = weights[engine.weights["linear.bias"]]
    bias += 10  # the very numbers that both compute with
    try:
        for session in sessions:
            assert bool((session.run(calls[0], [None], 1)[0] > 0.99).all())
    finally:
        bias -= 10


def test_packages_have_no_sources_and_no_paths_of_this_machine():
    _, engine, folder = packaged()
    with zipfile.ZipFile(folder / engine.file) as archive:
        names = archive.namelist()
        assert any(name.endswith(".so") for name in names)
        for name in names:
            data = archive.read(name)
            assert not (name.endswith((".cpp", ".h")) and data)
            for path in (*aoti.machine_paths(), os.fsencode(ROOT), os.fsencode(folder), os.fsencode(Path.home())):
                assert path not in data, name


def test_what_is_repacked_has_its_names_and_lengths(tmp_path):
    with zipfile.ZipFile(tmp_path / "made", "w") as archive:
        archive.writestr("a/model.cpp", "int main() {}")
        archive.writestr("a/model.so", b"before /tmp/me/x.h after /tmp")
    content = aoti.repacked((tmp_path / "made").read_bytes(), [b"/tmp/me", b"/tmp"])
    (tmp_path / "again").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "again") as archive:
        assert archive.namelist() == ["a/model.cpp", "a/model.so"]
        assert archive.read("a/model.cpp") == b""
        assert archive.read("a/model.so") == b"before ......./x.h after ...."
    assert content == aoti.repacked((tmp_path / "made").read_bytes(), [b"/tmp/me", b"/tmp"])


class Reduces(nn.Module):
    """All numbers of an image become one or two, which threads do in parts."""

    def forward(self, sample):
        return sample.sum(1), (sample * sample).amax(1)


RUNS = """
import sys
import torch
from difa_compile.bundle.sessions import load_package
torch.set_num_threads(int(sys.argv[2]))
model = load_package(sys.argv[1])
sample = torch.randn(1, 2**20, generator=torch.Generator().manual_seed(0))
for _ in range(20):
    total, largest = model(sample)
    torch.testing.assert_close(total, sample.sum(1), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(largest, (sample * sample).amax(1))
"""


@pytest.mark.slow
def test_the_number_of_threads_is_no_part_of_a_package(tmp_path, monkeypatch):
    """It is compiled where two threads run, on two cores as torch believes, or one, and run by eight and by one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    program = torch.export.export(Reduces(), (torch.randn(1, 2**20),))
    outputs = tuple(Port(name, "float32", (1,)) for name in ("total", "largest"))
    before = torch.get_num_threads()
    files = []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            wanted = Wanted(program, (Port("sample", "float32", (1, 2**20)),), outputs, (1, 1))
            files.append(lowered(wanted, tmp_path / f"engine{threads}").file)
    finally:
        torch.set_num_threads(before)
    for file in files:
        for threads in ("8", "1"):
            subprocess.run([sys.executable, "-c", RUNS, str(file), threads], check=True, timeout=120, cwd=ROOT)


def test_without_a_compiler_nothing_is_begun():
    aoti.check(False)
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(TargetError, match="no-such-compiler cannot be run; install g"),
    ):
        aoti.check(False)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in aoti.PORTABLE, reason="no portable engines for this processor")
def test_portable_packages_need_no_more_than_avx2(tmp_path):
    _, engine, _, _ = check(full, tmp_path, portable=True)
    assert engine.instruction_set.split() == ["AVX2"]


def test_portable_packages_of_other_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(aoti, "PORTABLE", {"pdp11": ("pdp11", 16)})
    _, program = program_of(full)
    with pytest.raises(TargetError, match="portable engines are for pdp11"):
        aoti.check(True)
    with pytest.raises(TargetError, match="portable engines are for pdp11"):
        lowered(wanted_of(program, portable=True), tmp_path / "engine")


def test_windows_need_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(aoti.build, "why_not_built", lambda: "there is no compiler")
    _, program = program_of(two_windows)
    with pytest.raises(TargetError, match="need our kernel for local attention: there is no compiler"):
        lowered(wanted_of(program), tmp_path / "engine")


def test_windows_that_the_kernel_does_not_serve(tmp_path):
    layout = Layout((8, 8), 0, 2)
    _, program = program_of(lambda q, k, v: local_attention(q, k, v, layout, Window("box", 1)), dtype=torch.float64)
    with pytest.raises(TargetError, match=r"not for torch\.float64"):
        lowered(wanted_of(program, torch.float64), tmp_path / "engine")


def test_code_for_another_number_of_images_is_refused():
    """As a package computes that was compiled for two images, and is then given one."""
    module, program = program_of(full)
    wanted = wanted_of(program)
    aoti.check_package(module, wanted)

    def repeated(*args):
        return [value.expand(2, *value.shape[1:]) if len(value) == 1 else value for value in module(*args)]

    with pytest.raises(TargetError, match=r"another output of 1 images than the model.*--batch 1"):
        aoti.check_package(repeated, wanted)
    with pytest.raises(TargetError, match=r"another cache\.b of 2 images"):
        aoti.check_package(lambda *args: [module(*args)[0], module(*args)[1] * len(args[0])], wanted)


class Pictures(nn.Module):
    """An embedding's rows, with what is infinite in them, and bytes of colours."""

    def forward(self, ids, mask, latents):
        table = torch.arange(50.0).reshape(10, 5).masked_fill(torch.eye(10, 5) > 0, -torch.inf)
        rows = nn.functional.embedding(ids, table) + torch.log(mask.float())[..., None]
        return rows, (latents * 100).clamp(0, 255).to(torch.uint8), ids + 1


def test_packages_are_run_on_what_the_export_has_seen():
    """Ids and masks have a meaning; what is infinite is equal, colours may be rounded to the next."""
    module = Pictures()
    given = torch.tensor([[1, 9, 2]]), torch.tensor([[1, 1, 0]]), torch.randn(1, 3)
    program = torch.export.export(module, given)
    names = (("ids", "int64"), ("mask", "int64"), ("latents", "float32"))
    inputs = tuple(Port(name, dtype, (1, 3)) for name, dtype in names)
    outputs = Port("rows", "float32", (1, 3, 5)), Port("images", "uint8", (1, 3)), Port("next", "int64", (1, 3))
    wanted = Wanted(program, inputs, outputs, (1, 1))
    seen = []

    def model(*args, rows=0.0, infinite=1.0, colours=0, ids=0):
        seen.append(args)
        found = module(*args)
        return found[0] * infinite + rows, found[1] + colours, found[2] + ids

    def changed(**options):
        return lambda *args: model(*args, **options)

    aoti.check_package(model, wanted)
    assert torch.equal(seen[0][0], given[0])
    assert torch.equal(seen[0][1], given[1])
    aoti.check_package(changed(rows=1e-3), wanted)
    aoti.check_package(changed(colours=1), wanted)
    for options, name in (
        ({"rows": 20.0}, "rows"), ({"infinite": -1.0}, "rows"), ({"rows": torch.nan}, "rows"),
        ({"colours": 2}, "images"), ({"ids": 1}, "next"),
    ):  # fmt: skip
        with pytest.raises(TargetError, match=f"another {name} of 1 images"):
            aoti.check_package(changed(**options), wanted)
