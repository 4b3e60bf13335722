"""The child process of one family of contenders: it builds their cases and runs passes on request.

    python -m headrace.bench.kernel_child

reads one JSON object per line from its standard input and answers each with one on its standard output:

    {"do": "prepare", "case": {...}}    first pass, errors against the oracle, memory -> {"numbers": {...}, "facts": {}}
    {"do": "round", "name": NAME}       medians of a few passes                       -> {"numbers": {...}}
    {"do": "drop"}                      forget all cases and give their memory back   -> {}

An exception becomes {"error": TEXT}; `"lost": true` with it says that the process cannot be used any more.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from headrace.bench.kernel_case import MIB, Case, NotHere, Shared, Task
from headrace.platform.children import tell

BUILDERS = {
    "loss": "headrace.bench.kernel_loss",
    "attention": "headrace.bench.kernel_attention",
    "block": "headrace.bench.kernel_block",
    "codec": "headrace.bench.kernel_codec",
}
WARM_UP_PASSES = 2
# Passes of a round: as many as take about so long, at least 1.
ROUND_S, MOST_PASSES = 0.02, 20
# On CUDA every pass begins behind a pause of the device of this many clock cycles (about 0.3 ms), in which the host
# queues its work: what is timed is the device, unless a contender waits for it.
PAUSE_CYCLES = 500_000


class Bench:
    """The cases that are ready in this process."""

    def __init__(self) -> None:
        self._ready: dict[str, tuple[Task, torch.device, int]] = {}
        self._shared: dict[str, Shared] = {}

    def prepare(self, case: Case) -> dict[str, Any]:
        """Build a case, check its first pass, warm it up, measure its memory.

        Returns:
            numbers: errors, extra_mib (None on the CPU); facts: for the row's config.

        Raises:
            NotHere: the contender cannot compute it. Whatever else the contender raises.
        """
        shared = self._shared.setdefault(case.group, Shared())
        device = case.torch_device
        task: Task = importlib.import_module(BUILDERS[case.part]).build(case, shared)
        numbers: dict[str, float | None] = dict(_checked(task))
        for _ in range(WARM_UP_PASSES):
            _timed_pass(task, device)
        numbers["extra_mib"] = _extra_mib(task, device)
        pass_s = _timed_pass(task, device)[2] / 1e3
        passes = max(1, min(MOST_PASSES, int(ROUND_S / max(pass_s, 1e-9))))
        self._ready[case.name] = (task, device, passes)
        return {
            "numbers": numbers,
            "facts": {**task.facts, "passes_per_round": passes, "num_threads": torch.get_num_threads()},
        }

    def round(self, name: str) -> dict[str, Any]:
        """Medians over the passes of a round, in milliseconds, and rates where the task has bytes."""
        task, device, passes = self._ready[name]
        each = [_timed_pass(task, device) for _ in range(passes)]
        forward, backward, total = (statistics.median(times) for times in zip(*each, strict=True))
        has_backward = task.backward is not None
        numbers: dict[str, float | None] = {
            "forward_ms": forward,
            "backward_ms": backward if has_backward else None,
            "total_ms": total,
        }
        for word, one_ms, amount in (
            ("forward_gbps", forward, task.forward_bytes / 1e6),
            ("backward_gbps", backward, task.backward_bytes / 1e6),
            ("forward_tflops", forward, task.forward_flops / 1e9),
            ("backward_tflops", backward, task.backward_flops / 1e9),
        ):
            if amount:
                numbers[word] = amount / one_ms
        _free(device)
        return {"numbers": numbers}

    def drop(self) -> dict[str, Any]:
        """Forget everything."""
        self._ready.clear()
        self._shared.clear()
        _free(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return {}

    def answer(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """One request; see the module's docstring."""
        if words["do"] == "prepare":
            return self.prepare(Case.from_json(words["case"]))
        if words["do"] == "round":
            return self.round(words["name"])
        return self.drop()


def _checked(task: Task) -> Mapping[str, float]:
    """The errors of a first pass."""
    _clear(task)
    result = task.forward()
    if task.backward is not None:
        task.backward(result)
    return task.check(result)


def _timed_pass(task: Task, device: torch.device) -> tuple[float, float, float]:
    """Milliseconds of forward, backward and both."""
    _clear(task)
    if device.type == "cuda":
        return _timed_on_cuda(task, device)
    begin = time.perf_counter()
    result = task.forward()
    middle = time.perf_counter()
    if task.backward is not None:
        task.backward(result)
    end = time.perf_counter()
    return (1e3 * (middle - begin), 1e3 * (end - middle), 1e3 * (end - begin))


def _timed_on_cuda(task: Task, device: torch.device) -> tuple[float, float, float]:
    begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(PAUSE_CYCLES)
    begin.record()
    result = task.forward()
    middle.record()
    if task.backward is not None:
        task.backward(result)
    end.record()
    end.synchronize()
    return begin.elapsed_time(middle), middle.elapsed_time(end), begin.elapsed_time(end)


def _extra_mib(task: Task, device: torch.device) -> float | None:
    """Peak bytes of a pass above those before it, with gradients; None on the CPU, which has no counters."""
    if device.type != "cuda":
        return None
    _clear(task)
    _free(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = task.forward()
    if task.backward is not None:
        task.backward(result)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _clear(task: Task) -> None:
    for leaf in task.leaves:
        leaf.grad = None


def _free(device: torch.device) -> None:
    """Give back what no tensor holds: other processes share the device."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, NotHere):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:400] if text else ''}".rstrip(": ")


def main() -> None:
    """Answer until the standard input ends."""
    # On a shared CPU a second thread that waits for its turn would be most of what is timed.
    torch.set_num_threads(1)
    bench = Bench()
    for line in sys.stdin:
        lost = False
        try:
            answer = bench.answer(json.loads(line))
        except Exception as error:
            # A fault of the device spoils the process: every later call would report it again.
            lost = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
            answer = {"error": reason(error), "lost": lost}
            error.__traceback__ = None
            gc.collect()
        tell(answer)
        if lost:
            break


if __name__ == "__main__":
    main()
