"""Token shards, where their text comes from, and which tokens batch k holds."""
