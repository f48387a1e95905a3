"""Accuracy after every stage, beside Torch-Pruning: `python -m benchmarks.accuracy`."""
