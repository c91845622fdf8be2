"""What a pipeline does with its prompts, as a graph: against what the pipeline gives its transformer."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pipelines of diffusers")
pytest.importorskip("transformers", reason="text encoders of whole pipelines")

from difa_compile.bundle.prompts import tokenizer_from, tokens_of
from difa_compile.errors import BeforeLoopError, NotAppliedError
from difa_compile.exporting import before_loop as module
from difa_compile.exporting.before_loop import before_loop
from difa_compile.exporting.probing import probe
from tests.support.image_cases import CASES
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.video_components import wan

CLOSE = 1e-5
INF, NAN = math.inf, math.nan
TEXTS = ("two small boats", " A grey HOUSE ", "", "boats and boats and boats and boats and boats")
"""Others than those on which an export tries itself."""


def prompted(name):
    case = CASES[name]
    inputs = {key: value[:1] if key.endswith("prompt") else value for key, value in case.inputs().items()}
    return case.make(), inputs


@pytest.fixture(scope="module")
def pixart():
    pipe, inputs = prompted("pixart_sigma")
    return pipe, inputs, probe(pipe, inputs, 2).program


@pytest.fixture(scope="module")
def encoded(pixart):
    return before_loop(*pixart)


def given_to_the_model(pipe, inputs, program, **texts):
    """The conditions of a pipeline's call, as its own probe sees them."""
    given = {name: [text] if isinstance(inputs["prompt"], list) else text for name, text in texts.items()}
    probed = probe(pipe, {**inputs, **given}, 2)
    assert probed.program.shape == program.shape
    return probed.conditioning


def check(pipe, inputs, program, found, texts=TEXTS):
    own = {encoder.half: encoder for encoder in found.prompts.encoders}
    for number, text in enumerate(texts):
        negative = {"negative_prompt": texts[number - 1]} if "uncond" in own else {}
        wanted = given_to_the_model(pipe, inputs, program, prompt=text, **negative)
        for half, encoder in own.items():
            tensors = {}
            for tokens in encoder.tokens:
                tokenizer = tokenizer_from(found.tokenizers[tokens.file], tokens.file)
                tensors |= tokens_of(tokenizer, texts[number - 1] if half == "uncond" else text, tokens)
            encoding = next(each for each in found.encodings if module.ENCODES[each.half] == encoder.row)
            results = encoding.program.module()(*(tensors[name] for name in encoding.inputs))
            for name, result in zip(encoding.outputs, results, strict=True):
                largest = wanted[half][name].abs().max().clamp_min(1e-30)
                assert (result - wanted[half][name]).abs().max() / largest < CLOSE, (half, name, text)


def test_texts_become_what_the_pipeline_gives_its_model(pixart, encoded):
    check(*pixart, encoded, TEXTS[:2])
    (encoding,) = encoded.encodings  # one for both halves
    assert set(encoding.outputs) == {"encoder_hidden_states", "encoder_attention_mask"}
    assert [(each.half, each.row) for each in encoded.prompts.encoders] == [
        ("cond", module.ENCODES["cond"]),
        ("uncond", module.ENCODES["cond"]),
    ]
    assert {name: text.default for name, text in encoded.prompts.texts.items()} == {
        "prompt": None,
        "negative_prompt": "blurred",
    }
    assert len(encoded.tokenizers) == 1
    assert all(tokens.steps == ("lower", "strip") for each in encoded.prompts.encoders for tokens in each.tokens)


def test_an_engine_is_of_one_half_alone(pixart, encoded):
    """Weights have their own names, none is read that only the other half's text needs, and none is baked."""
    pipe, _, _ = pixart
    (encoding,) = encoded.encodings
    graph = encoding.program.graph
    embedded = [n for n in graph.nodes if n.target is torch.ops.aten.embedding.default]
    assert len(embedded) == 2  # words and distances, once
    own = dict(pipe.text_encoder.named_parameters(prefix="text_encoder", remove_duplicate=False))
    assert set(encoding.program.state_dict) - set(encoding.constants) <= set(own)
    assert all(encoding.program.state_dict[name].numel() <= 64 for name in encoding.constants)
    assert encoding.constants
    assert not encoding.program.constants


