"""Models that a run can train, one family a file."""
