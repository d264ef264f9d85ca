"""Token shards: made from a source once, read by every run as a pure function of (seed, step). No torch here."""
