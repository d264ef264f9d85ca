"""A study as text, tables and a page."""
