"""Fashion-MNIST from training to a pruned, fine-tuned file: `python -m benchmarks.fashion`."""
