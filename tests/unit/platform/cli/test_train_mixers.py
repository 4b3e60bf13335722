"""`headrace train` with a mixer of another package, by layer and by chunk, in child processes (no Ray)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.platform.cli.main import main

WORDS = ["debug=cpu_tiny", "cluster=inline", "train.num_threads=1", "tracking.progress=off", "train.steps=2"]


@pytest.mark.slow
def test_a_mixer_of_another_package_trains_by_layer_and_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[headrace.mixers]\ntheir_scan = their_scan\n")
    (tmp_path / "their_scan.py").write_text(
        "from headrace.helpers.linear_attention import LinearAttentionMixer\n"
        "from headrace.workers.model.mixers.registry import register\n"
        "@register('their_scan')\n"
        "class TheirScan(LinearAttentionMixer):\n"
        "    leaf = 'their_scan'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    words = [*WORDS, f"data.cache_dir={tmp_path / 'cache'}", "model.mixers=their_scan,attention"]
    losses = {}
    for memory in ("memory=auto", "memory=chunk_ssd chunk_size=96"):
        assert main(["train", *words, *memory.split(), "run.dir=run-" + memory[7:12]]) == 0, capsys.readouterr().err
        folder = tmp_path / ("run-" + memory[7:12])
        losses[memory] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert json.loads((folder / "plan.json").read_text())["layers"]
    by_layer, by_chunk = losses.values()
    assert by_layer == pytest.approx(by_chunk, rel=1e-5)
    assert main(["generate", "run=run-chunk", "--prompt", "a"]) == 2
    assert "model.mixers=['their_scan', 'attention']" in capsys.readouterr().err
    assert main(["plan", *words[:1], "model.mixers=none,attention"]) == 2
    assert "model.mixers: 'none' is not registered; choose among attention, " in capsys.readouterr().err
