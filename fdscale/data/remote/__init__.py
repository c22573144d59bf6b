"""Shards behind URLs: which may be opened, how they are fetched into a node's bounded cache, and ahead of their use."""
