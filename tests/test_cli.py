"""The command line with the library replaced: options, exit codes, error lines, files, tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxprune import cli, pipeline
from onnxprune.errors import (
    BudgetError,
    InvalidDataError,
    InvalidModelError,
    OnnxPruneError,
    TrainingError,
    VerificationError,
)
from onnxprune.result import CheckReport, Cost, FrozenRow, GroupRow, Inspection, LayerRow, Report

GOLDEN = Path(__file__).parent / "golden"
MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 21]> f (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }'
)
CHECK = CheckReport(True, True, 2.5e-7, 1e-4, 4, "the masked twin", agreement=0.9975)
LAYERS = (
    LayerRow("fc1", "Gemm", (128, 784), (103, 784), 100_480, 80_855, 100_352, 80_752),
    LayerRow("fc2", "Gemm", (10, 128), (10, 103), 1_290, 1_040, 1_280, 1_030),
)
REPORT = Report(
    before=Cost(101_770, 101_632, 408_211, 0.25, {"accuracy": 0.9812, "mse": 0.0}),
    after=Cost(81_895, 81_782, 328_711, 0.2, {"accuracy": 0.9801, "agreement": 0.9975}),
    layers=LAYERS,
    budget={"channels": 0.8},
    options={"criterion": "l2"},
    checks=(CHECK,),
    rebuild=(
        {"step": "pruned", "accuracy": 0.4375, "agreement": 0.44, "mse": 1.5},
        {"step": "finetune", "epochs": 2, "frozen": {"w": "no"}, "seconds_per_epoch": 0.1234567},
    ),
    notes=("2 channels of fc1 were dead",),
    seconds={"total": 1.5},
)
INSPECTION = Inspection(
    cost=Cost(101_770, 101_632, 408_211),
    layers=LAYERS,
    groups=(
        GroupRow("fc2[in]", 4, 1, False, 10, 5, ("b", "a")),
        GroupRow("fc1.weight", 128, 1, True, 101_770, 101_632, ("fc1.weight", "fc1.bias")),
    ),
    frozen=(
        FrozenRow("fc2.bias", 0, "Gemm 'fc2'", "model output", 10, 0),
        FrozenRow("fc2.weight", 0, "Gemm 'fc2'", "model output", 1_280, 1_280),
        FrozenRow("fc1.weight", 1, "Gemm [fc1:0]", "model input", 100_352, 100_352),
    ),
    opset=21,
    inputs=("x float32[N, 784]",),
    outputs=("y float32[N, 10]",),
)


class FakePlan:
    """Stands for the plan of a run."""

    def to_json(self) -> dict[str, str]:
        """Some values."""
        return {"format": "onnxprune-plan"}


class Call:
    """Remembers how it was called; returns `answer`, or raises it."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *args: Any, **options: Any) -> object:
        self.args, self.options = args, options
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], Call]:
    """Replaces a library function: library(name, answer or error)."""

    def put(name: str, answer: object) -> Call:
        call = Call(answer)
        monkeypatch.setattr(pipeline, name, call)
        return call

    return put


def result(report: Report = REPORT) -> Any:
    """A result as prune returns it."""
    from onnxprune.result import Result

    return Result(MODEL, FakePlan(), report)  # type: ignore[arg-type]


