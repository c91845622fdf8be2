"""Image pipelines with what is known of them: the arguments of a call, their attention, and plans for them by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from difa_compile.decision import Decision, Window
from difa_compile.layout import Layout
from difa_compile.pipeline.rules import plan_from_rule
from difa_compile.plan.plan import Plan
from tests.support.image_components import (
    HEIGHT,
    IMAGE,
    IMAGE_THEN_TEXT,
    TEXT_THEN_IMAGE,
    TEXT_TOKENS,
    WIDTH,
    Altered,
    all_full,
    dit,
    flux,
    flux_img2img,
    pixart_sigma,
    sd3,
    sd3_img2img,
)

WINDOW = Window("band", 3)
W = f"window({WINDOW})"
R = f"{W}+residual"
GUIDED = (
    ("full", "full", "full"),
    ("reuse", R, W),
    (R, "reuse", "full"),
    ("full+cfg", f"{R}+cfg", "reuse+cfg"),
    (R, f"{W}+cfg", R),
    ("reuse+cfg", "full+cfg", "full+cfg"),
)
"""Every kind of decision with and without +cfg, each reader after its filler; the third site only SD3 has."""
UNGUIDED = (
    ("full", "full", "full"),
    ("reuse", R, W),
    (R, "reuse", "full"),
    ("full", W, "reuse"),
    (R, "full", R),
    ("reuse", R, W),
)
PROMPTS, NEGATIVE = ("a red house", "two small boats"), ("blurred", "grey")
PROMPTED = {
    "prompt": list(PROMPTS),
    "height": HEIGHT,
    "width": WIDTH,
    "max_sequence_length": TEXT_TOKENS,
    "output_type": "latent",
}
"""Arguments that all pipelines take whose images are of prompts."""
CLOSE = 1e-5
"""Of the largest latent: what the order of float32 additions makes of six steps stays far below, a decision above."""


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments of its call, and what is known of its transformer's attention without the package.

    ``paths`` and ``layouts`` of the sites; ``calls``: the number of each site's attention call. ``asked``: steps to ask
    for where the pipeline makes one. ``unguided``: arguments that switch guidance off. ``textless``: sites before any
    text has come in, at which the guidance halves are equal. ``threshold``: at which calibration takes some decisions.
    """

    make: Callable
    paths: tuple[str, ...]
    layouts: tuple[Layout, ...]
    calls: tuple[int, ...]
    arguments: Mapping = field(default_factory=dict)
    half: int | None = None
    two_calls: bool = False
    asked: int = 1
    prompted: Mapping = field(default_factory=lambda: PROMPTED)
    unguided: Mapping | None = None
    threshold: float = 0.1
    textless: tuple[int, ...] = ()

    @property
    def rows(self):
        table = GUIDED if self.unguided is not None else UNGUIDED
        return tuple(tuple(Decision.parse(text) for text in row[: len(self.paths)]) for row in table)

    def inputs(self, **arguments):
        """Arguments of a call, but for the steps."""
        return {**self.prompted, **self.arguments, **arguments}

    def sample(self, pipe, steps=6, **arguments):
        """Latents, or with ``output_type="np"`` images (of DiT always); the same for the same arguments."""
        generator = torch.Generator().manual_seed(3)
        call = {"num_inference_steps": steps * self.asked, "generator": generator}
        images = pipe(**{**self.inputs(), **call, **arguments}).images
        return images if isinstance(images, torch.Tensor) else torch.from_numpy(images)

    def sample_altered(self, pipe, rows, made=None, **arguments):
        """Latents with the attention altered by hand; ``made``: steps made, if fewer than there are rows."""
        altered = Altered(rows, self.layouts, WINDOW, calls=self.calls, half=self.half, two_calls=self.two_calls)
        with altered.of(pipe):
            latents = self.sample(pipe, **{"steps": len(rows), **arguments})
        steps = len(rows) if made is None else made
        assert altered.made == (2 * steps if self.two_calls else steps)
        return latents

    def plan(self, pipe, rows):
        """A plan written by hand; made once for all tests, since nothing but the pipeline's sizes enters."""
        key = (self.make, self.two_calls, rows)
        if key not in PLANS:
            plan = plan_from_rule(
                pipe, len(rows), lambda step, site: rows[step][self.paths.index(site.path)], inputs=self.inputs()
            )
            assert [(site.path, site.layout) for site in plan.sites] == list(zip(self.paths, self.layouts, strict=True))
            guidance = "two-call" if self.two_calls else plan.settings.guidance
            PLANS[key] = replace(plan, settings=replace(plan.settings, guidance=guidance))
        return PLANS[key]


PLANS: dict[tuple, Plan] = {}


def picture():
    """An image for each prompt."""
    return torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


SD3 = Case(
    sd3,
    ("transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"),
    (IMAGE_THEN_TEXT, IMAGE, IMAGE_THEN_TEXT),
    (0, 1, 2),
    {"negative_prompt": list(NEGATIVE)},
    half=1,
    unguided={"guidance_scale": 1.0},
)
FLUX = Case(
    flux, ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"), (TEXT_THEN_IMAGE, TEXT_THEN_IMAGE), (0, 1)
)
CASES = {
    "dit": Case(
        dit,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        (Layout((4, 4)), Layout((4, 4))),
        (0, 1),
        {"class_labels": [1, 2], "output_type": "np"},
        half=0,
        prompted={},
        unguided={"guidance_scale": 1.0},
        threshold=0.5,
    ),
    "pixart_sigma": Case(
        pixart_sigma,
        ("transformer_blocks.0.attn1", "transformer_blocks.1.attn1"),
        (IMAGE, IMAGE),
        (0, 2),
        {"negative_prompt": list(NEGATIVE), "use_resolution_binning": False, "clean_caption": False},
        half=1,
        unguided={"guidance_scale": 1.0},
        textless=(0,),
    ),
    "sd3": SD3,
    "sd3_img2img": replace(
        SD3, make=sd3_img2img, arguments={**SD3.arguments, "image": picture(), "strength": 0.5}, asked=2
    ),
    "flux": FLUX,
    "flux_true_cfg": replace(
        FLUX,
        arguments={"negative_prompt": list(NEGATIVE), "true_cfg_scale": 3.0},
        two_calls=True,
        unguided={"true_cfg_scale": 1.0},
    ),
    "flux_img2img_true_cfg": replace(
        FLUX,
        make=flux_img2img,
        arguments={
            "negative_prompt": list(NEGATIVE),
            "true_cfg_scale": 3.0,
            "image": picture(),
            "strength": 0.5,
        },
        two_calls=True,
        asked=2,
        unguided={"true_cfg_scale": 1.0},
    ),
}
PROMPTED_CASES = [name for name in CASES if name != "dit"]
GUIDED_CASES = [name for name, each in CASES.items() if each.unguided is not None]


def distance(found, wanted):
    """Largest difference, relative to the largest latent."""
    assert torch.isfinite(found).all()
    return float((found - wanted).abs().max() / wanted.abs().max())


def close(found, wanted):
    return distance(found, wanted) < CLOSE


def full_rows(case, steps=6):
    return all_full(len(case.paths), steps)
