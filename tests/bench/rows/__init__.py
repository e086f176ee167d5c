"""One module for each row (or neighbouring rows) of the table of targets: NAME, TITLE, NEEDS_ROOT and `run`."""