def transcript(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a terminal would show for `onnxprune COMMAND`, with errors and exit code marked."""
    capsys.readouterr()
    code = cli.main(command.split())
    shown = capsys.readouterr()
    errors = "".join(f"[stderr] {line}\n" for line in shown.err.splitlines())
    return f"$ onnxprune {command}\n{shown.out}{errors}[exit {code}]\n"


def compare(name: str, text: str) -> None:
    """Compare with the golden file `name`; UPDATE_GOLDEN=1 writes it instead."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("workdir")
class TestTranscripts:
    """What each command prints, compared with files."""

    def test_prune(self, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
        library("prune", result())
        command = "prune in.onnx out.onnx --channels 0.8 --plan p.json --report r.json --layers"
        compare("prune", transcript(command, capsys))

    def test_prune_that_fails_its_check(
        self, library: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        failed = replace(CHECK, passed=False, max_error=0.5, problems=("output y differs",))
        library("prune", result(replace(REPORT, checks=(CHECK, failed))))
        compare("prune_failed", transcript("prune in.onnx out.onnx --channels 0.8", capsys))
        assert not Path("out.onnx").exists()

    @pytest.mark.parametrize("options", ["", "--why", "--layers", "--json"])
    def test_inspect(self, options: str, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
        library("inspect", INSPECTION)
        name = f"inspect{options.replace('--', '_')}"
        compare(name, transcript(f"inspect in.onnx {options}".rstrip(), capsys))

    def test_check(self, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
        library("check", CHECK)
        good = transcript("check a.onnx b.onnx", capsys)
        broken = replace(CHECK, passed=False, structure=False, max_error=None, agreement=None)
        library("check", replace(broken, problems=("node 'c': no such weight 'w'",)))
        compare("check", good + transcript("check a.onnx b.onnx", capsys))

    def test_usage_errors(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("folder").mkdir()
        head = "prune in.onnx out.onnx --channels"
        commands = [
            "prune in.onnx out.onnx",
            f"{head} 0.5 --macs 0.5",
            f"{head} 1.5",
            f"{head} 0",
            f"{head} nan",
            "prune in.onnx out.onnx --size-mb -3",
            f"{head} 0.5 --round-to 0",
            f"{head} 0.5 --min-keep 2",
            f"{head} 0.5 --ranking best",
            f"{head} 0.5 --granularity word",
            f"{head} 0.5 --finetune 3",
            f"{head} 0.5 --finetune -1",
            f"{head} 0.5 --max-drop 1",
            f"{head} 0.5 --max-drop 101 --val v.npz",
            f"{head} 0.5 --max-drop 1 --val v.npz --no-check",
            f"{head} 0.5 --plan out.onnx",
            f"{head} 0.5 --report r.txt",
            "prune in.onnx folder --channels 0.5",
            "prune in.onnx missing/out.onnx --channels 0.5",
            "apply in.onnx missing.json out.onnx",
            "check a.onnx b.onnx --tolerance -1",
        ]
        compare("usage_errors", "".join(transcript(command, capsys) for command in commands))

    @pytest.mark.parametrize(
        ("command", "named"),
        [
            ("prune in.onnx out.onnx --channels half", "--channels"),
            ("prune in.onnx out.onnx --channels 0.5 --scope some", "'exact', 'all'"),
            ("prune in.onnx out.onnx --channels 0.5 --threads 0", "--threads"),
            ("prune in.onnx out.onnx --channels 0.5 --nonsense", "--nonsense"),
            ("prune in.onnx", "OUT.onnx"),
            ("frobnicate", "frobnicate"),
        ],
    )
    def test_parser_errors(
        self, command: str, named: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The words are the parser's own, so only what matters is compared."""
        assert cli.main(command.split()) == 2
        line = capsys.readouterr().err
        assert line.startswith("onnxprune: error: ")
        assert line.count("\n") == 1
        assert named in line


@pytest.mark.usefixtures("workdir")
class TestPrune:
    """What reaches the library, and what is written."""

    def test_defaults(self, library: Any) -> None:
        call = library("prune", result())
        assert cli.main(["prune", "in.onnx", "out.onnx", "--macs", "0.5"]) == 0
        assert call.args == (Path("in.onnx"),)
        listener = call.options.pop("progress")
        assert (listener.stage("score", 3), listener.step(1, loss=0.5)) == (None, None)
        assert call.options == {
            "channels": None,
            "macs": 0.5,
            "params": None,
            "size_mb": None,
            "scope": "all",
            "criterion": None,
            "round_to": 1,
            "min_keep": 0.1,
            "ranking": None,
            "granularity": "head",
            "vocab_keep": None,
            "vocab_unknown": 0,
            "keep": (),
            "data": None,
            "val": None,
            "repair": "auto",
            "finetune": 0,
            "steps": 1,
            "max_drop": None,
            "lossless": None,
            "simplify": False,
            "check": True,
            "seed": 0,
            "threads": None,
        }

    def test_options(self, library: Any) -> None:
        call = library("prune", result())
        command = (
            "prune in.onnx out.onnx --size-mb 2.5 --scope exact --criterion fpgm --round-to 8 "
            "--min-keep 0.2 --ranking isomorphic "
            "--granularity head-dim,vocab --vocab-keep ids.txt --vocab-unknown 3 "
            "--keep stem* --keep head* --data d.npz --val v.npz --repair bias "
            "--finetune 3 --max-drop 1 --simplify --seed 7 --threads 2 -q"
        )
        assert cli.main(command.split()) == 0
        del call.options["progress"]
        assert call.options == {
            "channels": None,
            "macs": None,
            "params": None,
            "size_mb": 2.5,
            "scope": "exact",
            "criterion": "fpgm",
            "round_to": 8,
            "min_keep": 0.2,
            "ranking": "isomorphic",
            "granularity": "head-dim,vocab",
            "vocab_keep": Path("ids.txt"),
            "vocab_unknown": 3,
            "keep": ("stem*", "head*"),
            "data": "d.npz",
            "val": "v.npz",
            "repair": "bias",
            "finetune": 3,
            "steps": 1,
            "max_drop": 1.0,
            "lossless": None,
            "simplify": True,
            "check": True,
            "seed": 7,
            "threads": 2,
        }

    def test_checks_can_be_left_out(self, library: Any) -> None:
        call = library("prune", result())
        assert cli.main(["prune", "in.onnx", "out.onnx", "--macs", "0.5", "--no-check"]) == 0
        assert call.options["check"] is False

    @pytest.mark.parametrize("name", ["channels", "macs", "params"])
    def test_a_budget_of_one_is_allowed(self, name: str, library: Any) -> None:
        call = library("prune", result())
        assert cli.main(["prune", "in.onnx", "out.onnx", f"--{name}", "1"]) == 0
        assert call.options[name] == 1

    def test_output_may_be_the_input(self, library: Any) -> None:
        library("prune", result())
        onnx.save(MODEL, "in.onnx")
        assert cli.main(["prune", "in.onnx", "in.onnx", "--macs", "0.5"]) == 0
        assert onnx.load("in.onnx") == MODEL

    def test_files(self, library: Any) -> None:
        library("prune", result())
        command = "prune in.onnx out.onnx --macs 0.5 --plan p.json --report r.json"
        assert cli.main(command.split()) == 0
        assert onnx.load("out.onnx") == MODEL
        assert json.loads(Path("p.json").read_text()) == {"format": "onnxprune-plan"}
        report = json.loads(Path("r.json").read_text())
        assert report["after"]["params"] == 81_895
        assert report["checks"][0]["max_error"] == 2.5e-7
        assert sorted(os.listdir()) == ["out.onnx", "p.json", "r.json"]

    def test_all_files_or_none(
        self, library: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(*_: object) -> None:
            raise OnnxPruneError("no space left while writing out.onnx")

        library("prune", result())
        monkeypatch.setattr("onnxprune.io.save", full)
        Path("p.json").write_text("old")
        command = "prune in.onnx out.onnx --macs 0.5 --plan p.json --report r.json"
        assert cli.main(command.split()) == 2
        assert capsys.readouterr().err == "onnxprune: error: no space left while writing out.onnx\n"
        assert os.listdir() == ["p.json"]
        assert Path("p.json").read_text() == "old"


@pytest.mark.usefixtures("workdir")
class TestErrors:
    """One line on standard error, the right exit code, and files left alone."""

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (InvalidModelError("in.onnx: not an ONNX file"), 2),
            (InvalidDataError("d.npz: no array 'x'"), 2),
            (TrainingError("no training runtime;\n  run 'onnxprune setup-training'"), 2),
            (BudgetError("--macs 0.1: 0.23 is reachable"), 1),
            (VerificationError("accuracy fell by 3.1 points"), 1),
            (FileNotFoundError(2, "No such file or directory", "in.onnx"), 2),
            (OSError(28, "No space left on device"), 2),
        ],
    )
    def test_line_and_code(
        self, error: Exception, code: int, library: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        library("prune", error)
        Path("out.onnx").write_text("old")
        assert cli.main(["prune", "in.onnx", "out.onnx", "--macs", "0.5"]) == code
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("onnxprune: error: ")
        assert shown.err.count("\n") == 1
        known = error.strerror if isinstance(error, OSError) else str(error)
        assert " ".join(str(known).split()) in shown.err
        assert Path("out.onnx").read_text() == "old"
        assert os.listdir() == ["out.onnx"]

    def test_internal_error_is_short(
        self, library: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        library("inspect", KeyError("conv1"))
        assert cli.main(["inspect", "in.onnx"]) == 3
        line = capsys.readouterr().err
        assert line.startswith("onnxprune: error: internal: KeyError: 'conv1' at test_cli.py:")
        assert "please report" in line
        assert line.count("\n") == 1

    @pytest.mark.parametrize("way", ["option", "variable", "off"])
    def test_traceback_only_where_asked(
        self,
        way: str,
        library: Any,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        library("inspect", ValueError("odd"))
        monkeypatch.setenv("ONNXPRUNE_DEBUG", "1" if way == "variable" else "0")
        option = ["--debug"] if way == "option" else []
        assert cli.main(["inspect", "in.onnx", *option]) == 3
        assert ("Traceback" in capsys.readouterr().err) == (way != "off")

    def test_interrupt(self, library: Any, capsys: pytest.CaptureFixture[str]) -> None:
        library("prune", KeyboardInterrupt())
        assert cli.main(["prune", "in.onnx", "out.onnx", "--macs", "0.5"]) == 130
        assert "interrupted" in capsys.readouterr().err
        assert os.listdir() == []

    def test_interrupt_of_a_process(self) -> None:
        script = (
            "import signal, sys, time; from onnxprune import cli, pipeline\n"
            # a shell that starts the tests in the background has SIGINT ignored
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "def wait(*a, **k): print('ready', flush=True); time.sleep(60)\n"
            "pipeline.inspect = wait\n"
            "sys.exit(cli.main(['inspect', 'in.onnx']))"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            errors = process.stderr.read().decode()
            assert process.wait(timeout=20) == 130
        assert errors == "onnxprune: error: interrupted; existing files are as they were\n"

    def test_every_library_error_has_a_documented_code(self) -> None:
        kinds = [OnnxPruneError, *OnnxPruneError.__subclasses__()]
        assert {kind.exit_code for kind in kinds} == {1, 2}


class TestTop:
    """The program itself."""

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("onnxprune 0.")

    def test_no_command_shows_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 2
        assert "setup-training" in capsys.readouterr().out

    def test_help_names_every_option(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        assert cli.main(["prune", "--help"]) == 0
        shown = capsys.readouterr().out
        options = (
            "channels macs params size-mb scope criterion round-to min-keep keep data val "
            "repair finetune max-drop plan report no-check seed threads"
        )
        assert [name for name in options.split() if f"--{name} " not in shown] == []

    def test_setup_training(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        call = Call(Path("/somewhere/training"))
        monkeypatch.setattr("onnxprune.training.setup_training", call)
        assert cli.main(["setup-training"]) == 0
        assert capsys.readouterr().out == "training runtime: /somewhere/training\n"

    def test_help_is_quick_and_imports_nothing_heavy(self) -> None:
        script = (
            "import sys; from onnxprune import cli; cli.main(['--help'])\n"
            "heavy = {'numpy', 'onnx', 'onnxruntime', 'scipy', 'onnx_graphsurgeon', 'pydantic'}\n"
            "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
        )
        times = []
        for _ in range(3):
            start = sum(os.times()[2:4])  # of children: what else runs does not count
            subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
            times.append(sum(os.times()[2:4]) - start)
        assert min(times) < 0.5
