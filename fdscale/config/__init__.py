"""Every setting, typed, frozen and strict; recipes, DeepSpeed JSONs and their errors. No torch in here."""
