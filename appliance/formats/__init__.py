"""Capture file formats: readers and writers."""
