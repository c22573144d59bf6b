"""Settings to things that run: what every program does around the loop.

Starting has an order: settings are checked without torch and memory is compared with what the machine has; the run
directory is opened (`run`); the networks are built (`networks`); then this run is resumed, or the student starts
from weights, or from scratch (`training`). The log names the branch.
"""
