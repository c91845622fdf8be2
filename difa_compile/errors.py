"""Every error this package raises on purpose: one class per kind of mistake.

A message says what is wrong, where, and the remedy. All derive from :class:`DifaError`; those that mean a bad value
also derive from ``ValueError``, so that generic callers can catch them.
"""

from __future__ import annotations


class DifaError(Exception):
    """Base of all errors of difa-compile."""


class DecisionError(DifaError, ValueError):
    """A decision or window that contradicts itself (a window without a radius, a radius below one)."""


class LayoutError(DifaError, ValueError):
    """A token layout that does not add up with the sequence it describes, or that is needed and unknown."""


class OperandError(DifaError, ValueError):
    """Tensors or numbers of one attention call that do not go together: dtype, device, storage, sizes, scale."""


class PlanFormatError(DifaError, ValueError):
    """A plan file that is not JSON, is truncated, or has missing, unknown or ill-typed keys."""


class PlanVersionError(PlanFormatError):
    """A plan file written in a schema version this release does not read."""


class PlanMismatchError(DifaError, ValueError):
    """A plan that was made for another model, other sites or another token grid than the one it is applied to."""


class SitesMismatchError(PlanMismatchError):
    """A plan that names other sites than the model has."""


class PlanDigestError(PlanFormatError):
    """A plan file whose content does not match its digest: it was edited or damaged after it was written."""


class ScheduleError(DifaError, ValueError):
    """A number of steps, or a step index, outside the sampling schedule (zero steps, a step never declared)."""


class SiteSkippedError(DifaError):
    """``strict=True`` and a decision could not be carried out at a site, for instance a window under a mask."""


class NoAttentionError(DifaError):
    """The module holds no self- or joint-attention that a plan could act on."""


class RunError(DifaError, RuntimeError):
    """A run used in the wrong order: a step outside ``sampling``, a cache read before it was filled."""


class CachesLostError(RunError):
    """``strict=True`` and a model that changed in mid-run, so that the caches of the steps before do not fit."""


class CachesLostWarning(UserWarning):
    """A model that changed in mid-run: what the plan would have read from earlier steps is computed in full."""


class PlanNotFollowedError(RunError):
    """A call of a model with a plan where nothing is compiled; if the model ran as it is, an error for ``strict=True``
    and else a warning."""


class PlanNotFollowedWarning(UserWarning):
    """A call of the model, within a run, that ran it as it is: Dynamo did not compile it."""


class NotAppliedError(DifaError):
    """``remove`` on a pipeline that carries no plan, ``apply`` on one that already does, or a call of one whose
    transformer was exchanged since."""


class UnsupportedPipelineError(DifaError, ValueError):
    """A pipeline without a diffusion transformer or without a scheduler that can be followed."""


class UnsupportedModelError(DifaError, ValueError):
    """A model that cannot be captured as one graph of fixed sizes."""


class PipelineCallError(DifaError, ValueError):
    """Arguments of a pipeline's call that it does not have or cannot take: unknown, ill-typed, empty, out of range."""


class InputValuesError(UnsupportedModelError):
    """A call whose inputs' values lead to other sizes or branches than those of the call that was captured."""


class CalibrationError(DifaError):
    """Base of what can stop a calibration."""


class NonFiniteError(CalibrationError, ValueError):
    """NaN or infinity in the model's output during calibration."""


class ThresholdError(CalibrationError, ValueError):
    """A calibration threshold outside (0, 10]."""


class CalibrationStateError(CalibrationError, ValueError):
    """A saved calibration state that belongs to another model, other inputs or other settings."""


class ErrorTableError(DifaError, ValueError):
    """A table of errors to plan from that is damaged or does not go together: NaN, sizes, missing measurements."""


class BudgetError(DifaError, ValueError):
    """A budget or an error to plan for that is no share of the full model's time, or that nothing can keep to."""


class RowLimitError(DifaError, ValueError):
    """A limit on a plan's distinct rows below one, or that no plan can keep to."""


class OutputError(DifaError, OSError):
    """A folder or file that cannot be written."""


class CacheFolderError(OutputError):
    """No folder to keep files in: ``DIFA_CACHE_DIR`` names none, or others could change what any of them holds."""


class ModelLoadError(DifaError, ValueError):
    """A model name or folder that cannot be loaded as a diffusers pipeline or model."""


class KernelBuildError(DifaError, RuntimeError):
    """A kernel that has to be compiled on this machine cannot be."""


class ProfileError(DifaError, ValueError):
    """A machine profile that is missing where one is asked for, damaged, or cannot be measured."""


class MissingDependencyError(DifaError, ImportError):
    """An optional package is needed for what was asked; the message names the extra to install."""


class ExampleInputsError(DifaError, ValueError):
    """No example inputs are known for a model or pipeline, so they must be given."""


class ComparisonError(DifaError, ValueError):
    """A comparison asked for with seeds, repeats or inputs that make none."""


class ComparisonFormatError(DifaError, ValueError):
    """A folder that holds no complete comparison, or whose files are damaged or do not belong together."""


class PassError(DifaError, RuntimeError):
    """A pass that failed at a graph, which is a fault of this package, or a limit on passes that is no number."""


class BundleError(DifaError):
    """Base of what can be wrong with a bundle, or stop the making of one."""


class BundleFormatError(BundleError, ValueError):
    """A bundle whose manifest or weights are damaged, of another version, or do not belong together."""


class BundleVersionError(BundleFormatError):
    """A bundle written by another release."""


class BundleIntegrityError(BundleFormatError):
    """A file of a bundle that is not what was exported: cut off, exchanged, edited, missing, or a link."""


class BundleInputError(BundleError, ValueError):
    """A tier, steps or images that a bundle was not exported for, or conditions and scales that it cannot take."""


class AdapterError(BundleError, ValueError):
    """Weights to put into a bundle, a LoRA's or whole ones, that are damaged, in a form that is not read, or do not fit
    it."""


class TargetError(BundleError, RuntimeError):
    """A target that is not installed or cannot be compiled for, or an engine made for another processor or release."""


class EngineRunError(BundleError, RuntimeError):
    """An engine of a bundle that ends with an error while it runs, or is given or gives other tensors than it says."""


class SamplingLoopError(UnsupportedPipelineError):
    """A pipeline whose sampling loop cannot be written down as a program: it mixes images, asks for values."""


class NotLinearError(SamplingLoopError):
    """A sampling loop that is not linear in the model's outputs: dynamic thresholding, learned variance."""


class AfterLoopError(UnsupportedPipelineError):
    """A pipeline whose decoding, what it does from final latents to images, cannot be exported as one graph."""


class BeforeLoopError(UnsupportedPipelineError):
    """A pipeline whose way from prompts to what its model is given cannot be followed, or exported as one graph."""


class ProgramFormatError(DifaError, ValueError):
    """A sampling program that is damaged, of another version, or contradicts itself."""


class ReplayError(DifaError, ValueError):
    """A sampling program carried out with conditions, noise, scales or outputs that do not fit it."""


class SamplingCancelledError(DifaError):
    """A callback that ended sampling by returning ``False``."""


class EngineError(DifaError, ValueError):
    """A call or a variant of a model that no engine can be made of, or that an engine was not made for."""


class ExportError(BundleError):
    """An export that cannot go on: another one writes into its folder, or a weight has no owner."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, NumPy's, a GPU's, or torch's on the CPU, whose error is a ``RuntimeError``."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
