from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile

NAMES = ("h200", "h100_80g", "a100_80g", "a100_40g", "a800_80g", "rtx4090", "cpu")


def load(repo_root: Path, name: str) -> HardwareProfile:
    values = yaml.safe_load((repo_root / "conf" / "hardware" / f"{name}.yaml").read_text())
    assert set(values) == {f.name for f in fields(HardwareProfile)}
    values["device_class"], values["evidence"] = DeviceClass(values["device_class"]), Evidence(values["evidence"])
    return HardwareProfile(**values)


@pytest.mark.parametrize("name", NAMES)
def test_profiles_are_complete(repo_root: Path, name: str) -> None:
    profile = load(repo_root, name)
    assert profile.name == name
    if profile.device_class is DeviceClass.cuda:
        assert profile.evidence is Evidence.datasheet
        assert min(profile.device_memory_gib, profile.bf16_tflops, profile.h2d_gbps, profile.d2h_gbps) > 0
        assert 0 < profile.compute_efficiency < 1
    else:
        assert profile.flops_per_s(4) is None


def test_datasheet_links_and_all_products_are_discounted() -> None:
    sheet = HardwareProfile(name="x", bf16_tflops=100.0, fp32_tflops=10.0, d2h_gbps=50.0)
    assert sheet.flops_per_s(2) == 50e12
    assert sheet.flops_per_s(4) == 5e12
    assert sheet.link_bytes_per_s(sheet.d2h_gbps) == 40e9
    assert sheet.link_bytes_per_s(sheet.ssd_read_gbps) is None
    measured = replace(sheet, evidence=Evidence.measured)
    assert (measured.flops_per_s(2), measured.link_bytes_per_s(measured.d2h_gbps)) == (50e12, 50e9)
