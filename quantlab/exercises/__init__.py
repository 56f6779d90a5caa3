"""One file a notebook: its exercises, with hints, solutions and the tests that judge answers."""
