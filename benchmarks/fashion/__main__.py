"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.fashion.run import NETWORKS, Options, measure, require_data, show, write
from onnxprune.errors import OnnxPruneError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def options() -> Options:
    """The options as given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fashion", description=__doc__)
    parser.add_argument("--model", choices=sorted(NETWORKS), default="resnet")
    parser.add_argument("--data", type=Path, default=DEBIAN, help="folder of the IDX files")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training from scratch")
    parser.add_argument("--finetune", type=int, default=1, help="epochs of fine-tuning")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--macs", type=float, help="share of the MACs to keep")
    budget.add_argument("--channels", type=float, help="share of each layer's channels to keep")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--round-to", type=int, default=1, help="channels are multiples of this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("out"), help="where models are kept")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given = vars(parser.parse_args())
    if given["macs"] is None and given["channels"] is None:
        given["macs"] = 0.5
    return Options(**given)


def main() -> int:
    """Run the benchmark; its exit code."""
    try:
        given = options()
        require_data(given.data)
        result = measure(given)
    except OnnxPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(result)
    print(f"written to {write(result, given.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
