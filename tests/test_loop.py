"""Channels come back until the promise holds: the search, what is given back, the transcripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune import apply, io, pipeline, prune, runtime
from onnxprune.analysis import analyse
from onnxprune.choosing import Chooser
from onnxprune.errors import InvalidRecipeError
from onnxprune.granularity import HEADS
from onnxprune.loop import ATTEMPTS, Trial, search
from onnxprune.options import Options
from onnxprune.passes.select import Budget, BudgetKind, Limits
from onnxprune.result import Result
from tests.test_cli_library import compare, transcript


@pytest.fixture(autouse=True)
def _brief_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies that nobody reads need no precision."""
    monkeypatch.setattr(runtime, "latencies_ms", partial(runtime.latencies_ms, budget_s=0.02))


@pytest.fixture
def digits(workdir: Path, models_dir: Path) -> Path:
    """The working directory with a small model, its data, and images without labels."""
    shutil.copy(models_dir / "digits_mlp.onnx", "in.onnx")
    shutil.copy(models_dir / "digits_test.npz", "test.npz")
    with np.load("test.npz") as data:
        np.savez("images.npz", **{n: data[n] for n in data.files if n != "y"})
    return workdir


class Fake:
    """A model of which shares can be left in steps, and what it then loses: `lost(share)`."""

    def __init__(self, lost: Callable[[float], float], steps: int = 1000, limit: float = 1) -> None:
        self.lost, self.steps, self.limit = lost, steps, limit
        self.asked: list[float] = []
        self.known: dict[int, Trial] = {}

    def __call__(self, budget: float) -> Trial | None:
        self.asked.append(budget)
        kept = int(budget * self.steps + 1e-9)
        if kept == self.steps:
            return None
        if kept not in self.known:
            drop = self.lost(kept / self.steps)
            passed = drop <= self.limit
            reached = kept / self.steps
            self.known[kept] = Trial(budget, reached, kept, kept, "accuracy", 1, drop, passed)
        return self.known[kept]


def test_a_goal_that_keeps_the_promise_is_the_only_attempt() -> None:
    (trial,) = search(Fake(lambda _: 0.5), 0.25, 1.0)
    assert (trial.passed, trial.reached) == (True, 0.25)


@pytest.mark.parametrize("least", [0.11, 0.3, 0.5, 0.77])
def test_the_smallest_that_holds_is_approached(least: float) -> None:
    fake = Fake(lambda share: 0.0 if share >= least else 5.0)
    trials = search(fake, 0.1, 1.0)
    best = min(t.reached for t in trials if t.passed)
    assert len(trials) == ATTEMPTS
    assert least <= best <= least * 10 ** (1 / 32) + 0.001


def test_no_attempt_holds() -> None:
    trials = search(Fake(lambda _: 2.0), 0.5, 1.0, limit=4)
    assert [t.passed for t in trials] == [False] * 4
    reached = [t.reached for t in trials]
    assert reached == sorted(reached)


def test_a_choice_is_tried_once() -> None:
    fake = Fake(lambda share: 0.0 if share > 0.5 else 5.0, steps=4)
    trials = search(fake, 0.25, 1.0)
    assert [t.params for t in trials] == [1, 2, 3]
    assert len(fake.asked) > 3


def test_what_removes_nothing_is_no_result() -> None:
    fake = Fake(lambda _: 5.0, steps=2)
    trials = search(fake, 0.5, 1.0)
    assert [t.params for t in trials] == [1]
    assert not trials[0].passed
    assert search(fake, 1.0, 1.0) == ()


def test_below_what_removes_nothing_the_search_goes_on() -> None:
    fake = Fake(lambda share: 0.0 if share >= 0.3 else 5.0)
    trials = search(lambda budget: None if budget > 0.45 else fake(budget), 0.25, 1.0)
    assert 0.3 <= min(t.reached for t in trials if t.passed) < 0.32


def test_without_a_metric_nothing_is_given_back() -> None:
    nothing = Trial(0.5, 0.5, 1, 1, None, None, None, False)
    assert search(lambda _: nothing, 0.5, 1.0) == (nothing,)


def test_what_was_left_out_by_the_limits_is_where_the_search_begins() -> None:
    """A goal of 0 reaches what the limits allow: 0.2 here; nothing below that is asked for."""
    fake = Fake(lambda share: 0.0 if share >= 0.4 else 5.0)
    trials = search(lambda budget: fake(max(budget, 0.2)), 0.0, 1.0)
    assert min(fake.asked) == 0.2
    assert 0.4 <= min(t.reached for t in trials if t.passed) < 0.43


@pytest.mark.parametrize("kind", ["channels", "macs", "params", "size-mb"])
def test_a_larger_budget_keeps_what_a_smaller_one_kept(kind: BudgetKind, models_dir: Path) -> None:
    analysis = analyse(io.load(models_dir / "digits_cnn.onnx"))
    whole = analysis.cost.size_mb(analysis.everything) if kind == "size-mb" else 1.0
    limits = Limits()
    options = Options(Budget(kind, 1), limits, "l2", (), HEADS, 0, None, True, 0, 1)
    chooser = Chooser(analysis, options, [], None)
    before = np.zeros(analysis.cost.units, bool)
    for share in (0.2, 0.35, 0.5, 0.8, 0.95):
        keep = chooser.select(Budget(kind, share * whole))
        assert not (before & ~keep).any()
        assert keep.sum() > before.sum()
        before = keep


