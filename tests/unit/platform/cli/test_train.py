"""`headrace train`: words, run folders, dry runs, and whole runs of the tiny model in a child process (no Ray)."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from headrace.platform.cli import train
from headrace.platform.cli.main import main
from headrace.platform.config.load import load_run_config, load_saved_config
from headrace.storage.core.errors import InputError
from headrace.workers.data.bucket_index import BucketIndex, index_of
from headrace.workers.data.opening import open_prepared
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names

TINY = ["debug=cpu_tiny", "cluster=inline", "train.num_threads=1", "tracking.progress=off"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HEADRACE_CONF", "HEADRACE_OVERRIDES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One prepared data set for all runs of this file."""
    return f"data.cache_dir={tmp_path_factory.mktemp('train_cli') / 'cache'}"


def losses(folder: str) -> dict[int, float]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def changed(folder: str) -> dict[str, list[object]]:
    return json.loads(Path(folder, "summary.json").read_text())["facts"]["changed"]


def test_flags_are_told_from_words() -> None:
    options = train.parse_options(["a=1", "--resume", "runs/x", "--dry-run", "--json", "b=2"])
    assert options == train.Options(("a=1", "b=2"), "runs/x", dry_run=True, json=True)
    assert train.parse_options(["--resume=runs/y"]).resume == "runs/y"
    assert train.parse_options(["--resume=runs/y", "--start-over"]).start_over
    with pytest.raises(InputError, match="belongs to --resume"):
        train.parse_options(["--start-over"])
    with pytest.raises(InputError, match="run folder is missing"):
        train.parse_options(["--resume"])


def test_a_run_folder_gets_a_name_of_its_own_when_none_is_given(tmp_path: Path) -> None:
    config = load_run_config(["run.name=abc"], environ={}).config
    first = train.choose_run_dir(config, None)
    assert first.parent == tmp_path / "runs"
    assert first.name.startswith("abc-")
    first.mkdir(parents=True)
    assert train.choose_run_dir(config, None) != first


def test_the_command_that_goes_on_names_folder_and_step(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    assert "no checkpoint was saved" in train.how_to_go_on(run)
    for step in (4, 12):
        (run / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
        (run / "checkpoints" / f"step_{step:06d}" / "COMMITTED").write_text("x")
    assert train.how_to_go_on(run).split("headrace train ")[1] == "--resume 'my run'   (after step 12)"


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_code_1_its_rows_and_the_command_that_goes_on(
    cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, cache, "train.steps=9", "optim.lr=1e30", "optim.schedule=constant", "checkpoint.every=1"]
    assert main(["train", *words, "run.dir=wild"]) == 1
    said = capsys.readouterr().err
    assert "train.non_finite=skip" in said
    assert "headrace train --resume wild   (after step" in said
    (path,) = Path("wild/non_finite").iterdir()
    assert json.loads(path.read_text())["micro_batches"][0]["rows"]


def test_a_used_run_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "used").mkdir()
    assert train.choose_run_dir(load_run_config(["run.dir=used"], environ={}).config, None) == tmp_path / "used"
    (tmp_path / "used" / "notes.txt").write_text("mine")
    assert main(["train", *TINY, "run.dir=used"]) == 2
    assert "[run_folder_used]" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]


def test_a_folder_that_another_process_writes_into_is_refused_by_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = load_run_config([*TINY, "run.dir=run"], environ={})
    (run / "config.yaml").write_text(config.text)
    words = "import sys; from headrace.platform.tracking.run_owner import *\n"
    words += "with own_run_folder(Path('run')): print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline()
            for argv in (["train", *TINY, "run.dir=run"], ["train", "--resume", "run"], ["mlflow", "--send", "run"]):
                assert main(argv) == 2
                said = capsys.readouterr().err
                assert "[run_folder_in_use]" in said
                assert f"process {first.pid} on" in said
        finally:
            first.kill()
    assert {path.name for path in run.iterdir()} == {"config.yaml", "owner.json"}


def test_two_runs_that_begin_in_the_same_second_get_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(["run.name=abc"], environ={}).config
    with train.own_run_dir(config, None) as first:
        # As the other one saw it a moment ago, when the folder was not there.
        found = iter([first])
        choose = train.choose_run_dir
        monkeypatch.setattr(train, "choose_run_dir", lambda *args: next(found, None) or choose(*args))
        with train.own_run_dir(config, None) as second:
            assert second != first


@pytest.mark.parametrize("word", ["run.dir=file", "run.dir=file/x", "run.dir=~nobody-at-all/x", "run.dir=" + "x" * 300])
def test_a_path_that_can_be_no_run_folder_is_refused_before_anything_starts(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["train", *TINY, word]) == 2
    assert "[run_folder_unusable]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("argv", [["train", "run.dir=caf\udce9"], ["train", "run.name=" + "x" * 250]])
