"""Who may import whom, and what the packet core must not know."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "svcdp"
CYTHON = ROOT / "pyx" / "svcdp"

PLAIN = {"types", "errors", "abc", "_files"}
L2 = PLAIN | {"_core", "_io", "dataplane", "schedulers"}
L3 = L2 | {"io", "ipvs", "rules", "modes"}
L4 = L3 | {"kube", "announce", "discovery", "sync"}
EVERYTHING = L4 | {"node", "lab", "cli", "_version"}

# Files that together are one part.
ALIASES = dict.fromkeys(
    ("records", "transaction", "status", "explain", "handover", "timeouts"), "dataplane"
)

# Each part, and what of svcdp it may import besides itself.
MAY_IMPORT = {
    "_version": set(),
    "types": set(),
    "errors": set(),
    "_files": set(),
    "abc": {"types", "errors"},
    "_core": {"types"},
    "_io": {"_core", "types", "errors"},
    "schedulers": PLAIN,
    "dataplane": PLAIN | {"_core", "schedulers"},
    "io": L2,
    "ipvs": L2 | {"io"},
    "rules": L2 | {"io"},
    "modes": L3,
    "kube": PLAIN,
    "announce": PLAIN | {"kube"},
    "discovery": PLAIN | {"kube"},
    "sync": L2 | {"kube"},
    "lab": L4 | {"_version"},
    "node": L4 | {"_version"},
    "cli": EVERYTHING,
    "__init__": L2 | {"_version"},
    "__main__": {"cli"},
}

# What `import svcdp` loads must do with the standard library.
STDLIB_ONLY = {
    "types",
    "errors",
    "abc",
    "_files",
    "_core",
    "_io",
    "schedulers",
    "dataplane",
    "io",
    "ipvs",
    "__init__",
}

# svcdp.kube knows neither packets nor the kernel: it runs on any operating system.
NOT_IN_KUBE = {"struct", "fcntl", "subprocess", "ctypes", "select", "signal"}


def part_of(path: Path) -> str:
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return ALIASES.get(name, name)


def part_of_module(module: str) -> str:
    """Of ``svcdp.kube.model`` kube; a name of the package itself is public, so dataplane."""
    name = module.split(".")[1] if "." in module else ""
    if name not in (path.stem for path in PACKAGE.iterdir()):
        return "dataplane"
    return ALIASES.get(name, name)


def imports(path: Path) -> Iterator[str]:
    """Modules that a file needs when it runs, those of functions included."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "svcdp":
                yield from (f"svcdp.{name.name}" for name in node.names)
            else:
                yield node.module or ""


def cimports(path: Path) -> Iterator[str]:
    yield from re.findall(r"^\s*(?:from|cimport|import) (svcdp[\w.]*)", path.read_text(), re.M)


def code_of(path: Path) -> str:
    """A Cython file without comments and docstrings."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", path.read_text())
    return re.sub(r"#.*", "", text)


def cython_files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in CYTHON.glob(pattern))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=shown)
def test_python_imports_stay_in_their_layer(path: Path) -> None:
    part = part_of(path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = extras["optional-dependencies"]["node"]
    third_party = {re.split(r"[^\w-]", name)[0].lower().replace("-", "_") for name in distributions}
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "svcdp":
            target = part_of_module(module)
            assert target == part or target in MAY_IMPORT[part], f"{part} imports {module}"
        elif top not in sys.stdlib_module_names:
            name = {"yaml": "pyyaml", "dns": "dnspython"}.get(top, top)
            assert part not in STDLIB_ONLY, f"{part} needs the standard library only, not {module}"
            assert name in third_party, f"{module} is no dependency of svcdp[node]"
        elif part == "kube":
            assert top not in NOT_IN_KUBE, f"kube knows no kernel: {module}"


@pytest.mark.parametrize("path", cython_files("**/*.pxd", "**/*.pyx"), ids=shown)
def test_cython_imports_stay_in_their_layer(path: Path) -> None:
    part = path.relative_to(CYTHON).parts[0]
    for module in cimports(path):
        target = module.split(".")[1]
        assert target == part or target in MAY_IMPORT[part], f"{part} imports {module}"


@pytest.mark.parametrize("path", cython_files("_core/*"), ids=shown)
def test_the_core_knows_packets_only(path: Path) -> None:
    if path.suffix not in (".pxd", ".pyx"):
        return
    text = path.read_text()
    foreign = r"kube|endpoint ?slice|cluster ?ip|node ?port|\bpods?\b|nfqueue|netlink"
    assert not re.findall(foreign, text, re.I)
    # Time is an argument, and packets come in memory.
    assert not re.findall(
        r"(?<![.\w])(?:time|socket|os|random|threading)\b(?= import| cimport)"
        r"|^import (?:time|socket|os)\b"
        r"|<time\.h>|<sys/socket\.h>|clock_gettime|gettimeofday|rdtsc",
        code_of(path),
        re.M,
    )


@pytest.mark.parametrize("path", cython_files("**/*.pxd"), ids=shown)
def test_what_runs_per_packet_needs_no_interpreter(path: Path) -> None:
    for signature in re.findall(r"^cdef inline .*?:$", code_of(path), re.M | re.S):
        assert signature.endswith("noexcept nogil:"), signature


@pytest.mark.parametrize("path", cython_files("**/*.pxd", "**/*.pyx"), ids=shown)
def test_the_gil_has_one_border(path: Path) -> None:
    if path.name == "engine.pyx" or (path.parent.name == "_io" and path.suffix == ".pyx"):
        return
    assert not re.findall(r"\bwith (?:no)?gil\b", code_of(path))
