"""Commands, the local supervisor and the benchmarks."""
