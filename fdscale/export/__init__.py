"""A finished student in another library's format."""
