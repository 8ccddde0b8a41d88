"""Measurements: `python -m titanmoe.benchmarks.<name> [--json]`. Ratios between things timed in turn, with medians."""
