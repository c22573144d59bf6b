"""What a run needs before it starts: cross-checks, memory, time, and how a recipe shrinks.

No torch in here, but for the two files that trace a real network: `activations` and `kernels`.
"""
