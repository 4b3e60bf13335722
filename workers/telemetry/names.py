"""Metric names, the same in metrics.jsonl, MLflow, Ray and the progress bar. The end of a name is its unit."""

from __future__ import annotations

import re

LOSS_TRAIN = "loss/train"
LOSS_EVAL = "loss/eval"
GRAD_NORM = "optim/grad_norm"
LEARNING_RATE = "optim/lr"
TOKENS_SEEN = "data/tokens_seen"
EPOCH = "data/epoch"
# Steps since the start of the run that were left out: loss or gradient was not finite.
SKIPPED_STEPS = "optim/skipped_steps"

STEP_S = "perf/step_s"
TOKENS_PER_S_PER_GPU = "perf/tokens_per_s_per_gpu"
MFU_CAUSAL_PCT = "perf/mfu_causal_pct"
MFU_FULL_ATTENTION_PCT = "perf/mfu_full_attention_pct"
HFU_PCT = "perf/hfu_pct"
# What 100 % of the three stand for, of one rank's device.
MFU_PEAK_TFLOPS = "perf/mfu_peak_tflops"
DATA_WAIT_S = "perf/data_wait_s"
# Of all blocks of a step, with what they wait for; by chunk: of the pass with gradients.
FORWARD_S = "perf/forward_s"
BACKWARD_S = "perf/backward_s"
CHECKPOINT_S = "perf/checkpoint_s"
CHECKPOINT_FAILURES = "perf/checkpoint_failures"

GPU_PEAK_GIB = "mem/gpu_peak_gib"
HOST_PEAK_GIB = "mem/host_peak_gib"
SSD_PEAK_GIB = "mem/ssd_peak_gib"
# Peak of one tensor of all layers: of_tensor makes the metric's name.
HOST_TENSOR_GIB = "mem/host_tensor_gib"
SSD_TENSOR_GIB = "mem/ssd_tensor_gib"

D2H_GBPS = "io/d2h_gbps"
H2D_GBPS = "io/h2d_gbps"
SSD_WRITE_GBPS = "io/ssd_write_gbps"
SSD_READ_GBPS = "io/ssd_read_gbps"
EXPOSED_PCT = "io/exposed_pct"
HOST_STORED_GIB = "io/host_stored_gib"
HOST_LOADED_GIB = "io/host_loaded_gib"
SSD_STORED_GIB = "io/ssd_stored_gib"
SSD_LOADED_GIB = "io/ssd_loaded_gib"

# Of one rank in a step, to those that share its rows: heads for tokens, and keys, values and their gradients.
TENSOR_SENT_GIB = "comm/tensor_sent_gib"
ULYSSES_SENT_GIB = "comm/ulysses_sent_gib"
PIPELINE_SENT_GIB = "comm/pipeline_sent_gib"
RING_SENT_GIB = "comm/ring_sent_gib"

# Measured rate against the profile's, in percent; negative is slower.
D2H_DRIFT_PCT = "io/d2h_drift_pct"
H2D_DRIFT_PCT = "io/h2d_drift_pct"
SSD_WRITE_DRIFT_PCT = "io/ssd_write_drift_pct"
SSD_READ_DRIFT_PCT = "io/ssd_read_drift_pct"

# Of the drive, over all runs; TB is 1e12 bytes. Life is its rating, budget the part of it that is due by now.
SSD_WRITTEN_TB = "io/ssd_written_tb"
SSD_LIFE_USED_PCT = "io/ssd_life_used_pct"
SSD_BUDGET_USED_PCT = "io/ssd_budget_used_pct"
SSD_DAYS_LEFT = "io/ssd_days_left"

# memory=chunk_sparse: evaluation loss of the same held-out rows with dense attention and with that of the run, and the
# share of the pages that the step read.
SPARSE_LOSS_DENSE = "sparse/loss_dense"
SPARSE_LOSS_SPARSE = "sparse/loss_sparse"
SPARSE_LOSS_GAP = "sparse/loss_gap"
SPARSE_PAGES_READ_PCT = "sparse/pages_read_pct"

# Measured against the plan's prediction, in percent of it. Rates are compared as drift (above).
GPU_PEAK_ERROR_PCT = "plan/gpu_peak_error_pct"
HOST_PEAK_ERROR_PCT = "plan/host_peak_error_pct"
SSD_PEAK_ERROR_PCT = "plan/ssd_peak_error_pct"
STEP_ERROR_PCT = "plan/step_error_pct"
FORWARD_ERROR_PCT = "plan/forward_error_pct"
BACKWARD_ERROR_PCT = "plan/backward_error_pct"
HOST_STORED_ERROR_PCT = "plan/host_stored_error_pct"
HOST_LOADED_ERROR_PCT = "plan/host_loaded_error_pct"
SSD_STORED_ERROR_PCT = "plan/ssd_stored_error_pct"
SSD_LOADED_ERROR_PCT = "plan/ssd_loaded_error_pct"
# Of a share of the step: measured minus predicted.
EXPOSED_ERROR_PCT = "plan/exposed_error_pct"
# How often the run has changed its plan; there from the first change on.
REPLANS = "plan/replans"


def of_tensor(family: str, tensor: str) -> str:
    """The metric of one tensor, or of tensors that move together: "mem/host_tensor_gib/q-k-v". MLflow takes no "+"."""
    return f"{family}/{re.sub(r'[^A-Za-z0-9_]', '-', tensor)}"


def split_tensor(metric: str) -> tuple[str, str | None]:
    """The family and the tensor of a metric that of_tensor made; of another one, the metric and None."""
    family, _, tensor = metric.rpartition("/")
    return (family, tensor) if family in (HOST_TENSOR_GIB, SSD_TENSOR_GIB) else (metric, None)
