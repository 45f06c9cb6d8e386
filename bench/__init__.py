"""Benchmarks: data sets, metrics, baselines, speed and memory. Nothing in the engine imports this package."""
