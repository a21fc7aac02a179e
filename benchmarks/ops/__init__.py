"""One benchmark per op: `bench_<op>.py` defines BENCH (see benchmarks/bench.py)."""
