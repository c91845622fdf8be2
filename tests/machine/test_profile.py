"""Profiles: work that is counted, seconds predicted, files that are damaged or of another machine."""

import json
from dataclasses import replace

import pytest
import torch

from difa_compile.decision import FULL, REUSE, Decision, Window
from difa_compile.errors import OutputError
from difa_compile.layout import Layout
from difa_compile.machine.profile import (
    ELEMENTWISE,
    Fit,
    FullCall,
    Machine,
    Profile,
    Sample,
    current,
    elementwise_work,
    linear_work,
    local_work,
    machine_name,
    machines_here,
)
from difa_compile.ops.kernels import LocalCall, LocalKernel, choose_kernel
from difa_compile.ops.pairs import visible_pairs
from difa_compile.plan.cost import Setting, cost_breakdown, plan_seconds, seconds_text, site_seconds
from difa_compile.plan.data import Cell, ModelInfo, Settings, SiteInfo
from difa_compile.plan.plan import Plan
from difa_compile.plan.schedule import HeadCache, Role, uniform_progress
from difa_compile.plugins import cpu
from tests.support.profiles import made_up

SITE = SiteInfo("blocks.0.attn1", "self", 4, 8, 24, 32, Layout((4, 6)))
SETTING = Setting(2, torch.float32, torch.device("cpu"))
BAND = Window("band", 2)


def call(layout=SITE.layout, window=BAND, batch=1, heads=1, dim=8, dtype=torch.float32):
    return LocalCall(layout, window, None, (batch, heads, layout.tokens, dim), dtype, torch.device("cpu"))


# --- work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["all", "image"])
@pytest.mark.parametrize(
    ("layout", "window"),
    [
        (Layout((16, 16)), Window("disc", 4)),
        (Layout((7, 9), 3, 2), Window("box", 2)),
        (Layout((3, 8, 8), 0, 5), Window("disc", 3)),
        (Layout((20, 13), 4), Window("band", 20)),
        (Layout((5, 5)), Window("disc", 9)),
    ],
    ids=str,
)
def test_the_cpu_kernel_goes_through_the_visible_pairs_and_no_more_than_whole_tiles_over_all_keys(
    layout, window, queries
):
    tokens = layout.tokens if queries == "all" else layout.image_tokens
    asked = replace(call(layout, window), shape=(1, 1, tokens, 8))
    if reason := cpu.why_not(asked):
        pytest.skip(f"the CPU kernel cannot run here: {reason}")
    pairs, keys = cpu.work(asked)
    assert visible_pairs(layout, window, tokens) <= pairs
    tiles = keys / layout.tokens
    assert pairs // keys in (16, 32, 64)
    assert 0 < tiles <= tokens


def test_a_kernel_that_does_not_say_is_taken_to_go_through_the_visible_pairs():
    kernel = LocalKernel("plain", lambda call: None, lambda *rest: None)
    work = local_work(kernel, call(batch=3, heads=2))
    assert work["pairs"] == 6 * visible_pairs(SITE.layout, BAND, 24)


def test_work_adds_up_over_batch_and_heads():
    one, many = FullCall(1, 1, 64, 96, 16).work, FullCall(3, 4, 64, 96, 16).work
    assert all(many[kind] == 12 * one[kind] for kind in one if kind != "calls")
    grouped = FullCall(3, 4, 64, 96, 16, key_heads=2).work
    assert grouped["keys x dims"] == many["keys x dims"] / 2
    assert grouped["multiply_adds"] == many["multiply_adds"]


# --- predicting ------------------------------------------------------------------------------------------------------


def projections(batch):
    return 4e-9 * batch * 24 * 32 * 32


def test_seconds_of_every_kind_of_role():
    profile = made_up(full=1e-6, window=1e-7, elements=1e-9)
    kernel = choose_kernel(call())
    pairs = local_work(kernel, call(batch=2, heads=4))["pairs"]
    full, local = 1e-6 * 2 * 4 * 24 * 24, 1e-7 * pairs
    residual, copy = 1e-9 * 3 * 2 * 24 * 32 * 4, 1e-9 * 1.5 * 2 * 24 * 32 * 4

    def seconds(role):
        return site_seconds(Decision.parse(role) if isinstance(role, str) else role, SITE, SETTING, profile)

    assert seconds(REUSE) == seconds("reuse+cfg") == 0
    assert seconds(FULL) == pytest.approx(projections(2) + full)
    assert seconds("window(band:2)") == pytest.approx(projections(2) + local)
    assert seconds("window(band:2)+residual") == pytest.approx(projections(2) + local + residual)
    assert seconds("full+cfg") == pytest.approx(projections(1) + full / 2 + copy)
    assert seconds("window(band:2)+residual+cfg") == pytest.approx(projections(1) + local / 2 + residual / 2 + copy)
    taking = Role(FULL, emit_residual=True, residual_window=BAND)
    assert seconds(taking) == pytest.approx(projections(2) + full + local + residual)


