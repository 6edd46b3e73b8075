"""Benchmarks that anyone can run from the command line."""
