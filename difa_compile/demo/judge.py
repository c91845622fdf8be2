"""The judge: a small digit classifier that says what a generated image shows.

It is trained by ``examples/train_judge.py`` on the demo model's training data and measured on digits neither has
seen. ``features`` is the activation in front of the last layer, the space in which the Frechet distance of Heusel et
al. (arXiv 1706.08500) is taken here: an Inception network has never seen grey digits of 32 x 32 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from torch import Tensor, nn

from difa_compile.demo.digits import IMAGE_SIZE, NUM_CLASSES
from difa_compile.errors import MissingDependencyError, ModelLoadError
from difa_compile.files.documents import ARCHIVE_ERRORS, open_plain, read_at_most
from difa_compile.files.writing import write_whole
from difa_compile.wording import shown

WEIGHTS_NAME = "judge.safetensors"
MOST_BYTES = 2**26


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class DigitJudge(nn.Module):
    """Classify grey images (N, 1, 32, 32) in [-1, 1]: ``forward`` gives logits (N, 10), ``features`` (N, 64)."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(1, 24, 1),
            _convolution(24, 48, 2),
            _convolution(48, 48, 1),
            _convolution(48, 96, 2),
            _convolution(96, 96, 1),
            _convolution(96, 96, 2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96 * (IMAGE_SIZE // 8) ** 2, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) float32 of images (N, 1, 32, 32) in [-1, 1]; ``ValueError`` for another shape."""
        if images.ndim != 4 or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the judge takes images (N, 1, {IMAGE_SIZE}, {IMAGE_SIZE}) in [-1, 1], not {tuple(images.shape)}"
            )
        result: Tensor = self.body(images)
        return result

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 32, 32) in [-1, 1]."""
        result: Tensor = self.head(self.features(images))
        return result


def save_judge(judge: DigitJudge, path: Path) -> None:
    """Write the judge's weights to ``path`` in fp16, whole or not at all. Raises :class:`OutputError`."""
    from safetensors.torch import save

    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in judge.state_dict().items()
    }
    write_whole(path, save(tensors), "the judge")


def load_judge(path: Path | None = None) -> DigitJudge:
    """The trained judge on the CPU in float32, in eval mode, without gradients.

    ``path`` is a file written by :func:`save_judge`; without it the packaged weights are read. Raises
    :class:`ModelLoadError` for a file that is missing or is not a judge, :class:`MissingDependencyError` without
    the safetensors package.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingDependencyError(
            "the judge's weights need the safetensors package; install difa-compile[diffusers]"
        ) from error
    failures: tuple[type[Exception], ...] = (OSError, ValueError, MemoryError, SafetensorError, *ARCHIVE_ERRORS)
    source = Path(path) if path is not None else resources.files("difa_compile.demo").joinpath(WEIGHTS_NAME)
    try:
        if path is None:
            content = source.read_bytes()
        else:
            with open_plain(path, MOST_BYTES) as file:
                content = read_at_most(file, MOST_BYTES)
        tensors: Mapping[str, Tensor] = load(content)
    except failures as error:
        raise ModelLoadError(
            f"the judge's weights cannot be read from {shown(source)}: {shown(error)}; reinstall the package or train "
            "it anew with examples/train_judge.py"
        ) from error
    judge = DigitJudge()
    try:
        judge.load_state_dict(
            {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
        )
    except RuntimeError as error:
        raise ModelLoadError(
            f"{shown(source)} does not hold a digit judge: {shown(error)}; give one saved by save_judge"
        ) from error
    return judge.eval().requires_grad_(False)
