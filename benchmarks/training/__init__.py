"""Cost of a training step beside PyTorch: `python -m benchmarks.training`."""
