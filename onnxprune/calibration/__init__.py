"""Statistics of activations, gathered over calibration data by ONNX graphs, in bounded memory."""