def test_the_pipeline_is_left_as_it_was(pixart, encoded):
    pipe, inputs, program = pixart
    kind, disabled = type(pipe.tokenizer), logging.root.manager.disable
    module._Calls(pipe, inputs, program).seen({"prompt": "a"})
    assert type(pipe.tokenizer) is kind
    assert logging.root.manager.disable == disabled
    for each in (pipe, pipe.transformer, pipe.scheduler):
        assert {"forward", "step", "set_timesteps", "encode_prompt"}.isdisjoint(each.__dict__)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "texts"),
    [
        ("sd3", (), ["prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3"]),
        ("flux", (), ["prompt", "prompt_2"]),
        ("flux_true_cfg", (), ["prompt", "prompt_2", "negative_prompt", "negative_prompt_2"]),
        ("wan", ("unescape", "spaces", "strip"), ["prompt", "negative_prompt"]),
    ],
)
def test_pipelines(name, steps, texts, tmp_path):
    """Several encoders whose outputs are joined, guidance in two calls, embeddings cut to the length of the text."""
    if name == "wan":
        tiny = wan(tmp_path)
        left = {"generator", "output_type", "num_inference_steps"}
        pipe, inputs = tiny.pipe, {key: value for key, value in tiny.arguments.items() if key not in left}
    else:
        pipe, inputs = prompted(name)
    program = probe(pipe, inputs, 2).program
    found = before_loop(pipe, inputs, program)
    assert list(found.prompts.texts) == texts
    assert {text.follows for text in found.prompts.texts.values()} <= {"", "prompt", "negative_prompt"}
    assert all(tokens.steps == steps for each in found.prompts.encoders for tokens in each.tokens)
    check(pipe, inputs, program, found)


@pytest.mark.slow
def test_a_negative_prompt_that_was_not_given(pixart):
    """It is what the pipeline takes for it, and others can be given."""
    pipe, inputs, _ = pixart
    inputs = {name: value for name, value in inputs.items() if name != "negative_prompt"}
    program = probe(pipe, inputs, 2).program
    found = before_loop(pipe, inputs, program)
    assert found.prompts.texts["negative_prompt"].default == ""
    check(pipe, inputs, program, found, TEXTS[:2])


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([("", ""), (" A b ", " A b ")], ((), "", "")),
        ([("", ""), (" A b ", "a b")], (("lower", "strip"), "", "")),
        ([("", "Say: ."), (" A b", "Say:  A b.")], ((), "Say: ", ".")),
        ([("", ""), ("A b", "b A")], None),
        ([("", "x"), ("A b", "A b")], None),
        ([("a  b &lt;", "a b <"), ("C", "C")], (("unescape", "spaces"), "", "")),
    ],
)
def test_how_a_text_was_prepared(pairs, wanted):
    assert module._rule(pairs) == wanted


# What is refused


class Pads(type(CASES["pixart_sigma"].make().tokenizer)):
    """As long as the text."""

    def __call__(self, *arguments, **options):
        return super().__call__(*arguments, **{**options, "padding": "longest"})


def listed(text):
    return [text] if isinstance(text, str) else text


def changed(pipe, monkeypatch, change):
    """``change(embeddings, prompt)`` in what ``encode_prompt`` gives."""
    encode = type(pipe).encode_prompt

    def encode_prompt(self, prompt, *rest, **options):
        found = encode(self, prompt, *rest, **options)
        return (change(found[0], prompt[0]), *found[1:])

    monkeypatch.setattr(type(pipe), "encode_prompt", encode_prompt)


@pytest.mark.parametrize("prepare", [str.title, lambda text: text[::-1]])
def test_a_text_that_is_prepared_otherwise(pixart, monkeypatch, prepare):
    monkeypatch.setattr(type(pixart[0]), "_text_preprocessing", lambda _, text, **__: list(map(prepare, listed(text))))
    with pytest.raises(BeforeLoopError, match=r"none of the simple ways that are known .*clean_caption=False"):
        before_loop(*pixart)


