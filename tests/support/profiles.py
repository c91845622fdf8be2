"""Made-up profiles: what an operation takes is told per (query, key) pair, in all dtypes that tests use."""

from difa_compile.machine.profile import ELEMENTWISE, FULL_ATTENTION, LINEAR, Fit, Machine, Profile, Sample

KERNELS = ("CPU", "masked SDPA")


def made_up(*, full=1.0, window=0.1, elements=0.0, call=0.0, tokens=4096, machine=None, dtype="float32"):
    """A profile in which pairs cost ``full`` or ``window`` seconds, projections 1e-9 a product, passes ``elements`` a
    byte; ``call``: what a call of local attention costs beside."""

    def fit(operation, **prices):
        sample = Sample("made up", dict.fromkeys(prices, 1.0), tokens, 1.0)
        return Fit(operation, dtype, prices, (sample,), (0.0,))

    fits = [
        fit(FULL_ATTENTION, calls=0.0, multiply_adds=0.0, pairs=full),
        *(fit(f"local {name}", calls=call, multiply_adds=0.0, pairs=window) for name in KERNELS),
        fit(LINEAR, calls=0.0, multiply_adds=1e-9),
        fit(ELEMENTWISE, calls=0.0, bytes=elements),
    ]
    return Profile(machine or Machine.here("cpu"), "2026-01-01T00:00:00+00:00", tuple(fits))
