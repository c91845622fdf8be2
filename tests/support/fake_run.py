"""A run that does nothing but listen."""


class FakeRun:
    """Notes what it is told."""

    def __init__(self, progress):
        self.progress = progress
        self.steps = []
        self.branches = []
        self.active = False
        self.resets = 0
        self.peak_cache_bytes = 12
        self.promotions = ()

    def activate(self):
        self.active = True

    def deactivate(self):
        self.active = False

    def reset(self):
        self.resets += 1

    def step(self, index):
        self.steps.append(index)

    def branch(self, name):
        self.branches.append(name)
