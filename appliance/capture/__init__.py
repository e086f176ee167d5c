"""Packet sources: live interfaces and files, written into rings."""
