"""What is sampled, as the command line is told it."""

from __future__ import annotations

import pytest

from difa_compile.cli.inputs import call_inputs, image_captions, images_per_call, seeds_for
from tests.support.foreign import FOREIGN


def test_call_inputs(tmp_path):
    (tmp_path / "call.json").write_text('{"prompt": "a cat", "height": 512}')
    assert call_inputs("a/b", str(tmp_path / "call.json"), None, ["a dog"], 3.0) == {
        "prompt": ["a dog"],
        "height": 512,
        "guidance_scale": 3.0,
    }
    assert call_inputs("demo", None, None, None, None) == {"class_labels": list(range(10)), "guidance_scale": 4.0}
    assert call_inputs("demo", '{"guidance_scale": 1}', "3", None, None) == {"class_labels": [3], "guidance_scale": 1}


@pytest.mark.parametrize(
    ("call", "images", "captions"),
    [
        ({"class_labels": [1, 2]}, 4, ("one", "class 2", "one", "class 2")),
        ({"prompt": "a cat"}, 2, ("a cat", "a cat")),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 2}, 4, ("a", "a", "b", "b")),
        ({"prompt": ["a", "b"]}, 3, ()),
        ({"prompt_embeds": 0}, 3, ()),
        ({"prompt": "x" * 100}, 1, ("x" * 59 + "…",)),
    ],
)
def test_image_captions(call, images, captions):
    assert image_captions(call, {1: "one"}, images) == captions


def test_seeds_cover_the_samples():
    assert seeds_for(21, 10, 5) == (5, 6, 7)
    assert seeds_for(1, 10, 0) == (0,)
    assert images_per_call({"class_labels": [1, 2, 3]}) == 3
    assert images_per_call({"prompt": "a", "num_images_per_prompt": 4}) == 4


@pytest.mark.parametrize("text", FOREIGN, ids=ascii)
def test_captions_and_inputs_take_any_text(text):
    (caption,) = image_captions({"prompt": text}, {}, 1)
    assert len(caption) <= 60
    assert caption.isprintable()
    assert call_inputs("a/b", None, None, [text], None) == {"prompt": [text]}
