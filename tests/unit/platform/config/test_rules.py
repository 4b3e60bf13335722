"""Each rule refuses what breaks it, says what to do, and lets what keeps it pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from headrace.kernels.backend import AttentionOperator, Backend
from headrace.kernels.codecs.config import CodecName
from headrace.platform.config import rules
from headrace.platform.config.load import load_run_config
from headrace.platform.config.rules import RULES, Rule, check_config, check_trainable
from headrace.platform.config.schema import RunConfig, key_types
from headrace.storage.config import SsdEngine
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import KvPlace, MemoryPreset
from headrace.workers.model.config import AdapterKind
from headrace.workers.parallel.config import ZBV, RingLayout, Vocabulary
from headrace.workers.train.config import Allocator, DeviceKind, Precision

LORA, SPARSE = AdapterKind.lora, MemoryPreset.chunk_sparse
NAN, INF = float("nan"), float("inf")
BY_CHUNK = {"checkpoint__every_chunks": 4, "checkpoint__every": 1, "memory__preset": MemoryPreset.chunk_host}


@cache
def base(word: str) -> RunConfig:
    return load_run_config([word], environ={}).config


def changed(word: str = "model=tiny", **values: Any) -> RunConfig:
    """The configuration of `word` with keys set; `__` stands for the dot."""
    config = copy.deepcopy(base(word))
    for key, value in values.items():
        *parents, name = key.split("__")
        node: Any = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, name, value)
    return config


# rule, values that break it, words of the message
BREAKS: list[tuple[Rule, dict[str, Any], Sequence[str]]] = [
    (rules.finite_numbers, {"optim__lr": NAN}, ["optim.lr=nan"]),
    (rules.finite_numbers, {"tiers__host__budget_gib": INF}, ["tiers.host.budget_gib=inf"]),
    (rules.ranges, {"train__steps": 0}, ["train.steps=0", "at least 1"]),
    (rules.ranges, {"data__seq_len": 0}, ["data.seq_len=0"]),
    (rules.ranges, {"train__seed": -1}, ["train.seed=-1"]),
    (rules.ranges, {"optim__lr": 0.0}, ["optim.lr=0", "above 0"]),
    (rules.ranges, {"optim__beta2": 1.0}, ["optim.beta2=1", "below 1"]),
    (rules.ranges, {"optim__min_lr_ratio": 1.5}, ["optim.min_lr_ratio=1.5"]),
    (rules.ranges, {"tiers__device__budget_gib": 0.0}, ["tiers.device.budget_gib=0"]),
    (rules.ranges, {"tiers__ssd__budget_gib": -1.0}, ["tiers.ssd.budget_gib=-1"]),
    (rules.ranges, {"tiers__ssd__timeout_s": 0.0}, ["tiers.ssd.timeout_s=0", "above 0"]),
    (rules.ranges, {"tiers__ssd__endurance__rated_tbw": 0.0}, ["tiers.ssd.endurance.rated_tbw=0", "above 0"]),
    (rules.ranges, {"tiers__ssd__endurance__lifetime_years": -1.0}, ["tiers.ssd.endurance.lifetime_years=-1"]),
    (rules.ranges, {"tiers__drift_pct": 0.0}, ["tiers.drift_pct=0", "above 0"]),
    (rules.ranges, {"tiers__drift_pct": 100.0}, ["tiers.drift_pct=100", "below 100"]),
    (rules.ranges, {"checkpoint__keep": 0}, ["checkpoint.keep=0"]),
    (rules.ranges, {"hardware__network_gbps": 0.0}, ["hardware.network_gbps=0", "above 0"]),
    (rules.ranges, {"hardware__h2d_gbps": -1.0}, ["hardware.h2d_gbps=-1", "above 0"]),
    (rules.ranges, {"parallel__ring": 0}, ["parallel.ring=0"]),
    (rules.run_name, {"run__name": "a/b"}, ["run.name=a/b"]),
    (rules.run_name, {"run__name": ""}, ["run.name="]),
    (rules.run_folder, {"run__dir": "s3://bucket/run"}, ["run.dir=s3://bucket/run"]),
    (rules.heads_divide, {"model__num_kv_heads": 3}, ["model.num_kv_heads=3", "model.num_heads=4", "1, 2, 4"]),
    (rules.heads_divide, {"model__num_heads": 6, "model__num_kv_heads": 2}, ["model.num_heads=6", "hidden_size=64"]),
    (rules.heads_divide, {"model__head_dim": 7}, ["model.head_dim=7", "even"]),
    (rules.heads_split, {"parallel__tensor": 3}, ["parallel.tensor=3", "model.num_heads=4", "use one of 1, 2"]),
    (
        rules.heads_split,
        {"model__num_heads": 6, "model__num_kv_heads": 2, "model__intermediate_size": 96, "parallel__tensor": 3},
        ["parallel.tensor=3", "model.num_kv_heads=2", "use one of 1, 2"],
    ),
    (rules.heads_split, {"parallel__tensor": 2, "parallel__ulysses": 4}, ["parallel.ulysses=4: 8 does not divide"]),
    (rules.heads_split, {"parallel__tensor": 2, "data__seq_len": 4095}, ["parallel.tensor x", "4094", "4096"]),
    (rules.shared_rows_fit, {"parallel__tensor": 2, "adapter__dropout": 0.1}, ["adapter.dropout=0.1", "tensor=2"]),
    (
        rules.chunk_size_has_its_sweep,
        {"memory__preset": MemoryPreset.chunk, "parallel__ring": 2},
        ["memory=chunk", "parallel.ring=2 is not supported by chunk"],
    ),
    (
        rules.chunk_size_has_its_sweep,
        {"memory__preset": MemoryPreset.chunk_sparse, "parallel__tensor": 2},
        ["memory=chunk_sparse", "parallel.tensor=2 is not supported", "memory=chunk_host"],
    ),
    (
        rules.chunk_size_has_its_sweep,
        {"memory__preset": MemoryPreset.chunk_host, "parallel__tensor": 2, "parallel__ulysses": 2, "chunk_size": 90},
        ["chunk_size=90", "use 88 or 92"],
    ),
    (rules.heads_split, {"parallel__ulysses": 8}, ["parallel.ulysses=8"]),
    (rules.heads_split, {"model__num_heads": 12, "model__num_kv_heads": 4, "parallel__ulysses": 6}, ["num_kv_heads=4"]),
    (
        rules.codec_fits,
        {"memory__codec": CodecName.eight_bit_token, "memory__preset": MemoryPreset.chunk},
        ["memory=chunk runs by chunk", "memory.codec=null"],
    ),
    (rules.shared_rows_fit, {"parallel__ring": 2, "memory__head_groups": 2}, ["memory.head_groups=2", "ring=2"]),
    (rules.shared_rows_fit, {"parallel__ulysses": 2, "adapter__dropout": 0.1}, ["adapter.dropout=0.1", "ulysses=2"]),
    (rules.shared_rows_fit, {"parallel__ring_layout": RingLayout.striped}, ["ring_layout=striped", "ring=1"]),
    (rules.pipeline_fits, {"parallel__pipeline": 3}, ["parallel.pipeline=3", "num_layers=2"]),
    (rules.pipeline_fits, {"parallel__pipeline": 2}, ["train.micro_batches=1", "parallel.pipeline=2"]),
    (
        rules.pipeline_fits,
        {"parallel__pipeline": 2, "parallel__pipeline_chunks": 2, "train__micro_batches": 2},
        ["parallel.pipeline_chunks=2", "pipeline_schedule=1f1b"],
    ),
    (rules.pipeline_fits, {"parallel__pipeline_schedule": ZBV}, ["parallel.pipeline_schedule=zbv", "pipeline=1"]),
    (rules.pipeline_fits, {"parallel__vocabulary": Vocabulary.vocab_1}, ["parallel.vocabulary=vocab_1"]),
    (rules.heads_split, {"parallel__ring": 3}, ["data.seq_len=4096", "ring=3", "4095", "4098"]),
    (rules.adapter_has_targets, {"adapter__rank": 8}, ["adapter.rank=8", "add adapter=lora"]),
    (rules.adapter_has_targets, {"adapter__kind": LORA, "adapter__targets": "q_proj,lm_head"}, ["no layer lm_head"]),
    (rules.adapter_has_targets, {"adapter__kind": LORA, "adapter__targets": ""}, ["no layer is named"]),
    (rules.mixers_have_names, {"model__mixers": []}, ["model.mixers=[]", "name one mixer"]),
    (rules.mixers_have_names, {"model__mixers": ["attention", "none"]}, ["'none' is not registered", "attention"]),
    (rules.ranks_match, {"parallel__tensor": 2}, ["parallel.tensor=2", "1 ranks", "multiple of 2"]),
    (rules.ranks_match, {"parallel__data": 4}, ["parallel.data=4", "4 ranks", "the run has 1"]),
    (rules.ranks_match, {"parallel__fsdp": 3, "cluster__num_workers": 4}, ["parallel.fsdp=3", "1, 2, 4"]),
    (rules.ranks_match, {"cluster__num_workers": 0}, ["cluster.num_workers=0"]),
    (rules.ranks_match, {"cluster__num_workers": 3, "cluster__num_nodes": 2}, ["num_workers=3", "num_nodes=2"]),
    (
        rules.budgets_within_hardware,
        {"hardware__host_gib": 64.0, "tiers__host__budget_gib": 65.0},
        ["tiers.host.budget_gib=65", "has 64"],
    ),
    (
        rules.budgets_within_hardware,
        {"hardware__device_memory_gib": 1.0, "tiers__device__budget_gib": 2.0},
        ["tiers.device.budget_gib=2"],
    ),
    (
        rules.budgets_within_hardware,
        {"hardware__ssd_gib": 1.0, "tiers__ssd__budget_gib": 2.0},
        ["tiers.ssd.budget_gib=2"],
    ),
    (rules.growing_memory_has_a_budget, {"tiers__host__memory_grows": True}, ["tiers.host.budget_gib"]),
    (
        rules.presets_have_their_tier,
        {"memory__preset": MemoryPreset.offload_host, "tiers__host__budget_gib": 0.0},
        ["memory=offload_host", "tiers.host.budget_gib=0"],
    ),
    (
        rules.presets_have_their_tier,
        {"memory__preset": MemoryPreset.offload_ssd, "tiers__ssd__budget_gib": 0.0},
        ["memory=offload_ssd", "tiers.ssd.budget_gib=0"],
    ),
    (
        rules.eviction_has_a_drive,
        {"tiers__host__evict": True, "tiers__ssd__budget_gib": 0.0},
        ["tiers.host.evict=True", "tiers.ssd.budget_gib=0"],
    ),
    (rules.device_matches_hardware, {"train__device": DeviceKind.cuda}, ["train.device=cuda", "hardware=cpu"]),
    (rules.engine_matches_hardware, {"tiers__ssd__engine": SsdEngine.gds}, ["tiers.ssd.engine=gds", "posix"]),
    (rules.engine_matches_hardware, {"tiers__ssd__required": True}, ["tiers.ssd.required", "engine=auto"]),
    (rules.operators_match_run, {"train__kernels": Backend.stock}, ["train.kernels=stock", "reference"]),
    (rules.operators_match_run, {"train__kernels": Backend.triton}, ["train.kernels=triton", "hardware=cpu"]),
    (
        rules.operators_match_run,
        {"train__allocator": Allocator.planned, "data__buckets": [2048, 4096]},
        ["train.allocator=planned: needs CUDA", "data.buckets differ in length", "choose caching"],
    ),
    (rules.operators_match_run, {"train__attention": AttentionOperator.fa4}, ["train.attention=fa4", "reference"]),
    (
        rules.operators_match_run,
        {"train__attention": AttentionOperator.cudnn},
        ["train.attention=cudnn", "needs train=bf16 on CUDA", "train.deterministic=false"],
    ),
    (rules.evaluation_has_data, {"train__eval_every": 5, "data__eval_fraction": 0.0}, ["data.eval_fraction=0"]),
    (rules.evaluation_has_data, {"train__eval_every": 5, "train__eval_batches": 0}, ["train.eval_batches=0"]),
    (rules.data_has_a_source, {"data__source": ""}, ["data.source"]),
    (rules.data_has_a_source, {"data__prepared": " "}, ["data.prepared"]),
    (rules.buckets_end_with_the_longest, {"data__buckets": [9, 5]}, ["data.buckets=9,5", "data.seq_len="]),
    (rules.buckets_end_with_the_longest, {"data__buckets": [0, 4096]}, ["data.buckets=0,4096", "at least 1"]),
    (rules.profiled_steps_run, {"train__profile": [1, 101]}, ["train.profile: 101", "train.steps=100"]),
    (rules.heads_split, {"parallel__ring": 2, "data__buckets": [33, 4096]}, ["data.buckets: 33", "use 32 or 34"]),
    (
        rules.chunk_size_has_its_sweep,
        {"chunk_size": 4096},
        ["chunk_size=4096", "memory=auto has no chunks", "memory=chunk"],
    ),
    (
        rules.chunk_size_has_its_sweep,
        {"chunk_size": 0, "memory__preset": MemoryPreset.chunk},
        ["chunk_size=0", "at least 1"],
    ),
    (
        rules.chunk_size_has_its_sweep,
        {"parallel__ring": 2, "memory__preset": MemoryPreset.chunk_ssd},
        ["memory=chunk_ssd", "parallel.ring=2"],
    ),
    (
        rules.presets_have_their_tier,
        {"memory__preset": MemoryPreset.chunk_host, "tiers__host__budget_gib": 0.0},
        ["memory=chunk_host", "tiers.host.budget_gib=0"],
    ),
    (
        rules.presets_have_their_tier,
        {"memory__preset": SPARSE, "memory__sparse__place": KvPlace.ssd, "tiers__ssd__budget_gib": 0.0},
        ["memory.sparse.place=ssd", "tiers.ssd.budget_gib=0"],
    ),
    (
        rules.pages_fit,
        {"memory__preset": SPARSE, "memory__sparse__budget": 2},
        ["memory.sparse.budget=2", "sink=1", "recent=2", "at least 3"],
    ),
    (
        rules.pages_fit,
        {"memory__preset": SPARSE, "memory__sparse__page": 96, "chunk_size": 1024},
        ["memory.sparse.page=96", "chunk_size=1024"],
    ),
    (rules.pages_fit, {"memory__preset": SPARSE, "model__sliding_window": 512}, ["memory=chunk_sparse", "chunk_host"]),
    (
        rules.pages_fit,
        {"memory__preset": SPARSE, "data__eval_fraction": 0.0},
        ["memory.sparse.compare_every=100", "data.eval_fraction=0"],
    ),
    (rules.ranges, {"checkpoint__every_chunks": -1}, ["checkpoint.every_chunks=-1", "at least 0"]),
    (
        rules.records_can_be_used,
        {"checkpoint__every_chunks": 4, "checkpoint__every": 1},
        ["checkpoint.every_chunks=4", "memory=auto", "memory=chunk_host"],
    ),
    *(
        (rules.records_can_be_used, {**BY_CHUNK, key.replace(".", "__"): value}, [f"{key}={value}", remedy])
        for key, value, remedy in (
            ("checkpoint.every", 0, "set checkpoint.every=1"),
            ("checkpoint.every", 2, "set checkpoint.every=1"),
            ("tiers.checksum", False, "set tiers.checksum=true"),
            ("tiers.host.evict", True, "set tiers.host.evict=false"),
        )
    ),
]


@pytest.mark.parametrize(("rule", "values", "said"), BREAKS, ids=[f"{r.__name__}-{'-'.join(v)}" for r, v, _ in BREAKS])
def test_a_rule_refuses_what_breaks_it(rule: Rule, values: dict[str, Any], said: Sequence[str]) -> None:
    problems = "\n".join(rule(changed(**values)))
    assert problems, "nothing was refused"
    for words in said:
        assert words in problems
    with pytest.raises(InputError) as caught:
        check_config(changed(**values))
    assert said[0] in str(caught.value)


def test_every_rule_is_broken_above_and_kept_by_every_overlay() -> None:
    assert {rule for rule, _, _ in BREAKS} == set(RULES)
    for rule in RULES:
        assert not list(rule(changed())), rule.__name__
        assert not list(rule(changed("hardware=h200"))), rule.__name__


@pytest.mark.parametrize("operator", [AttentionOperator.flash, AttentionOperator.cudnn, AttentionOperator.fa4])
def test_operators_that_can_compute_the_run_pass(operator: AttentionOperator) -> None:
    config = changed("hardware=h200", train__attention=operator, train__precision=Precision.bf16)
    config.train.deterministic = operator is not AttentionOperator.cudnn
    config.train.kernels = Backend.triton
    assert not list(rules.operators_match_run(config))


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(InputError) as caught:
        check_config(changed(train__steps=0, chunk_size=1, model__num_kv_heads=3))
    assert len(str(caught.value).splitlines()) == 3


def test_keys_of_the_tables_exist() -> None:
    keys = {*rules.AT_LEAST, *rules.ABOVE_ZERO, *rules.BELOW_ONE}
    assert keys <= set(key_types())


@pytest.mark.parametrize(
    "values",
    [
        {"cluster__num_workers": 2},
        {"cluster__num_workers": 4, "parallel__data": 2, "parallel__tensor": 2},
        {"cluster__num_workers": 4, "parallel__ulysses": 4},  # more than the 2 KV heads: those are replicated
        {"cluster__num_nodes": 2, "cluster__gpus_per_node": 8, "parallel__fsdp": 8},
        {
            "cluster__num_workers": 8,
            "parallel__ring": 2,
            "parallel__pipeline": 2,
            "parallel__fsdp": 4,
            "train__micro_batches": 2,
        },
    ],
)
def test_degrees_that_fit_are_accepted(values: dict[str, Any]) -> None:
    check_config(changed(**values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {
                "parallel__pipeline": 2,
                "parallel__tensor": 2,
                "parallel__vocabulary": Vocabulary.vocab_2,
                "cluster__num_workers": 4,
            },
            "parallel.vocabulary=vocab_2: with parallel.tensor=2.*last_stage",
        ),
        ({"parallel__pipeline": 2, "data__buckets": [64, 128], "data__seq_len": 128}, "data.buckets=.*pipeline=2"),
    ],
)
def test_what_is_not_built_is_for_the_plan_only(values: dict[str, Any], words: str) -> None:
    config = changed(**{"cluster__num_workers": 2, "train__micro_batches": 2, **values})
    check_config(config)
    with pytest.raises(InputError, match=words):
        check_trainable(config)


def test_what_can_be_trained_is_let_through() -> None:
    check_trainable(changed(cluster__num_workers=4, parallel__fsdp=2))
    check_trainable(changed(cluster__num_workers=4, parallel__ulysses=2, parallel__ring=2))
    pipeline = {"parallel__pipeline": 2, "train__micro_batches": 2}
    check_trainable(changed(cluster__num_workers=4, **pipeline))
    shared = {"parallel__pipeline_schedule": ZBV, "parallel__vocabulary": Vocabulary.vocab_2, "model__num_layers": 4}
    check_trainable(changed(cluster__num_workers=2, **pipeline, **shared))


def test_a_length_beyond_the_positions_warns() -> None:
    config = changed(data__seq_len=8192, model__max_position_embeddings=4096)
    (warning,) = check_config(config)
    assert "data.seq_len=8192" in warning
    assert "4096" in warning
    assert check_config(changed(data__seq_len=4096, model__max_position_embeddings=4096)) == ()


def test_a_warm_up_longer_than_the_run_warns() -> None:
    (warning,) = check_config(changed(optim__warmup_steps=20, train__steps=10))
    assert "optim.warmup_steps=20" in warning


def test_a_cpu_run_on_gpu_hardware_is_refused() -> None:
    (problem,) = rules.device_matches_hardware(changed("hardware=h200", train__device=DeviceKind.cpu))
    assert "hardware=cpu" in problem
