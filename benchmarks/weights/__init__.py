"""Single weights: accuracy after `prune-weights` and after onnxsim's SparseGPT, side by side."""
