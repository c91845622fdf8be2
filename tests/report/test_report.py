"""The report page: what it says, that it stands alone, that it is written whole or not at all."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from difa_compile.decision import FULL, REUSE, Decision
from difa_compile.errors import OutputError
from difa_compile.files.writing import write_whole
from difa_compile.plan.plan import Cell, Plan, Trial
from difa_compile.report import check_writable, describe_machine, describe_versions, write_report
from difa_compile.report.charts import nice_step, step_chart
from difa_compile.report.heatmap import heat_map
from difa_compile.report.pictures import amplification, data_uri, difference
from difa_compile.report.view import flops, seconds, size
from tests.support.report_sample import MACHINE, make_comparison, make_plan

VOID = {"meta", "link", "img", "br", "col", "input", "line", "rect"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def plan():
    return make_plan()


@pytest.fixture(scope="module")
def comparison(plan):
    return make_comparison(plan)


@pytest.fixture(scope="module")
def path(plan, comparison, tmp_path_factory):
    return write_report(
        tmp_path_factory.mktemp("report") / "made" / "here",
        plan=plan,
        comparison=comparison,
        records=comparison.records,
        title="Digits <faster> & better",
        machine=MACHINE,
        versions={"torch": "2.13.0"},
        command="difa demo --steps 50",
        captions=[f"digit {index % 10}" for index in range(20)],
    )


@pytest.fixture(scope="module")
def page(path):
    return read(path)


def test_path_and_nothing_else_in_the_folder(path):
    assert path.name == "index.html"
    assert list(path.parent.iterdir()) == [path]


def test_loads_nothing_from_elsewhere(page, path):
    references = [
        attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset", "action") if name in attrs
    ]
    assert len(references) > 30
    assert all(reference.startswith(("data:", "#")) for reference in references)
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?:|//cdn|fetch\(|XMLHttp", source)


def test_title_is_escaped(page, path):
    assert "<title>Digits &lt;faster&gt; &amp; better</title>" in path.read_text(encoding="utf-8")
    assert "Digits <faster> & better" in page.text


def test_headlines_state_what_was_measured(page, comparison):
    assert comparison.speedup == pytest.approx(1.62 / 1.05)
    assert "Speed-up over full attention 1.54×" in page.text
    assert f"Attention FLOPs computed {100 * comparison.with_projections.share:.0f} % of full" in page.text
    assert "Images against full, PSNR 33.9 dB" in page.text
    assert "Classifier agreement 95.7 %" in page.text


def test_a_slower_plan_is_called_slower(plan, comparison, tmp_path):
    slow = replace(comparison, planned=replace(comparison.planned, calls=(2.0, 2.0, 2.0)))
    text = write(tmp_path, plan, slow).text
    assert "Speed against full attention 0.81×" in text
    assert "Speed-up" not in text


def test_tables_hold_every_metric(page):
    for words in (
        "PSNR, worst – – 27.20 dB",
        "SSIM, mean – – 0.9720",
        "Fréchet distance – – 0.840",
        "to real images 5.310 5.620",
        "classifier reads the same – – 95.7 %",
        "classifier reads the class asked for 98.4 % 97.6 %",
        "first call, compilation included 31.2 s 48.7 s",
        "cache memory, at most 0 B 1.88 MiB",
    ):
        assert words in page.text


def test_origin_names_machine_versions_and_command(page, plan):
    for words in ("difa demo --steps 50", "A CPU @ 2.00 GHz", "2.13.0", plan.digest[:16], "window(band:32)+residual"):
        assert words in page.text


def test_summary_of_the_plan_is_there(page, plan):
    assert re.sub(r"\s+", " ", plan.summary().strip()) in page.text


def test_skip_is_listed_once_with_its_reason(plan, comparison, tmp_path):
    skips = [record for record in comparison.records if record.outcome == "skipped"]
    text = write(tmp_path, plan, comparison, records=[*comparison.records, *skips]).text
    assert text.count(skips[0].reason) == 1


def test_no_skips_is_said(plan, comparison, tmp_path):
    carried_out = [record for record in comparison.records if record.outcome != "skipped"]
    assert f"None: all {len(carried_out)} decisions" in write(tmp_path, plan, comparison, records=carried_out).text


def write(folder, plan, comparison, records=None, **more):
    kept = comparison.records if records is None else records
    made = write_report(folder, plan=plan, comparison=comparison, records=kept, title="t", machine={}, **more)
    return read(made)


# --- heat map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "sites"), [(1, 1), (20, 6), (50, 57)])
def test_heat_map_has_one_cell_per_step_and_site(steps, sites, tmp_path):
    made = make_plan(steps, sites)
    tags = write(tmp_path, made, make_comparison(made, images=10)).all("td")
    assert sum("title" in attrs for attrs in tags) == steps * sites


def test_cell_tells_the_losses_of_every_tried_candidate(plan):
    made = heat_map(plan)
    step, site = next(
        (step, site) for step in range(50) for site in range(6) if len(plan.rows[step][site].trials) == 4 and site != 2
    )
    cell = plan.rows[step][site]
    lines = made.rows[site].cells[step].text.split("\n")
    assert lines[0] == f"step {step} · transformer_blocks.{site}.attn1"
    assert lines[1] == str(cell.decision)
    assert f"{100 * cell.flops_saved:.0f}\u00a0%" in lines[2] or "saves nothing" in lines[2]
    assert len(lines) == 3 + 4
    for line, trial in zip(lines[3:], cell.trials, strict=True):
        name, loss, limit, verdict = line.split("\t")
        assert name == str(trial.decision)
        assert float(loss.removeprefix("loss ")) == pytest.approx(trial.loss, rel=5e-3)
        assert float(limit.removeprefix("limit ")) == pytest.approx(trial.threshold, rel=5e-3)
        assert (verdict == "over the limit") == (trial.loss >= trial.threshold)


def test_the_plan_says_how_its_cells_were_chosen(plan):
    assert "Each cell is the first candidate, in the order tried" in heat_map(plan).intro
    weighed = replace(plan, settings=replace(plan.settings, method="weighed"))
    assert "Each cell is the candidate with the lowest sum of cost" in heat_map(weighed).intro
    by_hand = replace(plan, settings=replace(plan.settings, method="rule"))
    assert "nothing was measured" in heat_map(by_hand).intro


def test_cell_tells_the_cost_where_it_was_weighed(plan):
    decision = Decision.parse("full+cfg")
    trials = (Trial(REUSE, 0.05, 0.1, cost=0.0), Trial(decision, 0.06, 0.1, cost=0.5), Trial(FULL, 0.2, 0.1, cost=1.0))
    cell = Cell(REUSE, trials, 1.0)
    weighed = replace(plan, rows=(plan.rows[0], (cell, *plan.rows[1][1:]), *plan.rows[2:]))
    lines = heat_map(weighed).rows[0].cells[1].text.split("\n")[3:]
    assert lines == [
        "reuse\tloss 0.05\tlimit 0.1, takes 0\u00a0%\tchosen",
        "full+cfg\tloss 0.06\tlimit 0.1, takes 50\u00a0%\tsaves too little for it",
        "full\tloss 0.2\tlimit 0.1, takes 100\u00a0%\tover the limit",
    ]


def test_cell_tells_why_a_candidate_does_not_apply(plan):
    texts = [cell.text for cell in heat_map(plan).rows[2].cells]
    assert any("a mask stands on this attention\t\tnot tried" in text for text in texts)


def test_each_decision_has_a_colour_of_its_own_and_its_count(plan):
    windows = [Decision.parse(f"window(band:{radius})") for radius in (8, 16, 32)]
    rows = [[FULL] * 6, [*windows, *windows]]
    cells = tuple(tuple(replace(plan.rows[0][0], decision=decision) for decision in row) for row in rows)
    made = heat_map(Plan(plan.model, plan.settings, plan.sites, (1.0, 0.5), cells))
    assert [(colour.name, colour.count) for colour in made.colours] == [
        ("full", 6),
        ("window(band:8)", 2),
        ("window(band:16)", 2),
        ("window(band:32)", 2),
    ]
    for mode in ("light", "dark"):
        assert len({getattr(colour, mode) for colour in made.colours}) == 4


def test_rule_plans_do_not_claim_measurements(plan):
    by_rule = replace(plan, settings=replace(plan.settings, method="rule", threshold=None, loss=None, candidates=()))
    assert "nothing was measured" in heat_map(by_rule).intro


# --- images ----------------------------------------------------------------------------------------------------------


def decode(uri):
    kind, data = uri.split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_images_are_shown_exactly(page, comparison):
    uris = [attrs["src"] for attrs in page.all("img")]
    assert len(uris) == 3 * 20
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert np.array_equal(np.array(decode(uris[3])), comparison.images_full[1, :, :, 0])
    assert np.array_equal(np.array(decode(uris[4])), comparison.images_planned[1, :, :, 0])
    shown = np.array(decode(uris[5])).astype(int)
    apart = abs(comparison.images_full[1, :, :, 0].astype(int) - comparison.images_planned[1, :, :, 0])
    factor = int(re.search(r"difference ×(\d+)", page.text)[1])
    assert np.abs(shown - np.minimum(255, apart * factor)).max() <= 1


def test_psnr_of_each_image(page, comparison):
    full, planned = comparison.images_full[1] / 255, comparison.images_planned[1] / 255
    expected = -10 * np.log10(((full - planned) ** 2).mean())
    assert f"digit 1 · seed 0, image 1 PSNR {expected:.1f} dB" in page.text
    assert "digit 0 · seed 0, image 0 equal" in page.text
    assert "digit 1 · seed 1, image 1" in page.text


def test_large_images_are_made_smaller():
    picture = decode(data_uri(torch.rand(3, 600, 900)))
    assert picture.size == (512, 341)
    assert picture.mode == "RGB"


def test_images_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"not \(2, 8, 8\)"):
        data_uri(torch.zeros(2, 8, 8))


@pytest.mark.parametrize(("largest", "factor"), [(0.0, 50), (0.019, 50), (0.09, 10), (0.3, 2), (0.9, 1)])
def test_amplification_does_not_clip(largest, factor):
    full = torch.zeros(2, 1, 16, 16)
    planned = full + torch.linspace(0, largest, 512).view_as(full)
    assert amplification(full, planned) == factor
    assert difference(full, planned, factor).max() == pytest.approx(largest * factor)


def test_equal_images_are_said_to_be_equal(plan, comparison, tmp_path):
    quality = replace(comparison.quality, identical=20, psnr=None, psnr_worst=None)
    same = replace(comparison, images_planned=comparison.images_full, quality=quality)
    assert "all 20 images are equal to the last bit" in write(tmp_path, plan, same).text


def test_captions_must_fit(plan, comparison, tmp_path):
    with pytest.raises(ValueError, match="3 captions for 20 images"):
        write(tmp_path, plan, comparison, captions=["a", "b", "c"])
    assert list(tmp_path.iterdir()) == []


def test_without_a_judge_the_cache_stands_in_front(plan, comparison, tmp_path):
    bare = replace(
        comparison,
        quality=replace(
            comparison.quality,
            frechet=None,
            frechet_full=None,
            frechet_planned=None,
            judged_right_full=None,
            judged_right_planned=None,
            agreement=None,
        ),
    )
    text = write(tmp_path, plan, bare).text
    assert "Cache memory 1.88 MiB" in text
    assert "classifier" not in text.lower()


def test_other_step_count_than_the_plan_is_said(plan, tmp_path):
    made = replace(make_comparison(make_plan(20), images=10), plan_digest=plan.digest)
    assert "The plan was made for 50 steps and carried onto 20." in write(tmp_path, plan, made).text


# --- charts and numbers ----------------------------------------------------------------------------------------------


def test_chart_bars_are_as_high_as_the_numbers():
    made = step_chart("Time <ms>", "", [4.0, 4.0], [1.0, 2.0], lambda value: f"{value:g} ms")
    bars = re.findall(r'<rect class="(\w+)"[^>]* height="([\d.]+)"', made.svg)
    heights = [float(height) for _, height in bars]
    assert [name for name, _ in bars] == ["full", "plan"] * 2
    assert heights == pytest.approx([heights[0], heights[0] / 4, heights[0], heights[0] / 2], abs=0.02)
    assert "Time &lt;ms&gt;" in made.svg
    assert made.lines == (("0", "4 ms", "1 ms"), ("1", "4 ms", "2 ms"))


def test_chart_wants_pairs():
    with pytest.raises(ValueError, match="2 and 1 numbers"):
        step_chart("t", "", [1.0, 2.0], [1.0], str)


def test_chart_of_zeros():
    assert "NaN" not in step_chart("t", "", [0.0], [0.0], str).svg


@pytest.mark.parametrize(("value", "expected"), [(0, 1), (1, 1), (1.2, 2), (3, 5), (7, 10), (30, 50), (0.03, 0.05)])
def test_nice_step(value, expected):
    assert nice_step(value) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds(0.0316), "31.6 ms"),
        (seconds(0.9999), "1 s"),
        (seconds(1.234), "1.23 s"),
        (seconds(125), "2 min 05 s"),
        (flops(999.9e9), "1 TFLOP"),
        (flops(2.415e9), "2.42 GFLOP"),
        (flops(0), "0 FLOP"),
        (size(0), "0 B"),
        (size(1536), "1.5 KiB"),
        (size(1020 * 1024), "0.996 MiB"),
    ],
)
def test_numbers_are_written_with_three_digits(text, expected):
    assert text.replace("\u00a0", " ") == expected


# --- writing ---------------------------------------------------------------------------------------------------------


def test_folder_below_a_file(plan, comparison, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"the page cannot be written to .*index\.html: File exists; name a place"):
        write(tmp_path / "file", plan, comparison)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_read_only_file_system(plan, comparison):
    with pytest.raises(OutputError, match="cannot be written"):
        write("/proc/difa", plan, comparison)


def test_nothing_half_written_when_the_rename_fails(plan, comparison, tmp_path):
    (tmp_path / "index.html").mkdir()
    with pytest.raises(OutputError, match="a folder stands there"):
        write(tmp_path, plan, comparison)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "index.html"
    target.write_text("old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("difa_compile.files.writing.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, b"new", "the page")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_check_writable(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(OutputError):
        check_writable("/proc/difa")


def test_machine_and_versions_name_no_host():
    import platform

    machine, versions = describe_machine(), describe_versions()
    assert set(machine) >= {"processor", "cores", "memory", "system"}
    assert versions["torch"] == torch.__version__
    assert platform.node() not in " ".join(machine.values()).split()
