"""A run: from a configuration to a page."""
