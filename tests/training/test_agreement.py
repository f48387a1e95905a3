"""Both backends give the gradients of a real export; each is the other's test."""

from __future__ import annotations

import numpy as np
import pytest

from models import zoo
from onnxprune import runtime
from onnxprune.training.autodiff.local import LocalWorker
from onnxprune.training.backend import WorkerTrainer
from onnxprune.training.client import Worker
from onnxprune.training.legalise import legalise
from onnxprune.training.loss import append_loss, plan_objective


@pytest.mark.parametrize("name", ["hf-gpt2-dyn", "misc-gru-dyn"])
def test_gradients_of_both_backends_agree(name: str, worker: Worker) -> None:
    model = zoo.load(name)
    feeds = runtime.working_feeds(model, threads=1)[0]
    outputs = runtime.run(runtime.session(model, threads=1), feeds)
    rng = np.random.default_rng(0)
    teacher = {n: o + rng.standard_normal(o.shape).astype("f4") for n, o in outputs.items()}
    graph = legalise(model, sizes={n: a.shape for n, a in feeds.items()})
    objective = plan_objective(
        graph.draft, outputs, None, has_teacher=True, alpha=1.0, temperature=1.0
    )
    append_loss(graph.draft, objective)
    batch = {**feeds, **objective.feeds(None, teacher)}
    one, other = (
        WorkerTrainer(source, graph, optimizer={"name": "sgd"}).grads(batch)[1]
        for source in (worker, LocalWorker())
    )
    for parameter, gradient in one.items():
        scale = float(np.abs(gradient).max())
        np.testing.assert_allclose(
            other[parameter], gradient, rtol=0, atol=1e-4 * scale + 1e-9, err_msg=parameter
        )
