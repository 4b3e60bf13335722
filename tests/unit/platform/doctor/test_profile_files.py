"""Files of a profile: rows as JSON, a hardware profile that can be read back, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from headrace.platform.doctor.profile_files import check_name, make_profile, profile_name, profile_yaml, write_profile
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.tracking.provenance import Provenance
from headrace.storage.core.errors import InputError, MachineError

SOURCE = Provenance("0123456789abcdef", False, {"torch": "2.13.0"}, {"gpus": ["NVIDIA H200"]})


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200_measured"),
        ("NVIDIA GeForce RTX 4090", "4090_measured"),
        ("NVIDIA A100-SXM4-80GB", "a100_measured"),
        ("NVIDIA H100 80GB HBM3", "h100_measured"),
        ("Graphics Device", "device_measured"),
    ],
)
def test_names(device: str, name: str) -> None:
    assert profile_name([{"what": "device", "name": device}]) == name
    assert profile_name([]) == "cpu_measured"
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "../h200", "a b", ".x"])
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(InputError, match="letters, digits"):
        check_name(name)


def test_the_yaml_is_a_hardware_profile(repo_root: Path) -> None:
    profile = make_profile("h200_measured", {"bf16_tflops": 712.3, "h2d_gbps": 55.1}, has_gpu=True)
    values = yaml.safe_load(profile_yaml(profile, "two\nlines"))
    read = HardwareProfile(
        **{
            **values,
            "device_class": DeviceClass(values["device_class"]),
            "evidence": Evidence(values["evidence"]),
        }
    )
    assert read == profile
    assert read.evidence is Evidence.measured
    assert read.link_bytes_per_s(read.h2d_gbps) == 55.1e9
    assert read.ssd_gib is None
    ours = (repo_root / "conf/hardware/h200.yaml").read_text()
    assert list(values) == list(yaml.safe_load(ours))
    assert make_profile("cpu_measured", {}, has_gpu=False).device_class is DeviceClass.cpu


def test_rows_and_profile_are_written(tmp_path: Path) -> None:
    profile = make_profile("h200_measured", {"bf16_tflops": 712.3}, has_gpu=True)
    rows = [{"what": "copy", "gbps": float("nan")}]
    rows_path, yaml_path = write_profile(tmp_path / "out", profile, rows, {"pin": "killed"}, source=SOURCE)
    content = json.loads(rows_path.read_text())
    assert content["commit"] == SOURCE.commit
    assert content["versions"] == {"torch": "2.13.0"}
    assert content["machine"] == {"gpus": ["NVIDIA H200"]}
    assert content["rows"] == [{"what": "copy", "gbps": None}]
    assert content["left_out"] == {"pin": "killed"}
    assert "Not (wholly) measured: pin." in yaml_path.read_text()
    assert sorted(path.name for path in rows_path.parent.iterdir()) == sorted([rows_path.name, "h200_measured.yaml"])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    profile = make_profile("cpu_measured", {}, has_gpu=False)
    with pytest.raises(MachineError, match=r"out=.*file: cannot write .* choose another folder"):
        write_profile(tmp_path / "file", profile, [], {}, source=SOURCE)
