"""Classifier-free guidance as the diffusers pipelines do it: one batched call in either order, or two calls per step.

Read from the pipelines of diffusers 0.42: a batched pipeline doubles the batch and splits the model's output in two
halves again; the order in which it does that is a fact of its source, not of the graph. :func:`settle` brings together
that fact, the user's word and the plan's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from difa_compile.errors import DecisionError, PlanMismatchError, UnsupportedPipelineError
from difa_compile.wording import quoted

if TYPE_CHECKING:
    from difa_compile.plan.plan import Plan

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
    """How guidance is done: as is known of a pipeline (:func:`guidance_of`), or as :func:`settle` makes it out.

    ``form`` is ``batched``, ``two-call``, ``none`` or ``unknown``; ``conditional_half`` (0 or 1) is known of the first
    alone.

    ``conditional_first``: of two calls whose order is known and that nothing else tells apart, the first of a step is
    the conditional one. ``reason``: why there are no halves. ``pipeline``: whose guidance it is, for messages.
    """

    form: str
    conditional_half: int | None = None
    conditional_first: bool = False
    reason: str = ""
    pipeline: str = field(default="the pipeline", compare=False)

    @property
    def option(self) -> dict[str, object]:
        """The same as the backend's option ``cfg``."""
        if self.form == "two-call":
            return {"two_call": True}
        return {} if self.conditional_half is None else {"conditional_half": self.conditional_half}

    @property
    def why_no_half(self) -> str | None:
        """Why no half of a batch is known to be the conditional one, and the remedy; ``None`` where one is."""
        if self.conditional_half is not None:
            return None
        if self.form == "two-call":
            return (
                f"{self.pipeline} calls its transformer once for the conditional and once for the unconditional half, "
                "so there are no halves of a batch to share; leave the +cfg candidates out"
            )
        if self.form == "none":
            return f"{self.pipeline} has no halves of guidance to share: {self.reason}; leave the +cfg candidates out"
        return (
            f"{self.pipeline}: it is not known which half of its guided batch is the conditional one, which sharing "
            "across guidance needs; say so with conditional_half=0 (cond first) or 1 (uncond first), or leave the +cfg "
            "candidates out"
        )


@dataclass(frozen=True)
class StatedGuidance:
    """What a user says of guidance, ``None`` where nothing is said.

    ``form``: ``batched``, ``two-call`` or ``none``. ``conditional_half``: 0 (first half of a batch) or 1 (second).
    Raises :class:`DecisionError` for other words, and where the two contradict each other.
    """

    form: str | None = None
    conditional_half: int | None = None

    def __post_init__(self) -> None:
        if self.form not in (None, "batched", "two-call", "none"):
            raise DecisionError(f"guidance is {quoted(self.form)}; choose batched, two-call or none, or leave it out")
        if self.conditional_half not in (None, 0, 1):
            raise DecisionError(
                f"conditional_half is {quoted(self.conditional_half)}; give 0 (conditional half first) or 1 (second), "
                "or leave it out"
            )
        if self.conditional_half is not None and self.form not in (None, "batched"):
            raise DecisionError(
                f"conditional_half={self.conditional_half} says where half a batch stands, but guidance={self.form!r} "
                "has no halves of a batch; leave one of them out"
            )

    @classmethod
    def of_option(cls, cfg: object) -> StatedGuidance:
        """What the backend's option ``cfg`` says: ``{"conditional_half": 0 | 1}`` or ``{"two_call": True}``."""
        if cfg is None:
            return cls()
        if not isinstance(cfg, Mapping) or not set(cfg) <= {"conditional_half", "two_call"}:
            raise DecisionError(
                f'option cfg is {quoted(cfg)}; give {{"conditional_half": 0}} or 1, or {{"two_call": True}}'
            )
        two_call = cfg.get("two_call")
        form = None if two_call is None else "two-call" if two_call else "batched"
        return cls(form, cfg.get("conditional_half"))


NOTHING_STATED = StatedGuidance()


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


