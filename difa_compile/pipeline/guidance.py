"""Classifier-free guidance as the diffusers pipelines do it: one batched call in either order, or two calls per step.

Read from the pipelines of diffusers 0.42: a batched pipeline doubles the batch and splits the model's output in two
halves again; the order in which it does that is a fact of its source, not of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from difa_compile.errors import DecisionError, UnsupportedPipelineError

_FOLDERS = "diffusers.pipelines."

CONDITIONAL_FIRST = frozenset({"ace_step", "dit", "lumina", "z_image"})
"""Pipeline folders of diffusers (or single modules, ``folder.module``) that batch ``[cond, uncond]``."""

UNCONDITIONAL_FIRST = frozenset(
    {
        "allegro",
        "anyflow",
        "aura_flow",
        "bria",
        "bria_fibo",
        "cogvideo",
        "cogview3",
        "consisid",
        "deprecated.amused",
        "deprecated.vq_diffusion",
        "controlnet_hunyuandit",
        "controlnet_sd3",
        "easyanimate",
        "ernie_image",
        "hidream_image",
        "hunyuandit",
        "joyimage.pipeline_joyimage_edit_plus",
        "latte",
        "ltx",
        "ltx2",
        "mochi",
        "pixart_alpha",
        "prx",
        "sana",
        "sana_video",
        "sana_wm",
        "stable_audio",
        "stable_audio_3",
        "stable_diffusion_3",
    }
)
"""Pipeline folders of diffusers that batch ``[uncond, cond]``."""

TWO_CALLS = frozenset(
    {
        "bria_fibo2",
        "chroma",
        "chronoedit",
        "cogview4",
        "cosmos",
        "flux",
        "flux2",
        "glm_image",
        "helios",
        "hunyuan_image",
        "hunyuan_video",
        "hunyuan_video1_5",
        "joyimage",
        "kandinsky5",
        "kandinsky6",
        "krea2",
        "longcat_audio_dit",
        "longcat_image",
        "lucy",
        "lumina2",
        "motif_video",
        "nucleusmoe_image",
        "ovis_image",
        "qwenimage",
        "qwenimage21",
        "skyreels_v2",
        "wan",
    }
)
"""Pipeline folders of diffusers that call the transformer once per half. Those of them that do not name the calls by
``cache_context`` make the conditional one first, in every step."""

_UNGUIDED = "it guides in no way that makes halves: what scale it takes is an input of its transformer"

NO_HALVES = {
    "flux2.pipeline_flux2_klein_kv": _UNGUIDED,
    "ideogram4": "it guides with a second model, and its transformer sees the conditional half alone",
    "kandinsky6.pipeline_kandinsky6_sr": _UNGUIDED,
    "ltx2.pipeline_ltx2_dfr": _UNGUIDED,
    "ltx2.pipeline_ltx2_dfr_temporal_refine": _UNGUIDED,
    "omnigen": "its batch is of two parts or, with input images, of three",
    "pag": "its batch is of three parts, or of two that are both conditional: perturbed attention has one of its own",
    "rfd4_proteina": _UNGUIDED,
    "sana.pipeline_sana_sprint": _UNGUIDED,
    "sana.pipeline_sana_sprint_img2img": _UNGUIDED,
    "sana_wm.refiner": _UNGUIDED,
    "stable_audio_3.pipeline_stable_audio_3_audio2audio": _UNGUIDED,
    "stable_audio_3.pipeline_stable_audio_3_inpaint": _UNGUIDED,
    "visualcloze": _UNGUIDED,
}
"""Pipeline folders and modules of diffusers whose calls have no two halves, and why not."""


@dataclass(frozen=True)
class Guidance:
    """``form`` is ``batched``, ``two-call``, ``none`` or ``unknown``; ``conditional_half`` (0 or 1) is known of the
    first alone.

    ``conditional_first``: of two calls whose order is known and that nothing else tells apart, the first of a step is
    the conditional one. ``reason``: why there are no halves.
    """

    form: str
    conditional_half: int | None = None
    conditional_first: bool = False
    reason: str = ""


def guidance_of(pipe: object) -> Guidance:
    """How ``pipe`` (an instance of a diffusers pipeline class, or of a subclass of one) does guidance."""
    for base in type(pipe).__mro__:
        module = base.__module__
        if not module.startswith(_FOLDERS):
            continue
        found = _guidance_in(module.removeprefix(_FOLDERS))
        if found is not None:
            return found
    return Guidance("unknown")


def _guidance_in(module: str) -> Guidance | None:
    """How the pipelines of a module (``folder.module``) of diffusers guide; what is said of a module goes before what
    is said of its folder."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in NO_HALVES:
            return Guidance("none", reason=NO_HALVES[name])
        if name in CONDITIONAL_FIRST:
            return Guidance("batched", 0)
        if name in UNCONDITIONAL_FIRST:
            return Guidance("batched", 1)
        if name in TWO_CALLS:
            return Guidance("two-call", conditional_first=True)
    return None


