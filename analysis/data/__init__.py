"""Tables of runs: reading, checking, cells."""
