"""Feature distillation of giant vision models under DeepSpeed (Wei et al., arXiv 2205.14141)."""

__version__ = "0.1.0"
