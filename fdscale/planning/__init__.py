"""What a run needs before it starts: cross-checks, memory, and how a recipe shrinks. No torch in here."""