def settle(pipe: object = None, stated: StatedGuidance = NOTHING_STATED, plan: Plan | None = None) -> Guidance:
    """How guidance is done, by all that is known of it: what the user has ``stated``, what ``plan`` was made for, and
    what is known of ``pipe`` (nothing, if it is ``None``). Who comes first in this list has the last word.

    What contradicts ``pipe`` is refused, a plan only if it shares guidance halves. Raises :class:`DecisionError` (the
    statement), :class:`PlanMismatchError` (the plan), and :class:`UnsupportedPipelineError` if ``plan`` shares halves
    and nobody says which half is the conditional one.
    """
    known = Guidance("unknown") if pipe is None else replace(guidance_of(pipe), pipeline=type(pipe).__name__)
    shares = plan is not None and shares_halves(plan)
    _check_statement(stated, known)
    if plan is not None and shares:
        _check_plan(plan, known)
    made_for, told = (None, None) if plan is None else (plan.settings.guidance, plan.settings.conditional_half)
    half = next((each for each in (stated.conditional_half, told, known.conditional_half) if each is not None), None)
    if stated.form is not None:
        form = stated.form
    elif made_for == "two-call" or (stated.conditional_half is None and known.form == "two-call"):
        form = "two-call"
    else:
        form = known.form if half is None else "batched"
    settled = replace(known, form=form, conditional_half=half if form == "batched" else None)
    if pipe is not None and shares and form != "two-call" and half is None:
        raise UnsupportedPipelineError(settled.why_no_half)
    return settled


def shares_halves(plan: Plan) -> bool:
    """Whether any decision of ``plan`` is shared by the two halves of guidance."""
    return any(decision.cfg_shared for row in plan.decisions for decision in row)


def _check_statement(stated: StatedGuidance, known: Guidance) -> None:
    """Raise :class:`DecisionError` where the user contradicts what is known of the pipeline."""
    half = stated.conditional_half
    form = stated.form or (None if half is None else "batched")
    if form not in (None, "none") and known.form not in ("unknown", form):
        reason = f" ({known.reason})" if known.reason else ""
        said = f"conditional_half={half}" if half is not None else f"guidance={form!r}"
        raise DecisionError(
            f"{said} contradicts {known.pipeline}, whose guidance is {known.form}{reason}; leave it out"
        )
    if half is not None and known.conditional_half not in (None, half):
        raise DecisionError(
            f"conditional_half={half} contradicts {known.pipeline}, which puts the conditional half at "
            f"{known.conditional_half}; leave it out"
        )


def _check_plan(plan: Plan, known: Guidance) -> None:
    """Raise :class:`PlanMismatchError` where a plan that shares halves contradicts what is known of the pipeline."""
    told, made_for = plan.settings.conditional_half, plan.settings.guidance
    if told is not None and known.conditional_half not in (None, told):
        raise PlanMismatchError(
            f"the plan was made with the conditional half at position {told}, but {known.pipeline} puts it at "
            f"{known.conditional_half}; calibrate a plan with this pipeline"
        )
    if known.form == "none":
        raise PlanMismatchError(
            f"the plan shares guidance halves, but {known.pipeline} has none: {known.reason}; use a plan without +cfg"
        )
    if {made_for, known.form} == {"batched", "two-call"}:
        raise PlanMismatchError(
            f"the plan shares guidance halves as {made_for} calls have them, but {known.pipeline} makes {known.form} "
            "ones; calibrate a plan with this pipeline"
        )


def check_guides(pipe: object, arguments: Mapping[str, object]) -> None:
    """Raise :class:`PlanMismatchError` for a call of ``pipe`` that is known not to guide; for plans that share halves.

    ``arguments``: as for :func:`guidance_is_on`.
    """
    if guidance_is_on(pipe, arguments) is False:
        raise PlanMismatchError(
            f"the plan shares the two halves of classifier-free guidance, but this call of {type(pipe).__name__} has "
            f"guidance off, so it has no CFG half; {how_to_guide(pipe, arguments)}"
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