def test_a_text_of_any_length(pixart, monkeypatch):
    pipe, inputs, _ = pixart
    inputs = {**inputs, "guidance_scale": 1.0}
    program = probe(pipe, inputs, 2).program
    monkeypatch.setattr(pipe.tokenizer, "__class__", Pads)
    with pytest.raises(BeforeLoopError, match="padded to a fixed length"):
        before_loop(pipe, inputs, program)


def test_what_follows_from_more_than_the_tokens(pixart, monkeypatch):
    """The length of the text in letters: a graph that was made for one text, and is wrong for others."""
    changed(pixart[0], monkeypatch, lambda embeddings, prompt: embeddings + len(prompt))
    with pytest.raises(BeforeLoopError, match="does not give what the pipeline gives"):
        before_loop(*pixart)


def test_what_cannot_be_traced(pixart, monkeypatch):
    changed(pixart[0], monkeypatch, lambda embeddings, _: embeddings * 2 if bool(embeddings.sum() > 0) else embeddings)
    with pytest.raises(BeforeLoopError, match="cannot be exported as one graph"):
        before_loop(*pixart)


def test_other_numbers_than_the_pipelines(pixart, monkeypatch):
    plain = module.tokens_of
    monkeypatch.setattr(module, "tokens_of", lambda *given: {key: each + 1 for key, each in plain(*given).items()})
    with pytest.raises(BeforeLoopError, match="makes other numbers of"):
        before_loop(*pixart)


def test_a_tokenizer_that_has_no_file(pixart, monkeypatch):
    monkeypatch.setattr(type(pixart[0].tokenizer), "backend_tokenizer", None)
    with pytest.raises(BeforeLoopError, match="not backed by the library tokenizers"):
        before_loop(*pixart)


def test_a_call_without_a_prompt(pixart):
    pipe, inputs, program = pixart
    for prompt in (None, ["a", "b"], 3):
        with pytest.raises(BeforeLoopError, match="has no prompt, or several"):
            before_loop(pipe, {**inputs, "prompt": prompt}, program)
    labels = tiny_pipeline()
    with pytest.raises(BeforeLoopError, match="no component that is a tokenizer"):
        before_loop(labels, {"prompt": "a"}, probe(labels, {"class_labels": [1]}, 2).program)


def test_a_call_that_fails(pixart):
    pipe, inputs, program = pixart
    with pytest.raises(BeforeLoopError, match="cannot be called with texts of ours"):
        before_loop(pipe, {**inputs, "height": 15}, program)


def test_a_planned_pipeline_is_refused(pixart, monkeypatch):
    monkeypatch.setattr(module, "wiring_of", lambda pipe: object())
    with pytest.raises(NotAppliedError, match="carries a plan"):
        before_loop(*pixart)


@pytest.mark.parametrize(
    ("found", "wanted", "far"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, -INF], [2.0, -INF], 0.5),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, 3.0], [1.0, INF], INF),
        ([NAN, 3.0], [NAN, 3.0], 0.0),
    ],
)
def test_what_is_not_finite_hides_no_difference(found, wanted, far):
    """A mask of zeros and infinite numbers is compared, and what stands beside it."""
    run = lambda ids: (torch.tensor(found),)  # noqa: E731
    made = SimpleNamespace(
        program=SimpleNamespace(module=lambda: run), inputs={"t.ids": torch.zeros(1, 3)}, outputs={"text": None}
    )
    use = SimpleNamespace(label="t", number=0)
    seen = SimpleNamespace(
        uses=[SimpleNamespace(tensors={"input_ids": torch.zeros(1, 3)})],
        conditions={"cond": {"text": torch.tensor(wanted)}},
    )
    assert module._Finding._difference(None, made, "cond", [use], [seen]) == far
