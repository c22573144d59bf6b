"""Semantic segmentation on a student: networks, losses, evaluation."""
