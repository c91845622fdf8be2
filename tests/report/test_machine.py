"""What a page says of the machine."""

from __future__ import annotations

import torch

from difa_compile.report import describe_machine, describe_versions


def test_machine_and_versions_name_no_host():
    import platform

    machine, versions = describe_machine(), describe_versions()
    assert set(machine) >= {"processor", "cores", "memory", "system"}
    assert versions["torch"] == torch.__version__
    assert platform.node() not in " ".join(machine.values()).split()