def run(source: Path | str = "in.onnx", **options: Any) -> Result:
    """`prune` on one thread, measured on the held-out digits, without repair."""
    options = {"val": "test.npz", "repair": "none", "threads": 1, **options}
    return prune(source, **options)


@pytest.mark.usefixtures("digits")
class TestDigits:
    """A trained perceptron, before any repair."""

    def test_regrown(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = "prune in.onnx out.onnx --channels 0.3 --max-drop 11 --val test.npz --threads 1"
        command += " --repair none --plan p.json --report r.json"
        compare("prune_regrown", transcript(command, capsys))
        report = json.loads(Path("r.json").read_text(encoding="utf-8"))
        kept = [t for t in report["attempts"] if t["passed"]]
        assert report["budget"]["target"] == 0.3
        assert report["budget"]["reached"] == min(t["reached"] for t in kept)
        assert report["after"]["params"] == min(t["params"] for t in kept)
        assert cli_replays("out.onnx", "p.json")
        # The plan tells the budget that was chosen under, not the one that was asked for.
        plan = json.loads(Path("p.json").read_text(encoding="utf-8"))
        assert plan["options"]["budget"]["channels"] == kept[-1]["budget"]

    def test_nothing_holds(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = "prune in.onnx out.onnx --channels 0.1 --max-drop 0 --val test.npz --threads 1"
        compare("prune_unkept", transcript(f"{command} --repair none --plan p.json", capsys))
        assert not Path("out.onnx").exists()
        assert not Path("p.json").exists()

    def test_what_is_given_back_has_its_original_weights(self) -> None:
        result = run(channels=0.3, max_drop=11)
        assert len(result.report.attempts) == ATTEMPTS
        alone = run(channels=result.plan.options["budget"]["channels"])
        assert result.plan == alone.plan
        assert result.model == alone.model
        assert alone.report.attempts == ()

    def test_no_budget_goes_as_far_as_the_promise(self) -> None:
        result = run(max_drop=20, min_keep=0.2)
        first, *others = result.report.attempts
        assert first["reached"] == result.report.budget["target"] < 0.2
        assert result.report.budget["kind"] == "macs"
        assert result.report.budget["reached"] == min(t["reached"] for t in others if t["passed"])
        assert not any("not reached" in note for note in result.report.notes)

    def test_a_promise_that_holds_at_once(self) -> None:
        result = run(channels=0.9, max_drop=30)
        assert result.report.attempts == ()
        assert result.plan == run(channels=0.9).plan

    def test_without_labels_agreement_counts(self) -> None:
        result = run(macs=0.3, max_drop=10, val="images.npz")
        assert {t["metric"] for t in result.report.attempts} == {"agreement"}
        assert result.report.checks[-1].passed
        assert result.report.after.metrics["agreement"] >= 0.9

    def test_rounding_leaves_few_choices_of_which_none_repeats(self) -> None:
        attempts = run(channels=0.2, max_drop=0.5, round_to=32).report.attempts
        left = [t["params"] for t in attempts]
        assert 1 < len(set(left)) == len(left)

    def test_twice_the_same(self) -> None:
        first, second = (run(macs=0.2, max_drop=10) for _ in range(2))
        assert first.report.attempts == second.report.attempts
        assert first.model == second.model

    def test_a_size_is_told_in_megabytes(self) -> None:
        result = run(size_mb=0.02, max_drop=10)
        (note,) = (n for n in result.report.notes if "not reached" in n)
        assert note.startswith("--size-mb 0.02 was not reached: 0.0")
        assert " MB is left, 0.0" in note
        assert len(result.model.SerializeToString()) < 77_000

    def test_a_group_that_fails_its_check_stays_whole_in_every_attempt(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from onnxprune import choosing

        true = choosing.examine
        bad = analyse(io.load("in.onnx")).groups[0]

        def examine(coupling: Any, keep: Any, *others: Any) -> Any:
            verdict = true(coupling, keep, *others)
            if keep[bad.units].all():
                return verdict
            return replace(verdict, error=1.0, problems=("it differs",))

        monkeypatch.setattr(choosing, "examine", examine)
        result = run(channels=0.3, max_drop=11)
        assert result.report.attempts
        assert result.report.checks[0].faulty == (bad.name,)
        assert result.plan.groups[0].removed == ()
        assert sum("failed the check" in note for note in result.report.notes) == 1


def cli_replays(model: str, plan: str) -> bool:
    """The plan makes the same model again."""
    from onnxprune.plan import Plan

    text = Path(plan).read_text(encoding="utf-8")
    return bool(apply("in.onnx", Plan.from_json(text)) == io.load(model))


def test_a_promise_needs_data(digits: Path) -> None:
    with pytest.raises(InvalidRecipeError, match="--max-drop needs data to measure with"):
        prune("in.onnx", macs=0.5, max_drop=1)
    with pytest.raises(InvalidRecipeError, match=r"must be in \[0, 100\] points"):
        prune("in.onnx", macs=0.5, max_drop=-1, val="test.npz")


def test_sensitivity_of_each_group(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = transcript("inspect in.onnx --sensitivity --data images.npz --threads 1", capsys)
    rows = pipeline.inspect("in.onnx", data="images.npz", threads=1).sensitivity
    changes = [row.change or 0.0 for row in rows]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] > 0
    assert "| sensitivity of group | units | removed | output change |" in text
    assert all(f"| {row.group} | {row.units} | {row.removed} |" in text for row in rows)
    assert "[exit 0]" in text
    text = transcript("inspect in.onnx --sensitivity", capsys)
    assert "--sensitivity measures outputs: add --data SRC\n[exit 2]" in text
