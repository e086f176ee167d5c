"""Shared-memory rings: how packets travel between processes."""
