"""The tests. They mirror the source; what several of them share is imported as ``tests.NAME``."""
