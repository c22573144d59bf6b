"""Packing: images from wherever they lie into shuffled tar shards with an index."""
