"""Teachers: a torch-free table of them, the frozen network itself, and the readers of their weights."""
