"""Which schedulers of diffusers make a sampling loop that can be written down as data: every class, and some settings.

Each drives the loop that most pipelines have, guided in one batched call, with nothing real in the model's place, and
is probed (:func:`difa_compile.exporting.probing.probe`). The error is that of a replay of the program on random data
against the loop itself, with a nonlinear function as the model: at two guidance scales, relative to the largest value,
over all that the model is given.

``python -m benchmarks.scheduler_survey`` writes the table in ``docs/schedulers.md``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difa_compile.bundle.program import Clamp, Program, Sample
from difa_compile.errors import SamplingLoopError
from difa_compile.exporting.probing import probe
from difa_compile.wording import shown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "schedulers.md"
STEPS = 12
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "DDIMScheduler": ({"clip_sample": False}, {"prediction_type": "v_prediction"}, {"thresholding": True}),
    "DDPMScheduler": (
        {"clip_sample": False},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned_range"},
        {"thresholding": True},
    ),
    "DPMSolverMultistepScheduler": (
        {"solver_order": 3},
        {"algorithm_type": "sde-dpmsolver++"},
        {"use_karras_sigmas": True},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
        {"thresholding": True},
    ),
    "EulerDiscreteScheduler": ({"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0}, {"stochastic_sampling": True}),
    "UniPCMultistepScheduler": ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"},),
}
"""Beside the default ones, which each class is tried with."""
FEWER = {"ConsistencyDecoderScheduler": 2}
"""Steps of those that cannot do more."""
_TOKENS = "it samples tokens of a vocabulary, not continuous latents"
OTHER_LOOPS = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "CogVideoXDPMScheduler": "its step takes what it predicted before; in its own pipeline it can be written down",
    "CosineDPMSolverMultistepScheduler": "its noise is a Brownian tree of the package torchsde, not torch's",
    "DDPMWuerstchenScheduler": "its timesteps are shares of the schedule, one for each row",
    "DPMSolverSDEScheduler": "its noise is a Brownian tree of the package torchsde, not torch's",
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "HeliosDMDScheduler": "it goes through stages of growing sizes",
    "HeliosScheduler": "it goes through stages of growing sizes",
    "KarrasVeScheduler": "it adds noise before each call of the model, in a method of its own",
    "PiflowScheduler": "its model gives a policy for many small steps, not an output",
    "RFD4ProteinaScheduler": "it samples coordinates of atoms",
    "RePaintScheduler": "its step takes an image and a mask",
    "SCMScheduler": "its timesteps end with one that the model is not called for",
    "ScoreSdeVeScheduler": "it has no step; its pipeline predicts and corrects in two methods",
    "ScoreSdeVpScheduler": "it has no step; its pipeline predicts in another method",
    "VQDiffusionScheduler": _TOKENS,
}
"""Schedulers that are not driven as most are, and why."""

HEAD = """# Schedulers

Which schedulers of diffusers {version} make a sampling loop that a bundle can hold as data: every class of
`diffusers.schedulers` with its default settings, and some settings beside them, over {steps} steps with guidance in one
batched call. *Error*: of a replay of the program on random data against the loop itself, relative to the largest value.
*Reach*: how many calls back a step reads. *Clamps*: how many of the steps clamp something.

Written by `python -m benchmarks.scheduler_survey`; a test compares it with what the schedulers do.

| scheduler | settings | error | reach | clamps | refused because |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What became of one scheduler with one choice of settings. ``reason`` is empty where it works."""

    scheduler: str
    settings: str
    error: float | None = None
    reach: int = 0
    clamps: int = 0
    reason: str = ""

    @property
    def text(self) -> str:
        if self.error is None:
            return f"| `{self.scheduler}` | {self.settings} | – | – | – | {self.reason} |"
        return f"| `{self.scheduler}` | {self.settings} | {self.error:.0e} | {self.reach} | {self.clamps} | |"


class _Model(nn.Module):
    """Gives its sample back; ``learned``: twice the channels, the second half for the variance."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.copies = 2 if learned else 1

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (torch.cat([sample] * self.copies, 1),)


class Loop:
    """The loop that diffusers' pipelines have in common, with nothing around it. Latents of 4 x 8 x 8."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        learned = str(scheduler.config.get("variance_type")).startswith("learned")
        self.transformer = _Model(learned)

    def __call__(
        self,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        output_type: str = "latent",
    ) -> tuple[Tensor]:
        from diffusers.utils.torch_utils import randn_tensor

        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        latents = randn_tensor((num_images_per_prompt, 4, 8, 8), generator=generator)
        latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
        takes = inspect.signature(scheduler.step).parameters
        further = {"generator": generator} if "generator" in takes else {}
        for t in scheduler.timesteps:
            doubled = torch.cat([latents, latents])
            if hasattr(scheduler, "scale_model_input"):
                doubled = scheduler.scale_model_input(doubled, t)
            uncond, cond = self.transformer(doubled, timestep=t.expand(len(doubled)))[0].chunk(2)
            guided = uncond + guidance_scale * (cond - uncond)
            latents = scheduler.step(guided, t, latents, **further)[0]
        return (latents,)


def schedulers() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every scheduler class of diffusers by name, with each choice of settings."""
    from diffusers import schedulers as module

    for name in sorted(dir(module)):
        found = getattr(module, name)
        if not (inspect.isclass(found) and name.endswith("Scheduler") and "Flax" not in name):
            continue
        for settings in ({}, *SETTINGS.get(name, ())):
            yield name, settings


def tried(name: str, settings: Mapping[str, Any]) -> Row:
    """What becomes of one scheduler."""
    import diffusers

    told = ", ".join(f"`{key}={value!r}`" for key, value in settings.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = getattr(diffusers.schedulers, name)(**settings)
            program = probe(Loop(scheduler), {}, FEWER.get(name, STEPS)).program
    except Exception as error:  # of schedulers that this loop does not drive there are as many as there are ways
        if name in OTHER_LOOPS:
            return Row(name, told, reason=f"not driven by this loop: {OTHER_LOOPS[name]}")
        if isinstance(error, SamplingLoopError):
            return Row(name, told, reason=_short(error))
        raise
    clamps = sum(isinstance(each, Clamp) for each in program.operations)
    return Row(name, told, program.error, reach(program), clamps)


def _short(error: Exception) -> str:
    return shown(str(error).split(";")[0].split(": on random")[0], 200)


def reach(program: Program) -> int:
    """How many calls of the model lie between a sample and the earliest output that it reads, at most."""
    calls = [index for index, each in enumerate(program.operations) if each in program.calls]
    place = {index: number for number, index in enumerate(calls)}
    furthest = 0
    for index, operation in enumerate(program.operations):
        if isinstance(operation, Sample):
            now = max(number for call, number in place.items() if call < index)
            read = [place[term.value] for row in operation.inputs for term in row if term.value in place]
            furthest = max([furthest, *(now - number for number in read)])
    return furthest


def page(rows: list[Row]) -> str:
    import diffusers

    version = ".".join(diffusers.__version__.split(".")[:2])
    return HEAD.format(version=version, steps=STEPS) + "".join(f"{row.text}\n" for row in rows)


def main() -> None:
    rows = []
    for name, settings in schedulers():
        rows.append(tried(name, settings))
        print(rows[-1].text, flush=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
