"""The console script: finds the verb, runs it, turns errors into exit codes.

A verb is a module with `USAGE` and `run(argv) -> int`, imported only when it is called, so that `headrace plan` never
loads torch or Ray. Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 3 stopped by a signal after
a checkpoint, 130 interrupted before anything was saved.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TextIO, cast

from headrace.platform.keys import check_text, did_you_mean
from headrace.storage.core.errors import ErrorId, HeadraceError, InputError, MachineError

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2
EXIT_INTERRUPTED = 130  # as a shell says it
HELP = ("-h", "--help")
# Verbs whose results are on the disk: they go on where standard output cannot be written.
RECORDED = (["train"], ["sweep"], ["bench"])
# Only a checkout has it: a link to tests/bench/cases.
BENCHES = "headrace.bench"


@dataclass(frozen=True)
class Verb:
    """One word after `headrace`: where its code is and what it does."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "train": Verb("headrace.platform.cli.train", "train a model (hydra overrides; --resume RUN, --dry-run)"),
    "sweep": Verb("headrace.platform.cli.sweep", "train a grid of runs and compare them: KEY=A,B,C ..."),
    "plan": Verb("headrace.platform.cli.plan", "print the memory plan of a run: no GPU, no Ray"),
    "verify": Verb("headrace.platform.cli.verify", "compare loss and gradients with transformers: hf=DIR"),
    "eval": Verb("headrace.platform.cli.eval", "loss and perplexity by position, at any length: run=DIR | hf=DIR"),
    "data": Verb("headrace.platform.cli.data", "prepare token rows: data prepare source=... out=..."),
    "generate": Verb("headrace.platform.cli.generate", "continue text with a trained model"),
    "export": Verb("headrace.platform.cli.export", "write a trained model as a Hugging Face folder"),
    "report": Verb("headrace.platform.cli.report", "write report.html of a run"),
    "compare": Verb("headrace.platform.cli.compare", "runs side by side: configuration, plan, loss, speed, memory"),
    "doctor": Verb("headrace.platform.cli.doctor", "check this machine: what is wrong, and the remedy"),
    "bench": Verb(f"{BENCHES}.command", "run a named benchmark and record its rows"),
    "dashboard": Verb("headrace.platform.cli.dashboard", "start a local Ray head that keeps running; runs join it"),
    "monitor": Verb(
        "headrace.platform.cli.monitor", "Prometheus with alerts, Grafana's board, a page of the newest run"
    ),
    "mlflow": Verb("headrace.platform.cli.mlflow_ui", "open the MLflow UI on the runs recorded here"),
}


def usage() -> str:
    """The list of verbs, one a line."""
    lines = [f"  {name:<10} {verb.help}" for name, verb in VERBS.items()]
    return "usage: headrace VERB [arguments]\n       headrace --version\n\n" + "\n".join(lines)


class _Output:
    """A standard stream that may be a full disk or a closed pipe; after the first error the rest is left out.

    Args:
        goes_on: writing never fails. Otherwise the error is kept and raised.
    """

    def __init__(self, stream: TextIO, *, goes_on: bool) -> None:
        self._stream, self._goes_on = stream, goes_on
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write what the stream takes."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is waiting."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError, ValueError):  # a stream without a descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if not self._goes_on:
                raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: words after the program name; None takes sys.argv.

    Returns:
        The exit code (see the module docstring).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    output = _Output(sys.stdout, goes_on=args[:1] in RECORDED)
    errors = _Output(sys.stderr, goes_on=True)
    with redirect_stdout(cast(TextIO, output)), redirect_stderr(cast(TextIO, errors)):
        try:
            code = _run_verb(args)
            output.flush()
        except OSError as error:
            if error is not output.error:
                raise
            # The reader of our output went away (`headrace plan | head`): not an error of ours.
            code = EXIT_DONE if isinstance(error, BrokenPipeError) else EXIT_BAD_INPUT
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            remedy = "the results are in its folder" if args[:1] in RECORDED else "send it to another place"
            print(
                f"headrace {' '.join(args[:1])}: standard output cannot be written ({output.error.strerror}): {remedy} "
                f"[{ErrorId.machine_lacks}]",
                file=sys.stderr,
            )
    return code


def _run_verb(args: Sequence[str]) -> int:
    if not args or args[0] in (*HELP, "help"):
        print(usage())
        return EXIT_DONE if args else EXIT_BAD_INPUT
    if args[0] == "--version":
        print(f"headrace {version('headrace')}")
        return EXIT_DONE
    verb = VERBS.get(args[0])
    if verb is None:
        hint = did_you_mean(args[0], VERBS) or "see `headrace --help`"
        print(f"headrace: no verb {args[0]!r}; {hint}", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        check_text(args)
        module = importlib.import_module(verb.module)
        # A prompt is any text.
        if any(word in HELP and before != "--prompt" for before, word in itertools.pairwise(args)):
            print(module.USAGE, end="")
            return EXIT_DONE
        return int(module.run(args[1:]))
    except (InputError, MachineError) as error:
        print(f"headrace {args[0]}: {error} [{error.id}]", file=sys.stderr)
        return EXIT_BAD_INPUT
    except HeadraceError as error:
        print(f"headrace {args[0]}: {error} [{error.id}]", file=sys.stderr)
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        package = (error.name or "headrace").partition(".")[0]
        if error.name == BENCHES:
            lacks = "benchmarks are not installed with the package: run them from a checkout of the repository"
        elif package == "headrace":
            raise
        else:
            lacks = f"it needs the package {package}, which is not installed here: `make setup` installs all there is "
            lacks += "in requirements.lock"
        print(f"headrace {args[0]}: {lacks} [{ErrorId.package_missing}]", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"headrace {args[0]}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
