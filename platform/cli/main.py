"""The console script: finds the verb, runs it, turns errors into exit codes.

A verb is a module with `run(argv) -> int`, imported only when it is called, so that `headrace plan` never
loads torch or Ray. Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 3 stopped by a signal after
a checkpoint, 130 interrupted before anything was saved.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from headrace.platform.keys import check_text, did_you_mean
from headrace.storage.core.errors import ErrorId, HeadraceError, InputError, MachineError

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 0, 1, 2, 3
EXIT_INTERRUPTED = 130  # as a shell says it


@dataclass(frozen=True)
class Verb:
    """One word after `headrace`: where its code is and what it does."""

    module: str
    help: str


VERBS: dict[str, Verb] = {
    "train": Verb("headrace.platform.cli.train", "train a model (hydra overrides; --resume RUN, --dry-run)"),
    "plan": Verb("headrace.platform.cli.plan", "print the memory plan of a run: no GPU, no Ray"),
    "verify": Verb("headrace.platform.cli.verify", "compare loss and gradients with transformers: hf=DIR"),
    "data": Verb("headrace.platform.cli.data", "prepare token rows: data prepare source=... out=..."),
    "generate": Verb("headrace.platform.cli.generate", "continue text with a trained model"),
    "export": Verb("headrace.platform.cli.export", "write a trained model as a Hugging Face folder"),
    "report": Verb("headrace.platform.cli.report", "write report.html of a run"),
    "doctor": Verb("headrace.platform.cli.doctor", "what this machine can do, what is wrong, and the remedy"),
    "bench": Verb("headrace.platform.cli.bench", "run a named benchmark and record its rows"),
    "dashboard": Verb("headrace.platform.cli.dashboard", "start a local Ray head that stays; runs join it"),
    "mlflow": Verb("headrace.platform.cli.mlflow_ui", "open the MLflow UI on the runs recorded here"),
}


def usage() -> str:
    """The list of verbs, one a line."""
    lines = [f"  {name:<10} {verb.help}" for name, verb in VERBS.items()]
    return "usage: headrace VERB [arguments]\n       headrace --version\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: words after the program name; None takes sys.argv.

    Returns:
        The exit code (see the module docstring).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
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
        return int(importlib.import_module(verb.module).run(args[1:]))
    except (InputError, MachineError) as error:
        print(f"headrace {args[0]}: {error} [{error.id}]", file=sys.stderr)
        return EXIT_BAD_INPUT
    except HeadraceError as error:
        print(f"headrace {args[0]}: {error} [{error.id}]", file=sys.stderr)
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        package = (error.name or "headrace").partition(".")[0]
        if package == "headrace":
            raise
        print(
            f"headrace {args[0]}: it needs the package {package}, which is not installed here: `make setup` installs "
            f"all there is in requirements.lock [{ErrorId.package_missing}]",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"headrace {args[0]}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`headrace plan | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
