"""Speed, measured: `python -m benchmarks` runs everything and keeps the figures in `benchmarks/results/`."""
