"""Sampling programs: what they compute, that they read back as they were written, and that no damaged one is read."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from difa_compile.bundle.program import Clamp, Draw, Program, Sample, Scale, Term, View, replay, value_of
from difa_compile.errors import ProgramFormatError, ReplayError, SamplingCancelledError
from tests.support.mutations import edited
from tests.support.places import ROOT
from tests.support.programs import programs, small_program

IDS = {"cond": {"labels": torch.tensor([3, 4]), "ids": torch.arange(5.0)}}


def model(form, operation, inputs):
    """Rows of 4 x 3 of rows of 2 x 3, by label and timestep."""
    rows = inputs["hidden_states"]
    moved = torch.cat([rows, rows], 1) * 2 + inputs["labels"].view(-1, 1, 1) / 1000
    return moved + inputs["timestep"].view(-1, 1, 1) / 1000 + inputs["ids"].sum() / 100


def by_hand(seed, scale, labels=(3, 4)):
    """What ``small_program`` computes, written out."""
    generator = torch.Generator().manual_seed(seed)
    images = len(labels)
    cond, uncond = (torch.tensor(each).view(-1, 1, 1) / 1000 for each in (labels, [1000] * images))
    start = torch.randn(images, 3, 2, generator=generator).transpose(1, 2)

    def outputs(x, time_cond, time_uncond):
        return tuple(x * 2 + each + time / 1000 + 0.1 for each, time in ((cond, time_cond), (uncond, time_uncond)))

    c, u = outputs(2 * start, 900, 900)
    clamped = (start + 0.5 * (u + scale * (c - u))).clamp(-1, 1)
    sample = 0.5 * clamped + 0.25 * torch.randn(images, 2, 3, generator=generator)
    c, u = outputs(sample, int(100 + scale), 100)
    return sample - (u + scale * (c - u))


@pytest.mark.parametrize("scale", [4.0, 2.5])
def test_replay_computes_what_the_program_says(scale):
    latents = replay(
        small_program(), torch.Generator().manual_seed(7), IDS, model, images=2, scales={"guidance_scale": scale}
    )
    assert latents.dtype is torch.float32
    torch.testing.assert_close(latents, by_hand(7, scale), rtol=1e-5, atol=1e-5)


def test_scales_are_those_of_the_probe_unless_they_are_chosen():
    latents = replay(small_program(), torch.Generator().manual_seed(7), IDS, model, images=2)
    torch.testing.assert_close(latents, by_hand(7, 4.0), rtol=1e-5, atol=1e-5)


def test_an_affine_number():
    assert value_of((1.0, 2.0, 3.0), (10.0, 100.0)) == 321.0
    assert value_of((1.0,), (10.0, 100.0)) == 1.0
    assert value_of((), (10.0,)) == 0.0


def test_a_view_takes_the_elements_that_it_names():
    rows = torch.arange(24.0).view(2, 12)
    assert View((2, 3), (1, 2), 5).take(rows).tolist() == [[5, 7, 9, 6, 8, 10], [17, 19, 21, 18, 20, 22]]


@pytest.mark.parametrize(
    "place",
    [
        torch.arange(24),
        torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(384).view(4, 4, 2, 6, 2).permute(1, 3, 0, 2, 4),
        torch.arange(24)[12:],
        torch.arange(24).view(4, 6)[:, :2],
        torch.zeros(1, dtype=torch.int64) + 3,
    ],
)
def test_a_view_is_found_from_the_places_of_elements(place):
    place = place.flatten()
    view = View.of(place)
    assert torch.equal(view.take(torch.arange(place.max() + 1).unsqueeze(0))[0], place)
    assert len(view.sizes) <= 5


@pytest.mark.parametrize("place", [torch.arange(6).flip(0), torch.tensor([0, 1, 3, 2]), torch.tensor([0, 1, 4, 9])])
def test_an_order_that_no_view_makes(place):
    assert View.of(place) is None


def test_noise_may_come_from_a_function():
    asked = []

    def noise(draw, images):
        asked.append((draw.groups * images, *draw.shape))
        return torch.zeros(asked[-1])

    replay(small_program(), noise, IDS, model, images=2)
    assert asked == [(2, 3, 2), (2, 2, 3)]


def test_draws_of_the_pipeline_without_a_generator_come_from_torchs_own():
    program = small_program()
    program = replace(
        program,
        operations=tuple(
            replace(each, seeded=False) if isinstance(each, Draw) else each for each in program.operations
        ),
    )
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in (7, 7, 8):
            torch.manual_seed(seed)
            found.append(replay(program, generator, IDS, model, images=2))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(generator.get_state(), before)


def test_the_callback_sees_every_step_and_can_end_it():
    seen = []
    latents = replay(
        small_program(),
        torch.Generator().manual_seed(7),
        IDS,
        model,
        images=2,
        callback=lambda step, steps, preview: seen.append((step, steps, preview.float())),
    )
    assert [each[:2] for each in seen] == [(1, 2), (2, 2)]
    assert seen[0][2].shape == (2, 2, 3)
    assert torch.equal(seen[-1][2], latents)
    calls = []
    with pytest.raises(SamplingCancelledError, match="after step 1 of 2"):
        replay(
            small_program(),
            torch.Generator(),
            IDS,
            lambda *given: calls.append(1) or model(*given),
            images=2,
            callback=lambda *_: False,
        )
    assert len(calls) == 1


def test_values_are_let_go_when_nothing_reads_them_any_more():
    program = small_program()
    assert program.last_uses == {2: (0, 1), 4: (2, 3), 6: (4, 5)}
    assert len(program.calls) == len(program.draws) == 2
    assert program.elements == 6


MISUSES = {
    "half": ({"conditioning": {}}, "needs labels of the cond half"),
    "shape": ({"conditioning": {"cond": {**IDS["cond"], "labels": torch.zeros(3)}}}, r"has the shape \(3,\)"),
    "images": ({"images": 0}, "at least one"),
    "unknown scale": ({"scales": {"guidance": 2.0}}, "the program has guidance_scale"),
    "baked scale": ({"scales": {"true_cfg_scale": 2.0}}, "baked as 1"),
    "no number": ({"scales": {"guidance_scale": float("nan")}}, "finite"),
    "guidance off": ({"scales": {"guidance_scale": 1.0}}, "above 1"),
    "noise": ({"noise": lambda draw, images: torch.zeros(1)}, "noise of the shape"),
    "output": ({"call": lambda *_: torch.zeros(1, 2)}, "where the program has"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_what_does_not_fit_is_refused(name):
    change, message = MISUSES[name]
    given = {"noise": torch.Generator(), "conditioning": IDS, "call": model, "images": 2, **change}
    with pytest.raises(ReplayError, match=message):
        replay(small_program(), **given)


def test_a_number_of_images_that_is_fixed_holds():
    program = small_program(images=1)
    with pytest.raises(ReplayError, match="exactly 1"):
        replay(program, torch.Generator(), IDS, model, images=2)


# --- as JSON ---------------------------------------------------------------------------------------------------------


@given(programs())
def test_programs_read_back_as_they_were_written(program):
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_a_program_is_small():
    assert len(json.dumps(small_program().to_json())) < 3000


def replaced(program, index, operation):
    return (*program.operations[:index], operation, *program.operations[index + 1 :])


ONE = (1.0,)
CONTRADICTIONS = {
    "a value that is not made yet": (lambda p: {"operations": replaced(p, 4, Sample(((Term(4, 0, ONE),),)))}, "only 4"),
    "a value before all": (lambda p: {"operations": replaced(p, 4, Sample(((Term(-1, 0, ONE),),)))}, "value -1"),
    "a group that is not there": (lambda p: {"final": (Term(6, 1, ONE),)}, "group 1"),
    "too many slopes": (lambda p: {"final": (Term(6, 0, (1.0, 1.0, 1.0)),)}, "2 slopes"),
    "no number": (lambda p: {"final": (Term(6, 0, (float("nan"),)),)}, "not finite"),
    "steps": (lambda p: {"steps": 3}, "has 2 samples"),
    "no steps": (lambda p: {"steps": 0}, "at least 1"),
    "no images": (lambda p: {"images": 0}, "at least 1"),
    "nothing comes out": (lambda p: {"final": ()}, "final is empty"),
    "an error that is none": (lambda p: {"error": -1.0}, "error is -1"),
    "a scale twice": (lambda p: {"baked": p.scales}, "twice"),
    "a form twice": (lambda p: {"forms": p.forms * 2}, "twice"),
    "an unknown form": (lambda p: {"operations": replaced(p, 1, replace(p.operations[1], form=1))}, "there are 1"),
    "another step": (lambda p: {"operations": replaced(p, 5, replace(p.operations[5], step=0))}, "1 samples stand"),
    "too few groups": (
        lambda p: {"operations": replaced(p, 1, replace(p.operations[1], inputs=p.operations[1].inputs[:1]))},
        "has 1 groups",
    ),
    "too few values": (lambda p: {"operations": replaced(p, 1, replace(p.operations[1], values=()))}, "has 0 values"),
    "too few numbers": (
        lambda p: {"operations": replaced(p, 1, replace(p.operations[1], values=((ONE,),)))},
        "1 numbers for timestep",
    ),
    "no clamp": (
        lambda p: {"operations": replaced(p, 2, Clamp(p.operations[2].inputs, None, None))},
        "on neither side",
    ),
    "a clamp that crosses": (
        lambda p: {"operations": replaced(p, 2, Clamp(p.operations[2].inputs, 1.0, -1.0))},
        "which cross",
    ),
    "a view out of its row": (
        lambda p: {"operations": replaced(p, 0, Draw(1, (3, 2), "float32", True, View((2, 3), (1, 3))))},
        "within",
    ),
    "a view backwards": (
        lambda p: {"operations": replaced(p, 0, Draw(1, (3, 2), "float32", True, View((6,), (-1,), 5)))},
        "negative",
    ),
    "no view where one is needed": (
        lambda p: {"operations": replaced(p, 0, Draw(1, (3, 2), "float32", True))},
        "is missing",
    ),
    "a dtype that is none": (
        lambda p: {"operations": replaced(p, 3, Draw(1, (2, 3), "float31", True))},
        "float31",
    ),
    "a size of 0": (lambda p: {"shape": (0, 3)}, "at least 1"),
    "an input twice": (
        lambda p: {"forms": (replace(p.forms[0], values=(replace(p.forms[0].values[0], name="labels"),)),)},
        "an input twice",
    ),
    "numbers that do not fill": (
        lambda p: {
            "forms": (
                replace(
                    p.forms[0],
                    conditions=(
                        replace(
                            p.forms[0].conditions[0],
                            rows=(
                                p.forms[0].conditions[0].rows[0],
                                replace(p.forms[0].conditions[0].rows[1], numbers=(1.0, 2.0)),
                            ),
                        ),
                    ),
                ),
            )
        },
        "fill a fixed row",
    ),
    "rows missing": (
        lambda p: {
            "forms": (
                replace(
                    p.forms[0],
                    conditions=(replace(p.forms[0].conditions[0], rows=p.forms[0].conditions[0].rows[:1]),),
                ),
            )
        },
        "must have 2",
    ),
    "no groups": (lambda p: {"operations": replaced(p, 3, Draw(0, (2, 3), "float32", True))}, "0 groups"),
    "a sample without rows": (
        lambda p: {"forms": (replace(p.forms[0], sample=replace(p.forms[0].sample, batched=False)),)},
        "not batched",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_program_that_contradicts_itself_is_refused(name):
    change, message = CONTRADICTIONS[name]
    program = small_program()
    with pytest.raises(ProgramFormatError, match=message):
        replace(program, **change(program))


def test_two_thousand_damaged_programs_are_refused_or_equal():
    """Under the old digest; then, with the digest made to fit, what is read must be whole: it reads back again."""
    from difa_compile.bundle.program import PROGRAM

    program = small_program()
    document = program.to_json()
    content = {key: value for key, value in document.items() if key not in ("digest", "schema_version")}
    read, messages = 0, []
    for seed in range(1000):
        try:
            assert Program.from_json(edited(document, seed)) == program
        except ProgramFormatError as error:
            messages.append(str(error))
    for seed in range(1000):
        damaged = edited(content, seed)
        try:
            framed = PROGRAM.frame(damaged) if isinstance(damaged, dict) else damaged
        except (ValueError, TypeError):  # what JSON cannot say, or keys that do not sort
            continue
        try:
            found = Program.from_json(framed)
        except ProgramFormatError as error:
            messages.append(str(error))
            continue
        read += 1
        assert Program.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert read > 10, "some changes of numbers make other programs"
    assert max(map(len, messages)) < 1200


def test_another_version_is_refused():
    document = {**small_program().to_json(), "schema_version": 2}
    with pytest.raises(ProgramFormatError, match="version"):
        Program.from_json(document)


def test_a_replay_needs_no_diffusers():
    code = """
import json, sys, torch
from difa_compile.bundle.program import Program, replay
program = Program.from_json(json.loads(sys.stdin.read()))
def model(form, operation, inputs):
    rows = inputs["hidden_states"]
    return torch.cat([rows, rows], 1)
given = {"cond": {"labels": torch.tensor([3]), "ids": torch.zeros(5)}}
latents = replay(program, torch.Generator().manual_seed(0), given, model)
assert latents.shape == (1, 2, 3)
print(sorted({name.split(".")[0] for name in sys.modules} & {"diffusers", "transformers", "accelerate"}))
"""
    text = json.dumps(small_program().to_json())
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_scale_that_may_be_below_one():
    program = small_program(scales=(Scale("guidance_scale", 4.0, None),))
    latents = replay(program, torch.Generator().manual_seed(7), IDS, model, images=2, scales={"guidance_scale": 0.5})
    torch.testing.assert_close(latents, by_hand(7, 0.5), rtol=1e-5, atol=1e-5)
