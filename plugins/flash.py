"""Local attention through flash-attn's own sliding window, where that package is installed (the extra ``flash``).

It serves what is a plain band to it: every token an image token, in one line, each seeing those within a radius. Its
kernels skip the blocks of keys that no query of a block sees. Not run on a GPU yet: what it is handed is tested on a
stand-in with its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from difa_compile.ops.kernels import LocalCall, LocalKernel
from difa_compile.plugins.geometry import Geometry

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


def why_not(call: LocalCall) -> str | None:
    if call.device.type != "cuda" or torch.version.hip:
        return f"serves CUDA devices, not {'AMD' if call.device.type == 'cuda' else call.device.type}"
    return _unserved(call) or _missing(call.device)


def _unserved(call: LocalCall) -> str | None:
    """What of the call itself its sliding window cannot express."""
    if call.masked:
        return "the model's own mask comes on top of the window"
    if call.layout.tokens != call.layout.image_tokens or call.pooled:
        return "some keys are seen by every query, whatever the window"
    geometry = Geometry.of(call.layout, call.window)
    if geometry.rank > 1:
        return f"window {call.window} on {call.layout} is no band over the sequence"
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is not float16 or bfloat16"
    if call.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {call.shape[-1]} is over {MAX_HEAD_DIM}"
    if call.value_dim not in (0, call.shape[-1]):
        return f"values have {call.value_dim} channels, keys {call.shape[-1]}"
    if call.scale is not None and call.scale <= 0:
        return f"scale {call.scale} is not positive"
    return None


def _missing(device: torch.device) -> str | None:
    """What the machine lacks."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed"
    found = attention_function()
    return found if isinstance(found, str) else None


@lru_cache(maxsize=1)
def attention_function() -> Callable[..., Tensor] | str:
    """``flash_attn.flash_attn_func``, or why there is none. Imported once: it loads a large library."""
    try:
        from flash_attn import flash_attn_func
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return "flash-attn is not installed (pip install 'difa-compile[flash]')"
        return f"flash-attn does not load: {error}"
    except (ImportError, OSError) as error:  # one built for another torch, as a rule
        return f"flash-attn does not load: {error}"
    if "window_size" not in inspect.signature(flash_attn_func).parameters:
        return "flash-attn has no sliding window; version 2.3 or newer is needed"
    attention: Callable[..., Tensor] = flash_attn_func
    return attention


def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: LocalCall) -> Tensor:
    assert mask is None, "why_not refuses masked calls"
    attention = attention_function()
    assert not isinstance(attention, str), "why_not refuses calls without the package"
    radius = Geometry.of(call.layout, call.window).radius
    tokens_first = (each.transpose(1, 2) for each in (query, key, value))
    return attention(*tokens_first, softmax_scale=call.scale, window_size=(radius, radius)).transpose(1, 2)


KERNEL = LocalKernel("flash-attn", why_not, run)
