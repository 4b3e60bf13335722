"""The console script itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.storage.core.errors import ErrorId


@pytest.mark.parametrize(("verb", "package"), [("plan", "hydra"), ("train", "omegaconf")])
def test_a_missing_package_is_named(verb: str, package: str) -> None:
    """Exit code 2 and one sentence, as on a machine that has torch alone."""
    code = f"import sys; sys.modules[{package!r}] = None; from headrace.platform.cli.main import main\n"
    code += f"sys.exit(main([{verb!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert f"package {package}," in done.stderr
    assert f"[{ErrorId.package_missing}]" in done.stderr
