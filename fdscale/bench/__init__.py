"""Benchmarks beside the machine's measured ceiling: `python -m fdscale.bench gpu`."""
