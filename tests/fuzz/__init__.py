"""Fuzzing: `./bootstrap fuzz`, and its bounded part in the suite (test_fuzz.py)."""
