"""Why distillation works: what networks attend to, what their features are like, and how flat their losses lie."""
