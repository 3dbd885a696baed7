"""Conventions of the code base: standard terms, an acyclic import graph, short functions and modules."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION_LINES = 80  # exclusive
MAX_MODULE_LINES = 450
LONG_MODULES = {"pipelines/puppets/render.py"}  # one drawing routine per part of a figure
BINARY_SUFFIXES = {".png", ".webp", ".mp4", ".safetensors"}
# Not our prose: the license, the lock file with package names, and this list itself.
SKIPPED_FILES = {"LICENSE", "requirements.lock", "tests/test_conventions.py"}

# Non-standard terms and what to write instead; see the writing style in docs/architecture.md.
TERMS = {
    r"pictures?": "image",
    r"measures": "metrics",
    r"bases": "pretrained models",
    r"mend(s|ed|ing|able)?": "fix; user error",
    r"reckon(s|ed|ing)?": "estimate",
    r"anew|made anew|made again|once more": "again; regenerated; rerun",
    r"goes on|go on|went on|going on": "resumes",
    r"so many": "N; number of",
    r"(is|are) no number|no number": "NaN or inf",
    r"places": "spatial positions; locations",
    r"leaves? out|left out|leave_out|leaving out": "skip",
    r"keep_reference": "reference_mask",
    r"own pieces?|own_piece": "local shard",
    r"device share|device_share|share of the matrix rate": "MFU",
    r"matrix rate|matrix_rate": "peak matmul FLOP/s",
    r"plain way|kin": "baseline; related implementations",
    r"body joined in|joined attention": "reference attention",
    r"save_activations": "memory-efficient modules",
    r"what (reads|writes|holds)": "the name of the thing",
    r"besides?": "next to; compared with; in addition",
    r"settle[sd]?": "choose",
    r"(a|the) rest": "remainder",
    r"half of|tenths|fourths": "percentages or fractions in digits",
    r"near-ties": "concrete condition",
    r"whole": "complete; verified; entire",
    r"he|his|him|whoever": "it; the name",
}
PATTERN = re.compile(
    rf"(?<![\w-])(?:{'|'.join(TERMS)})(?![\w-])"
)  # of lower case: faster than ignoring the case


def tracked_files() -> list[Path]:
    output = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in output.stdout.split("\0") if name and (ROOT / name).exists()]


def product_modules() -> list[Path]:
    return [
        path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in ("tcan", "pipelines")
    ]


def occurrences(text: str) -> list[tuple[int, str]]:
    """(line number, term) of every non-standard term, also inside snake_case and CamelCase identifiers."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", line).replace("_", " ")
        candidates = {line.lower(), words.lower()}
        found += [(number, match[0]) for candidate in candidates for match in PATTERN.finditer(candidate)]
    return found


def test_tracked_text_uses_standard_terms() -> None:
    problems = []
    for path in tracked_files():
        if path.suffix in BINARY_SUFFIXES or str(path) in SKIPPED_FILES:
            continue
        text = (ROOT / path).read_text()
        problems += [f"{path}:{number}: {term}" for number, term in occurrences(f"{text}\n{path}")]
    assert not problems, f"{len(problems)} non-standard terms:\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "text",
    ["the whole video", "leave_out = 1", "def keep_reference", "class PictureFile", "# Goes on from step 3"],
)
def test_non_standard_terms_are_found(text: str) -> None:
    assert occurrences(text)


def imported_modules(path: Path) -> Iterator[str]:
    """Modules of the product that a module imports, at the top or inside functions, except for type checking."""
    tree = ast.parse((ROOT / path).read_text())
    known = {module_name(module) for module in product_modules()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            candidates = [name if name in known else node.module for name in names]
        else:
            continue
        yield from (name for name in candidates if name in known)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_imports_have_no_cycles() -> None:
    graph = {module_name(path): set(imported_modules(path)) for path in product_modules()}
    # A package that only re-exports is the same node as its modules' parent for importers, not for its own modules.
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in finished:
            return
        for imported in sorted(graph[module] - {module}):
            visit(imported, [*trail, module])
        finished.add(module)

    for module in graph:
        visit(module, [])


def test_functions_and_modules_are_short() -> None:
    problems = []
    for path in product_modules():
        source = (ROOT / path).read_text()
        if (lines := len(source.splitlines())) > MAX_MODULE_LINES and str(path) not in LONG_MODULES:
            problems.append(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length >= MAX_FUNCTION_LINES:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    assert not problems, "\n".join(problems)
