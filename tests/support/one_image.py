"""Tiny whole pipelines, each with the arguments of a call that makes one image or video: what bundles are made of."""

from tests.support.image_cases import CASES
from tests.support.video_components import wan


def one_image(name, folder):
    """``name``: of an image pipeline (:data:`CASES`), or ``wan``, whose tokenizer is written into ``folder``."""
    if name == "wan":
        tiny = wan(folder)
        own = {"generator", "output_type", "num_inference_steps"}
        return tiny.pipe, {key: value for key, value in tiny.arguments.items() if key not in own}
    case = CASES[name]
    inputs = case.inputs()
    inputs.pop("output_type", None)
    for text in ("prompt", "negative_prompt"):
        if isinstance(inputs.get(text), list):
            inputs[text] = inputs[text][:1]
    return case.make(), inputs
