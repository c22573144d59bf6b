"""Object detection: Mask R-CNN and Cascade Mask R-CNN on a student, and how they are judged."""
