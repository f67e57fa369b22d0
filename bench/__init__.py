"""Load generators and benchmarks: what the pair costs, how it behaves under load; bench/README.md explains."""