def test_names_that_no_record_can_hold_are_refused(argv: list[str], tmp_path: Path) -> None:
    assert main(argv) == 2
    assert list(tmp_path.iterdir()) == []


def test_variables_of_make_that_are_no_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_OVERRIDES", "run.dir=caf\udce9")
    assert main(["train"]) == 2


def test_resuming_what_is_no_run_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/there").mkdir(parents=True)
    Path("runs/there/config.yaml").write_text("x")
    assert main(["train", "--resume", "nowhere"]) == 2
    assert "runs/ has: there" in capsys.readouterr().err
    assert train.resumed_folder("there") == Path("runs/there").absolute()


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_ranks_of_a_pipeline_share_one_plan_of_all_blocks(tensor: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "parallel.pipeline=2",
        f"parallel.tensor={tensor}",
        f"cluster.num_workers={2 * tensor}",
        "train.micro_batches=2",
        "memory=offload_host",
        "model.num_layers=4",
    )
    assert main(["train", "--dry-run", "--json", *TINY, *words]) == 0
    out = capsys.readouterr().out
    assert "pipeline 1f1b" in out
    plan = MemoryPlan.from_dict(json.loads(out.splitlines()[-1])["plan"])
    assert [layer.residence("x", 0).value for layer in plan.layers] == ["host", "host", "host", "hbm"]  # only the last
    assert "step time: not predicted; parallel." in out
    assert "a timeline needs hardware.node_network_gbps" in out
    config = load_run_config((*TINY, *words), environ={}).config
    hidden = config.train.batch_size * config.data.seq_len * config.model.hidden_size * 4
    assert plan.predicted[names.PIPELINE_SENT_GIB] * 2**30 == 2 * hidden / tensor  # of both micro-batches
    assert (names.TENSOR_SENT_GIB in plan.predicted) == (tensor > 1)


def test_a_dry_run_prints_configuration_and_plan_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--dry-run", "--json", "memory=offload_ssd", "tiers.device.budget_gib=1"]) == 0
    out = capsys.readouterr().out
    head, _, rest = out.partition("\nplan offload_ssd")
    (tmp_path / "c.yaml").write_text(head)
    assert load_saved_config(tmp_path / "c.yaml", environ={}).config.memory.preset.value == "offload_ssd"
    assert "ssd" in rest
    plan = MemoryPlan.from_dict(json.loads(out.splitlines()[-1])["plan"])
    assert {layer.residence("x", 0).value for layer in plan.layers[:-1]} == {"ssd"}
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_the_default_run_needs_both_tiers() -> None:
    """On any machine, whatever it is rated at: no plan without the SSD holds the budgets."""
    from headrace.platform.planning.answer import solve_plan
    from headrace.platform.planning.from_config import request_from_config
    from headrace.platform.planning.solve import slab_bytes_per_node

    for words in ([], ["cluster.num_workers=2"]):
        config = load_run_config(words, environ={}).config
        rated = {"fp32_tflops": 50.0, "d2h_gbps": 60.0, "h2d_gbps": 60.0, "ssd_write_gbps": 0.01, "ssd_read_gbps": 0.01}
        for rates in ({}, rated):
            for key, value in rates.items():
                setattr(config.hardware, key, value)
            request = request_from_config(config, config.data.bpe_vocab_size)
            slabs = slab_bytes_per_node(solve_plan(request), request)
            assert all(num_bytes > 0 for num_bytes in slabs.values()), (words, rates, slabs)


def test_a_plan_that_mixes_four_places_runs_as_predicted(tmp_path: Path, cache: str) -> None:
    """memory=auto in budgets that bind on every tier: the peak, and every byte that moves."""
    rates = {"fp32_tflops": 0.02, "d2h_gbps": 0.2, "h2d_gbps": 0.2, "ssd_write_gbps": 0.1, "ssd_read_gbps": 0.1}
    budgets = {"device": 0.008, "host": 0.002, "ssd": 0.004}
    words = [f"hardware.{key}={value}" for key, value in rates.items()]
    words += [f"tiers.{tier}.budget_gib={gib}" for tier, gib in budgets.items()]
    shape = ["model.num_layers=5", "data.seq_len=1100", "train.steps=1", "run.dir=r"]
    child = [sys.executable, "-m", "headrace.platform.cli.main", "train", *TINY, cache, *words, *shape]
    subprocess.run(child, check=True, capture_output=True)
    plan = MemoryPlan.from_dict(json.loads((tmp_path / "r" / "plan.json").read_text()))
    tensors = {name for layer in plan.layers for name in layer.stretches}
    places = {layer.residence(name, token).value for layer in plan.layers for name in tensors for token in (0, 1099)}
    assert places == {"hbm", "host", "ssd", "recompute"}
    measured = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(measured[names.GPU_PEAK_ERROR_PCT]) < 2
    for name in (names.HOST_STORED_GIB, names.HOST_LOADED_GIB, names.SSD_STORED_GIB, names.SSD_LOADED_GIB):
        assert measured[name] == pytest.approx(plan.predicted[name], rel=1e-12), name