def test_seconds_of_groups_of_heads():
    profile = made_up(full=1e-6, window=1e-7, elements=1e-9)
    full, local = 1e-6 * 2 * 24 * 24, 1e-7 * local_work(choose_kernel(call()), call(batch=2))["pairs"]  # of a head
    written = 1e-9 * 2 * 24 * 8 * 4  # of a head

    def seconds(role):
        return site_seconds(Decision.parse(role) if isinstance(role, str) else role, SITE, SETTING, profile)

    assert seconds("heads(0,2:full;1:window(band:2);3:reuse)") == pytest.approx(
        projections(2) + 2 * full + local + 4 * written * 2
    )
    assert seconds("heads(0-2:window(band:2)+residual;3:reuse)") == pytest.approx(
        projections(2) + 3 * local + 4 * written * 2 + 3 * written
    )
    copy = 1e-9 * 1.5 * 2 * 24 * 32 * 4
    assert seconds("heads(0-2:full;3:reuse)+cfg") == pytest.approx(projections(1) + 3 * full / 2 + 4 * written + copy)
    taking = Role(FULL, head_writes=(HeadCache((0, 2), BAND), HeadCache((1,))))
    assert seconds(taking) == pytest.approx(projections(2) + 4 * full + 2 * local + 6 * written + 2 * written)
    grouped = site_seconds(Decision.parse("heads(0:full;1-3:reuse)"), SITE, replace(SETTING, key_heads=2), profile)
    assert grouped == pytest.approx(projections(2) + full + 4 * written * 2)
    slow = made_up(full=1e-6, window=1e-7, elements=1e-9, call=1.0)
    assert site_seconds(Decision.parse("heads(0,1,3:window(band:2);2:full)"), SITE, SETTING, slow) > 2, "two slices"


def test_nothing_is_predicted_of_what_was_not_measured():
    profile = made_up()
    assert site_seconds(FULL, SITE, replace(SETTING, dtype=torch.bfloat16), profile) is None
    assert site_seconds(FULL, SITE, replace(SETTING, masked=True), profile) is None
    assert profile.local_seconds(replace(call(), masked=True)) is None
    without = replace(profile, fits=tuple(fit for fit in profile.fits if not fit.operation.startswith("local")))
    assert site_seconds(Decision.parse("window(band:2)"), SITE, SETTING, without) is None
    assert site_seconds(FULL, SITE, SETTING, without) is not None


def test_a_window_without_a_layout_takes_what_the_full_attention_takes_that_will_run():
    bare = replace(SITE, layout=None)
    profile = made_up()
    windowed = site_seconds(Decision.parse("window(band:2)"), bare, SETTING, profile)
    assert windowed == site_seconds(FULL, bare, SETTING, profile)


def test_new_memory_costs_only_where_a_result_is_large():
    cpu_, cuda = torch.device("cpu"), torch.device("cuda")
    assert elementwise_work(2**10, torch.float32, cpu_, 2)["fresh bytes"] == 0
    assert elementwise_work(2**24, torch.float32, cpu_, 2)["fresh bytes"] == 2**26
    assert elementwise_work(2**24, torch.float32, cuda, 2)["fresh bytes"] == 0
    assert elementwise_work(2**10, torch.bfloat16, cpu_, 0.5)["bytes"] == 3 * 2**10
    assert linear_work(8, 4, 2)["multiply_adds"] == 64


def plan(*decisions):
    rows = tuple((Cell(Decision.parse(text)),) for text in decisions)
    settings_ = Settings(method="rule", guidance="batched", conditional_half=0)
    return Plan(ModelInfo("M", "0" * 64, 1), settings_, (SITE,), uniform_progress(len(rows)), rows)


