"""``python -m ecomlib COMMAND``: train, evaluate, compare, search, calibrate, export and serve."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "meta-train an algorithm on a task family: progress, metrics, checkpoints, resuming",
    "evaluate": "test a run on held-out tasks: table with intervals, picture, JSON",
    "compare": "compare runs on the same tasks and the same luck",
    "search": "search settings (Optuna): resumable, with pruning and a picture of importance",
    "calibrate": "fit a task family to a table of sales",
    "export": "write a policy for serving, as ONNX or torch.export",
    "serve": "answer decisions over HTTP and adapt to feedback",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. 2: the request cannot be met, and the message on stderr says why."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--"]:  # `torchrun -m ecomlib -- train`: what ends the options of torchrun is passed on
        arguments = arguments[1:]
    parser = argparse.ArgumentParser("python -m ecomlib", description="Policies that adapt, for e-commerce decisions.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    chosen = parser.parse_args(arguments[:1])  # the rest is the command's own
    try:
        return importlib.import_module(f"ecomlib.cli.{chosen.command}").main(arguments[1:])
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"diverged: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
