"""Student networks: a torch-free table of geometries, and their builders."""
