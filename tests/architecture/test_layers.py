"""The arrows between the layers, the forbidden imports and the ceilings, read from the syntax trees."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("platform", "workers", "storage", "kernels")
# Developers' code, by its import name; a wheel has none of it.
LINKS = {"bench": "tests/bench/cases", "helpers": "tests/helpers"}
MAY_IMPORT = {
    "bench": {"bench", "helpers", "platform", "workers", "storage", "kernels"},
    "helpers": {"helpers", "workers", "storage", "kernels"},
    "platform": {"platform", "workers", "storage", "kernels", "conf"},
    "workers": {"workers", "storage", "kernels"},
    "storage": {"storage", "kernels"},
    "kernels": {"kernels"},
}
# third-party package -> the only folders whose modules may import it
ONLY_IN = {
    "ray": ("workers/actors", "platform/control"),
    "hydra": ("platform/config",),
    "omegaconf": ("platform/config",),
    "mlflow": ("platform/tracking",),
}
NO_TORCH_RAY = ("storage/core", "platform/planning", "platform/config")
FILE_LINES, FUNCTION_LINES, INIT_LINES, PARAMETERS = 600, 60, 40, 7
# "path:name" of functions over a ceiling; this list may only shrink.
EXCEPTIONS: frozenset[str] = frozenset()


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    """Read at the first test and not as tests are collected, which every test process does."""
    paths = [path for folder in (*LAYERS, *LINKS.values()) for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(), filename=str(path))) for path in paths]


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_and_forbidden_imports() -> None:
    for path, tree in modules():
        check_imports(path, tree)


def check_imports(path: str, tree: ast.Module) -> None:
    layer = name_of(path).split(".")[1]
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] == "headrace" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[layer], f"{path} imports {name}: {layer} may not"
        allowed = ONLY_IN.get(parts[0])
        if allowed is not None:
            assert path.startswith(allowed), f"{path} imports {name}: only {allowed} may"
        torch_free = path.startswith(NO_TORCH_RAY) or path.endswith(("/config.py", "/plan.py", "workers/job.py"))
        if torch_free:
            assert parts[0] not in ("torch", "ray"), f"{path} imports {name}: it must compose and plan without it"
        if layer == "kernels":
            assert parts[0] not in ("numpy", "transformers"), f"{path} imports {name}: kernels take torch and triton"


def test_no_import_cycles() -> None:
    """An import counts wherever it stands: in a function, or for the type checker alone."""
    names = {name_of(path) for path, _ in modules()}
    graph = {name_of(path): {name for name in imports(tree) if name in names} for path, tree in modules()}
    assert find_cycle(graph) == []


def test_a_cycle_is_found_and_named() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def name_of(path: str) -> str:
    """The import name of a module."""
    for link, folder in LINKS.items():
        path = path.replace(f"{folder}/", f"{link}/")
    return "headrace." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one cycle, the first one twice; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for other in sorted(graph[node] - {node}):
                if found := walk(other, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


# What executes what it reads. Files from outside are read by storage/core/outside.py, safetensors and pyarrow.
EXECUTES_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTES_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.save",
    "dcp.FileSystemReader",
    "yaml.load",
    "yaml.unsafe_load",
    "json.load",
}
# JSON has one reader; these read what a child of ours writes, or stand alone.
OWN_JSON = ("storage/core/outside.py", "workers/data/chat_render.py", "tests/bench/cases/", "platform/children.py")
# Ranks of a test answer each other.
MAY_UNPICKLE = "tests/helpers/training.py"


def test_nothing_from_outside_is_executed() -> None:
    for path, tree in modules():
        assert path == MAY_UNPICKLE or not EXECUTES_IMPORTS.intersection(imports(tree)), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in EXECUTES_CALLS, f"{path}:{node.lineno} calls {called}"
                one_reader = called != "json.loads" or path.startswith(OWN_JSON)
                assert one_reader, f"{path}:{node.lineno}: storage/core/outside.py parses JSON"
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
                # What torch's own reader of checkpoints does where it is given a path and no reader.
                reader = {keyword.arg for keyword in node.keywords} & {"storage_reader", "storage_writer"}
                assert called not in ("dcp.load", "dcp.save") or reader, f"{path}:{node.lineno}: pickles"


def test_ceilings() -> None:
    for path, tree in modules():
        check_ceilings(path, tree)


def check_ceilings(path: str, tree: ast.Module) -> None:
    num_lines = len((ROOT / path).read_text().splitlines())
    assert num_lines <= FILE_LINES, f"{path} has {num_lines} lines: split it by noun"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or f"{path}:{node.name}" in EXCEPTIONS:
            continue
        docstring = node.body[0] if ast.get_docstring(node) else None
        length = (node.end_lineno or 0) - node.lineno + 1
        if docstring is not None:
            length -= (docstring.end_lineno or 0) - docstring.lineno + 1
        limit = INIT_LINES if node.name == "__init__" else FUNCTION_LINES
        assert length <= limit, f"{path}:{node.lineno} {node.name} has {length} lines"
        args = node.args
        names = [a.arg for a in (*args.posonlyargs, *args.args) if a.arg not in ("self", "cls")]
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
            continue  # a kernel takes pointers and sizes one by one, and Triton has no keyword-only parameters
        # keyword-only parameters of a published operator are its options, and named at every call
        assert len(names) <= PARAMETERS, f"{path}:{node.lineno} {node.name} has {len(names)} parameters"


def test_every_exception_is_still_needed() -> None:
    names = {f"{path}:{n.name}" for path, tree in modules() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert names >= EXCEPTIONS, "remove the entries that no longer exist"


def test_public_names_have_docstrings() -> None:
    missing = []
    for path, tree in modules():
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing, missing


def test_a_choice_prints_as_the_word_that_a_user_writes() -> None:
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and "Enum" in [ast.unparse(base) for base in node.bases]:
                values = [ast.literal_eval(item.value) for item in node.body if isinstance(item, ast.Assign)]
                assert not any(isinstance(value, str) for value in values), f"{path}:{node.name}: use StrEnum"


def test_layer_folders_have_no_init() -> None:
    for folder in (*LAYERS, "tests", "conf"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow other modules"


def test_the_package_folder_is_links_to_the_layers() -> None:
    links = {path.name: path.readlink().as_posix() for path in (ROOT / "headrace").iterdir()}
    assert links == {name: f"../{name}" for name in (*LAYERS, "conf")} | {k: f"../{v}" for k, v in LINKS.items()}


def test_a_wheel_has_the_layers_and_nothing_of_the_tests() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_namespace_packages(str(ROOT), exclude=find["exclude"], include=find["include"])
    assert {name.split(".")[1] for name in packages if "." in name} == {*LAYERS, "conf"}


def test_every_sub_folder_is_a_package() -> None:
    folders = {path.parent for layer in LAYERS for path in (ROOT / layer).glob("*/**/*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_import_platform_from_the_root_is_the_standard_library() -> None:
    code = "import sys; sys.path.insert(0, ''); import platform; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("Linux", "Darwin")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("workers.job platform.cli.main", ("torch", "ray", "mlflow")),
        # Drivers, owners of slabs and shells of ranks start in a second without torch, in several with it.
        ("workers.actors.slab_owner workers.actors.pipe platform.control.inline", ("torch", "ray", "mlflow")),
        ("workers.actors.gpu_worker platform.control.ray_backend platform.cli.train", ("torch", "mlflow")),
    ],
)
def test_what_imports_neither_torch_nor_ray(modules: str, absent: tuple[str, ...]) -> None:
    names = ", ".join(f"headrace.{name}" for name in modules.split())
    code = f"import sys\nimport {names}\nsys.exit(str([m for m in {absent} if m in sys.modules] or ''))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.stderr.strip() in ("", "None"), done.stderr
