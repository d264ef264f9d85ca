"""Campaign files as strict values."""
