"""Images with labels for every pixel or object: the real layouts of ADE20K and COCO, augmentation, batches."""
