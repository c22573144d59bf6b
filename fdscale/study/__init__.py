"""The paper in miniature: teachers, students with and without each ingredient, fine-tuned; and what came of it."""
