"""What a figure was measured with: the machine and the versions. No names of hosts or users."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import difa_compile
from difa_compile.machine.profile import processor

_PACKAGES = ("diffusers", "transformers", "accelerate", "torchmetrics", "numpy")


def describe_machine() -> dict[str, str]:
    """Processor, cores, threads used, memory, GPU if there is one, system; ready to be printed."""
    cores = len(os.sched_getaffinity(0))
    machine = {
        "processor": processor(),
        "cores": f"{cores} available, {torch.get_num_threads()} used by torch",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def describe_versions() -> dict[str, str]:
    """Versions of difa-compile, Python, torch and those optional packages that are installed."""
    versions = {
        "difa-compile": difa_compile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