def stated_guidance(pipe: object, form: str | None, conditional_half: int | None) -> Guidance:
    """What is stated of guidance, completed by what is known of ``pipe``; of form ``none`` where nothing is.

    ``form``: ``batched``, ``two-call``, ``none`` or, if nothing is stated, ``None``. Raises :class:`DecisionError` for
    other words, and where the statements contradict each other or the pipeline.
    """
    if form not in (None, "batched", "two-call", "none"):
        raise DecisionError(f"guidance is {form!r}; choose batched, two-call or none, or leave it out")
    if conditional_half not in (None, 0, 1):
        raise DecisionError(
            f"conditional_half is {conditional_half!r}; give 0 (conditional half first) or 1 (second), or leave it out"
        )
    if conditional_half is not None and form not in (None, "batched"):
        raise DecisionError(
            f"conditional_half={conditional_half} says where half a batch stands, but guidance={form!r} has no halves "
            "of a batch; leave one of them out"
        )
    known = guidance_of(pipe)
    name = type(pipe).__name__
    if form is None:
        form = "batched" if conditional_half is not None else "none" if known.form == "unknown" else known.form
    if form != "none" and known.form not in ("unknown", form):
        reason = f" ({known.reason})" if known.reason else ""
        stated = f"conditional_half={conditional_half}" if conditional_half is not None else f"guidance={form!r}"
        raise DecisionError(f"{stated} contradicts {name}, whose guidance is {known.form}{reason}; leave it out")
    if conditional_half is not None and known.conditional_half not in (None, conditional_half):
        raise DecisionError(
            f"conditional_half={conditional_half} contradicts {name}, which puts the conditional half at "
            f"{known.conditional_half}; leave it out"
        )
    if form == "batched" and conditional_half is None:
        conditional_half = known.conditional_half
    return Guidance(form, conditional_half)


def conditional_half_of(pipe: object) -> int:
    """Which half of a guided batch is the conditional one: 0 (first) or 1 (second).

    Raises :class:`UnsupportedPipelineError` for a pipeline that calls the model once per half, and for one whose order
    is not known.
    """
    guidance = guidance_of(pipe)
    if guidance.conditional_half is not None:
        return guidance.conditional_half
    name = type(pipe).__name__
    if guidance.form == "two-call":
        raise UnsupportedPipelineError(
            f"{name} calls its transformer once for the conditional and once for the unconditional half, so there "
            "are no halves of a batch to share; leave the +cfg candidates out"
        )
    if guidance.form == "none":
        raise UnsupportedPipelineError(
            f"{name} has no halves of guidance to share: {guidance.reason}; leave the +cfg candidates out"
        )
    raise UnsupportedPipelineError(
        f"{name}: it is not known which half of its guided batch is the conditional one, which sharing across guidance "
        "needs; say so with conditional_half=0 (cond first) or 1 (uncond first), or leave the +cfg candidates out"
    )


def guidance_is_on(pipe: object, arguments: Mapping[str, object]) -> bool | None:
    """Whether this call of ``pipe`` uses classifier-free guidance; ``None`` if that cannot be told.

    ``arguments``: the call's arguments by name, defaults filled in. Pipelines with a ``do_classifier_free_guidance``
    property are asked (valid once the call has set its guidance scale). Of the others, those with a ``true_cfg_scale``
    guide if it is above 1 and there is something negative; their ``guidance_scale`` is an input of the transformer, as
    it is in pipelines that make two calls but take nothing negative for the second; the rest guide if
    ``guidance_scale > 1``.
    """
    if guidance_of(pipe).form == "none":
        return False
    told = getattr(pipe, "do_classifier_free_guidance", None)
    if isinstance(told, bool):
        return told
    true_scale = arguments.get("true_cfg_scale")
    if isinstance(true_scale, (int, float)):
        return true_scale > 1 and any(arguments.get(name) is not None for name in _NEGATIVE)
    scale = arguments.get("guidance_scale")
    if not isinstance(scale, (int, float)):
        return None
    return scale > 1 and not _is_embedded(pipe, arguments)


def how_to_guide(pipe: object, arguments: Mapping[str, object]) -> str:
    """What to do about a call of ``pipe`` that does not guide, where a plan shares the halves of guidance."""
    guidance = guidance_of(pipe)
    if guidance.form == "none":
        return f"{guidance.reason}; use a plan without +cfg"
    if "true_cfg_scale" in arguments:
        return (
            "call it with true_cfg_scale > 1 and a negative_prompt (guidance_scale is an input of its transformer and "
            "makes no halves), or use a plan without +cfg"
        )
    if _is_embedded(pipe, arguments):
        return "its guidance_scale is an input of its transformer and makes no halves; use a plan without +cfg"
    return "call it with guidance_scale > 1, or use a plan without +cfg"


_NEGATIVE = ("negative_prompt", "negative_prompt_embeds")


def _is_embedded(pipe: object, arguments: Mapping[str, object]) -> bool:
    """Whether the guidance scale of ``pipe`` can only be an input: a second call would have nothing to be made with."""
    return guidance_of(pipe).form == "two-call" and not any(name.startswith("negative") for name in arguments)
