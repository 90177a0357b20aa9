"""How good a router is: benchmarks, contamination, metrics with intervals, plots."""
