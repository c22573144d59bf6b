"""Where a run lives: ranks, stop signals and the launcher. No torch in here."""
