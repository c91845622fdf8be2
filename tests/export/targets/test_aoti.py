"""AOTInductor packages of programs: what they give, that weights are shared, and what they say of themselves."""

import platform

import pytest
import torch

from difa_compile.bundle.sessions import hand_over, load_kernel, load_package
from difa_compile.bundle.weights import WeightFile, write_weights
from difa_compile.decision import Window
from difa_compile.errors import TargetError
from difa_compile.export.targets import aoti
from difa_compile.export.targets.aoti import instruction_set_of, lowered
from difa_compile.layout import Layout
from difa_compile.ops.local_attention import local_attention
from tests.support.small_programs import TOKENS, WIDTH, full, parts, program_of, two_windows, wanted_of


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


def test_weights_are_not_in_the_package_and_are_shared(tmp_path):
    module, engine, model, handed = check(full, tmp_path)
    assert not engine.kernel
    state = module.state_dict()
    assert sorted(engine.weights.values()) == sorted(state)
    args = [torch.randn(2, TOKENS, WIDTH) for _ in range(2)]
    before = model(*args)[0]
    handed["out.bias"] += 1  # the very numbers that it computes with
    torch.testing.assert_close(model(*args)[0], before + 1, atol=1e-5, rtol=0)
    assert engine.instruction_set == instruction_set_of(tmp_path / "engine.pt2")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in aoti.PORTABLE, reason="no portable engines for this processor")
def test_portable_packages_need_no_more_than_avx2(tmp_path):
    _, engine, _, _ = check(full, tmp_path, portable=True)
    assert engine.instruction_set.split() == ["AVX2"]


def test_portable_packages_of_other_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(aoti, "PORTABLE", {"pdp11": ("pdp11", 16)})
    _, program = program_of(full)
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