def test_a_budget_above_the_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "debug=cpu_tiny", "tiers.host.budget_gib=1e7"]) == 2
    assert "tiers.host.budget_gib=1e+07" in capsys.readouterr().err


def test_a_vocabulary_too_small_for_the_data_is_refused_before_a_folder_is_made(
    tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *TINY, cache, "model.vocab_size=100", "run.dir=r"]) == 2
    assert "model.vocab_size=100" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_missing_data_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "model=tiny", "data=jsonl", "data.source=no.jsonl", "run.dir=r"]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_whole_run_its_continuation_and_one_that_make_starts(
    cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, cache, "memory=offload_host"]
    assert main(["train", *words, "run.dir=run", "train.steps=2", "optim.schedule=constant", "--json"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == {
        "run_dir": str(Path("run").absolute()),
        "outcome": "finished",
        "exit_code": 0,
        "restarts": 0,
    }
    assert "report.html" in said
    there = {path.name for path in Path("run").iterdir()}
    assert there >= {"config.yaml", "plan.json", "metrics.jsonl", "transfers.parquet", "report.html", "checkpoints"}
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["model"]["vocab_size"] > 0
    assert Path(saved["data"]["prepared"]).is_dir()
    assert saved["train"]["device"] == "cpu"
    assert sorted(losses("run")) == [1, 2]
    (rank,) = json.loads(Path("run/summary.json").read_text())["facts"]["ranks"]
    assert rank["operators"]["attention"] == {"wanted": "auto", "got": "flash"}
    assert rank["operators"]["swiglu"]["got"] == "reference"
    assert "host" in json.dumps(rank["tiers"])
    assert json.loads(Path("run/ranks/rank0/timeline.json").read_text())["step"] == 1
    began = changed("run")
    assert (began["train.steps"][1], began["optim.schedule"][1]) == (2, "constant")

    assert main(["train", "--resume", "run", "train.steps=4"]) == 0
    assert sorted(losses("run")) == [1, 2, 3, 4]
    assert changed("run") == {**began, "train.steps": [began["train.steps"][0], 4]}

    # Another one without a stop, by what make puts into the environment.
    monkeypatch.setenv("HEADRACE_CONF", "debug/cpu_tiny")
    rest = shlex.join([*words[1:], "run.dir=run {1}, $x", "train.steps=4", "optim.schedule=constant"])
    monkeypatch.setenv("HEADRACE_OVERRIDES", rest)
    assert main(["train"]) == 0
    assert losses("run {1}, $x") == losses("run")


@pytest.mark.slow
def test_a_run_over_rows_of_several_lengths_names_them_in_all_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ("the river turns a wheel " * (1 + number % 50) for number in range(300))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = [*TINY, "data=jsonl", "data.source=chats.jsonl", "data.cache_dir=cache", "data.buckets=32,96,256"]
    words += ["memory=offload_host", "train.micro_batches=3", "train.steps=4", "optim.schedule=constant"]
    assert main(["train", *words, "run.dir=run"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.partition("row tokens")[2].splitlines()[1:4]] == [
        ["256", "1"],
        ["96", "2"],
        ["32", "8"],
    ]
    config = load_saved_config(Path("run/config.yaml"), environ={}).config
    assert config.data.buckets == [32, 96, 256]
    plan = json.loads(Path("run/plan.json").read_text())
    plans = {row["seq_len"]: row["plan"] for row in plan["buckets"]}
    assert [(row["seq_len"], row["batch_size"]) for row in plan["buckets"]] == [(256, 1), (96, 2), (32, 8)]
    assert sum(row["share"] for row in plan["buckets"]) == pytest.approx(1.0)
    assert plan["layers"] == plans[256]["layers"]
    told = json.loads(Path("run/summary.json").read_text())["facts"]["data"]["buckets"]
    data = open_prepared(str(config.data.prepared), seq_len=256, buckets=config.data.buckets)
    assert told == [vars(bucket) for bucket in data.buckets]
    page = Path("run/report.html").read_text()
    for row in plan["buckets"]:
        assert f"<td>{row['seq_len']}</td><td>{row['batch_size']}</td><td>{100 * row['share']:.3g} %</td>" in page

    # Every step is compared with the plans of its own lengths.
    index = index_of(data, config.data, config.train, 1)
    assert isinstance(index, BucketIndex)
    steps = set()
    for line in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines()):
        lengths = [data.lengths[turn.bucket] for turn in index.turns(line["step"] - 1)]
        predicted = fmean(plans[length]["predicted"][names.STEP_S] for length in lengths)
        error = 100 * (line[names.STEP_S] - predicted) / predicted
        assert line[names.STEP_ERROR_PCT] == pytest.approx(error)
        steps.add(tuple(lengths))
    assert len(steps) > 1
