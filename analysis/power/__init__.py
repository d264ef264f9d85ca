"""Power analysis: synthetic studies of a planned campaign."""
