"""The implementation of ``truffula bench``: load, client and results, and the benchmark of one step."""
