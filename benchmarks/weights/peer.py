"""Run in the peers' environment: IN.onnx CALIBRATION.npz SPARSITY N M OUT.onnx; N = 0 for none."""

import sys

import numpy as np
import onnx
import onnxsim

BATCH = 64

source, data, sparsity, n, m, target = sys.argv[1:]
with np.load(data) as stored:
    arrays = {name: stored[name] for name in stored.files}
count = len(next(iter(arrays.values())))
batches = [
    {name: value[start : start + BATCH] for name, value in arrays.items()}
    for start in range(0, count, BATCH)
]
pattern = {"n": int(n), "m": int(m)} if int(n) else {"sparsity": float(sparsity)}
onnx.save(onnxsim.apply_sparsegpt_pruning(source, calibration_data=batches, **pattern), target)
