"""Rings to one ordered stream of published files."""
