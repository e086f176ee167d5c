"""Counters to metrics, status page and control socket."""
