"""Sources of text, one row each in `registry.SOURCES`."""
