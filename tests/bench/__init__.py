"""The benchmark: us and the peers in turn, on traffic of its own. `python -m bench --help`, with tests/ on the path."""
