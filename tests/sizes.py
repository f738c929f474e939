"""The house's size against its limits: `python -m tests.sizes` prints it, and exits 1 where one is passed."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The library's aim is 9,000: 7,500 for the house, 1,500 for what is built on it. Until then it is not to grow.
LIMITS = {
    "library lines": 10_242,
    "entries of the package's root": 9,
    "test lines": 9_500,
    "longest file": 400,
    "longest function": 60,
    "README lines": 150,
}
NOT_COUNTED = {"__main__.py", "py.typed", "__pycache__"}  # of the root's entries
TRAINING = "test_training"  # these tests have a budget of their own


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> dict[str, int]:
    """Each function's lines, from `def` to its end, with signature and docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{path.relative_to(ROOT)}:{n.name}": (n.end_lineno or 0) - n.lineno + 1 for n in found}


def sizes() -> dict[str, tuple[int, str]]:
    """Every figure of LIMITS, and what it is of."""
    library = sorted((ROOT / "mtl_anagram").rglob("*.py"))
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if TRAINING not in path.name]
    entries = sorted(p.name for p in (ROOT / "mtl_anagram").iterdir() if p.name not in NOT_COUNTED)
    longest_file = max(library, key=lines)
    longest_function, count = max(
        (item for path in library for item in functions(path).items()), key=lambda item: item[1]
    )
    return {
        "library lines": (sum(map(lines, library)), f"{len(library)} files"),
        "entries of the package's root": (len(entries), " ".join(entries)),
        "test lines": (sum(map(lines, tests)), f"{len(tests)} files, training's apart"),
        "longest file": (lines(longest_file), str(longest_file.relative_to(ROOT))),
        "longest function": (count, longest_function),
        "README lines": (lines(ROOT / "README.md"), ""),
    }


def main() -> int:
    passed = 0
    for name, (value, what) in sizes().items():
        over = value > LIMITS[name]
        passed |= over
        print(f"{name:<30} {value:>6,} of {LIMITS[name]:>6,}  {'OVER  ' * over}{what}")
    return int(passed)


if __name__ == "__main__":
    sys.exit(main())
