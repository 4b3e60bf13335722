"""What CUDA would be asked to compute and to compile, on a machine without a GPU; see on_fake_cuda.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from headrace.bench import kernel_block, kernel_codec, kernel_loss
from headrace.helpers.builds import SHARED_LIMIT_BYTES

PROGRAM = Path(__file__).with_name("on_fake_cuda.py")
SCALAR = [[], "float32", "cuda:0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the program prints."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, str(PROGRAM)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_shapes_dtypes_and_devices(rows: list[dict[str, Any]]) -> None:
    """Two blocks of the 7B decoder at 32K with loss and gradients, both axes of the loss, the sweep, all attention."""
    found = {row["case"]: row["out"] for row in rows if "case" in row}
    for backend in ("reference", "triton"):
        assert found[f"decoder {backend}"] == SCALAR
        for axis in ("tokens", "vocabulary"):
            assert found[f"loss {axis} {backend}"] == SCALAR
    for kind in ("whole", "by blocks", "packed"):
        for operator in ("auto", "flash"):
            assert found[f"attention {kind} {operator}"] == [[1, 32768, 28, 128], "bfloat16", "cuda:0"]
    for plan in ("keep", "recompute"):
        assert found[f"sweep {plan}"] == [[1, 32768, 3584], "bfloat16", "cuda:0"]
    assert found["attention window by blocks flash"] == [[1, 4096, 28, 128], "bfloat16", "cuda:0"]


def test_a_packed_row_is_one_call_whatever_its_documents(rows: list[dict[str, Any]]) -> None:
    """With the borders of its documents; one call of cuDNN per document would plan each length anew."""
    calls = {row["case"]: row["calls"] for row in rows if "calls" in row}
    flash = ["_flash_attention_forward", "_flash_attention_backward"]
    assert calls["attention packed auto"] == calls["attention packed flash"] == flash
    cudnn = "_scaled_dot_product_cudnn_attention"
    assert calls["attention whole auto"] == [cudnn, f"{cudnn}_backward"]


def test_every_kernel_of_the_benchmarks_fits_hopper(rows: list[dict[str, Any]]) -> None:
    """No spills, shared memory of a block, and registers that leave room for two blocks of 128 threads at least."""
    compiled = [row for row in rows if "complaint" in row]
    assert [row["complaint"] for row in compiled if row["complaint"]] == []
    assert {row["arch"] for row in compiled} == {90}
    assert all(row["spilled_bytes"] == 0 for row in compiled)
    assert all(row["shared_bytes"] <= SHARED_LIMIT_BYTES[90] for row in compiled)
    assert all(0 < row["num_registers"] <= 128 for row in compiled), compiled
    kernels = {row["name"].split("[")[0] for row in compiled}
    assert {"rms_norm_backward", "rope_rotate", "qk_norm_rope_backward", "glu_backward"} <= kernels
    assert {"_stats", "_gradient", "encode_rows_kernel", "decode_groups_kernel"} <= kernels


def test_every_fused_case_of_the_benchmarks_ran(rows: list[dict[str, Any]]) -> None:
    ran = {row["ran"] for row in rows if "ran" in row}
    assert {name.split("/")[1] for name in ran if name.startswith("block/")} == set(kernel_block.OPERATORS)
    assert {name.split("/")[1] for name in ran if name.startswith("loss/")} == set(kernel_loss.CUDA_SHAPES)
    assert {name.split("/")[1] for name in ran if name.startswith("codec/")} == {
        c.value for c in kernel_codec.CodecName
    }
