"""Forecasts by hand: the weights of the last outputs are solved for, from what they are to do to polynomials."""

import torch


def extrapolated(decision, past, step, place):
    """What the last outputs lead to at a step.

    ``past``: (step, place, output) of the steps that computed one, the newest first. ``place``: where in the schedule
    a step is; on what scale does not matter. Solved are sum_j w_j (x_j - x)^p = 1 if p = 0 else 0, so that every
    polynomial of the forecast's order comes out as it is at x.
    """
    past = past[: decision.order + 1]
    assert len(past) == decision.order + 1
    at, places = place, [each[1] for each in past]
    if decision.basis == "step" or len(set(places)) < len(places):
        at, places = step, [each[0] for each in past]
    powers = torch.arange(len(past), dtype=torch.float64)[:, None]
    moments = (torch.tensor(places, dtype=torch.float64) - at) ** powers
    weights = torch.linalg.solve(moments, (powers[:, 0] == 0).double())
    total = sum(output.double() * weight for (_, _, output), weight in zip(past, weights, strict=True))
    return total.to(past[0][2].dtype)
