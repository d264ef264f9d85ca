"""Token shards: prepared once from a source, read by every run as a function of seed and step. Imports no torch."""
