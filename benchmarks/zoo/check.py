"""Look at tiny models: ``python -m benchmarks.zoo.check NAME...`` builds, runs and captures them, all by default."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from typing import Any

import torch

from benchmarks.zoo.registry import Example, build, registered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    failed = False
    for name in parser.parse_args().names or registered():
        started = time.perf_counter()
        try:
            text = check(name)
        except Exception as error:
            failed = True
            text = f"FAILED {type(error).__name__}: {error}"
        print(f"{name}: {text} [{time.perf_counter() - started:.1f} s]", flush=True)
    sys.exit(failed)


def check(name: str) -> str:
    example = build(name)
    with torch.no_grad():
        first, again = call(example), call(example)
        if not all(torch.isfinite(value).all() for value in first):
            raise ValueError("the output is not finite")
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            raise ValueError("two equal calls differ")
        moved = call(Example(example.model, {**example.inputs, example.latent: shifted(example)}, example.latent))
        if all(torch.equal(a, b) for a, b in zip(first, moved, strict=True)):
            raise ValueError(f"the output does not depend on {example.latent}")
        graphs: list[torch.fx.GraphModule] = []

        def keep(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(module)
            return module.forward

        broken = ""
        try:
            torch._dynamo.reset()
            call(example, torch.compile(example.model, backend=keep, fullgraph=True))
        except Exception as error:
            graphs.clear()
            broken = f" (breaks: {str(error).strip().splitlines()[0]})"
            torch._dynamo.reset()
            call(example, torch.compile(example.model, backend=keep))
    attention = [sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    millions = sum(parameter.numel() for parameter in example.model.parameters()) / 1e6
    return f"ok, {millions:.2f} M parameters, attention calls per graph {attention}{broken}"


def call(example: Example, function: Any = None) -> list[torch.Tensor]:
    """The tensors that one call returns, in order."""
    torch.manual_seed(0)
    inputs = copy.deepcopy(dict(example.inputs))  # some models write to what they are given
    return tensors((example.model if function is None else function)(**inputs))


def shifted(example: Example) -> Any:
    """The latent, a little changed; lists element by element."""

    def move(value: Any) -> Any:
        return [move(item) for item in value] if isinstance(value, (list, tuple)) else value * 0.9 + 0.05

    return move(example.inputs[example.latent])


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a (nested) result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


if __name__ == "__main__":
    main()
