"""Fine-tuning programs: callers of the one loop."""
