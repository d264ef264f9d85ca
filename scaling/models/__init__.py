"""Models that a run can train, one row each in `registry.FAMILIES`."""
