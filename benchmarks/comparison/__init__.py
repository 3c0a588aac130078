"""Modules of the benchmark scripts: the comparison with other servers, and programs that repeat one op."""
