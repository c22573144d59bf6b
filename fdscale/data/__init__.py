"""Shards in, uint8 images out: index, one global sample order, augmentation, loaders, packing."""
