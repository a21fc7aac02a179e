"""One benchmark per layer: `bench_<layer>.py` defines BENCH (see benchmarks/bench.py)."""
