"""Matrix optimizers in several processes."""
