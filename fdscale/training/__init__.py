"""The machinery of every program: engine, loop, checkpoints, run directory, metrics."""
