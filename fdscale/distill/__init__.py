"""Feature distillation itself: targets, loss and the module that is trained."""
