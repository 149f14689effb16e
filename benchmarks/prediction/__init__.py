"""How well does the cost model predict? See `python -m benchmarks.prediction --help`."""