def test_a_plan_shows_its_predicted_time_if_there_is_a_profile():
    profile = made_up(full=1e-6, window=1e-7, tokens=16)
    made = plan("full", "window(band:2)+residual", "reuse")
    found = plan_seconds(made, profile, torch.float32, 2)
    parts = [site_seconds(role, SITE, SETTING, profile) for (role,) in made.roles]
    assert found.planned == pytest.approx(sum(parts))
    assert found.full == pytest.approx(3 * site_seconds(FULL, SITE, SETTING, profile))
    assert found.extrapolated
    share = f"{100 * found.planned / found.full:.1f} % of full"
    line = next(line for line in made.summary(profile).splitlines() if "predicted time, float32" in line)
    assert share in line
    assert "batch of 2, extrapolated" in line
    assert "predicted" not in made.summary()
    assert cost_breakdown(made).seconds == ()


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14e-5, "31.4 µs"), (0.00314, "3.14 ms"), (0.99999, "1 s"), (12.3, "12.3 s")]
)
def test_seconds_are_written_with_a_unit(seconds, text):
    assert seconds_text(seconds) == text


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(profile_at):
    path = profile_at(full=0.1 + 0.2)
    assert Profile.load(path) == made_up(full=0.1 + 0.2)
    assert current("cpu") == made_up(full=0.1 + 0.2)
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_profiles_are_kept_under_a_name_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFA_PROFILE")
    monkeypatch.setenv("DIFA_CACHE_DIR", str(tmp_path))
    assert current("cpu") is None
    path = made_up().save()
    assert path.parent == tmp_path
    assert current("cpu") == made_up()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert current("cpu") is None
    finally:
        torch.set_num_threads(threads)


def test_off_means_off(profile_at, monkeypatch):
    profile_at()
    monkeypatch.setenv("DIFA_PROFILE", "off")
    assert current("cpu") is None
    with pytest.raises(OutputError, match="DIFA_PROFILE is off"):
        made_up().save()


def damaged(text):
    content = json.loads(text)
    yield "cut off", text[: len(text) // 2]
    yield "no JSON", "profile"
    yield "another thing", "[]"
    yield "a field is missing", json.dumps({key: value for key, value in content.items() if key != "fits"})
    yield "edited", text.replace('"pairs": 0.1', '"pairs": 0.2', 1)
    content["profile_version"] = 99
    yield "a later version", json.dumps(content)


def test_a_damaged_profile_is_told_and_ignored(profile_at):
    path = profile_at()
    whole = path.read_text()
    for case, text in damaged(whole):
        assert text != whole, case
        path.write_text(text)
        with pytest.warns(UserWarning, match=r"profile\.json .* It is ignored: .* Run difa tune"):
            assert current("cpu") is None, case
    path.unlink()
    with pytest.warns(UserWarning, match="cannot be read: No such file"):
        assert current("cpu") is None


def test_another_machines_profile_is_told_and_ignored(profile_at):
    here = Machine.here("cpu")
    profile_at(machine=replace(here, threads=here.threads + 3, kernels="0"))
    expected = rf"measured elsewhere: threads {here.threads + 3}, here {here.threads}; other kernels\. It is ignored"
    with pytest.warns(UserWarning, match=expected):
        assert current("cpu") is None


def test_a_newer_measurement_replaces_only_what_it_measured():
    old, new = made_up(full=1.0), made_up(full=2.0)
    half = replace(old, fits=tuple(replace(fit, dtype="bfloat16") for fit in new.fits))
    both = old.updated(half)
    assert both.dtypes == (torch.float32, torch.bfloat16)
    assert len(both.fits) == 2 * len(old.fits)
    assert old.updated(new) == new


def test_work_counted_in_whole_numbers_survives_the_file(tmp_path):
    """A file gives floating-point numbers back, and the digest must be the same."""
    fit = Fit(
        ELEMENTWISE,
        "float32",
        {"calls": 0, "bytes": 1e-10},
        (Sample("a copy", {"calls": 1, "bytes": 4096}, 64, 1e-6),),
        (0,),
    )
    profile = Profile(Machine.here("cpu"), "2026-01-01T00:00:00+00:00", (fit,))
    assert Profile.load(profile.save(tmp_path / "profile.json")) == profile


def test_machines_are_named_and_those_that_are_here_known():
    assert machine_name("cpu") == str(Machine.here("cpu"))
    assert machines_here()[0] == machine_name("cpu")
    assert len(set(machines_here())) == len(machines_here())
    assert "(meta)" in machine_name("meta")  # of which there can be no profile
