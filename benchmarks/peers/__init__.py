"""onnxprune beside other pruners, on the same networks. See `benchmarks.peers.__main__`."""
