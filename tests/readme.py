"""What README.md tells a reader to type, and the same made quick: two steps in the place of thirty.

    python tests/readme.py          runs all of it, in its order, in the folder that it is called from

`.ci/run` does so where only the library is installed: no test extra, so no numpy and no pytest.
"""

import importlib.util
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Of an option that is given twice the last one counts.
QUICK = {
    "generate": ["--steps", "2"],
    "evaluate": shlex.split("--pair-count 1 --views flip --seed 0 --recipes own plain --steps 2"),
}


def python_blocks(text: str = README) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def commands(text: str = README) -> list[list[str]]:
    """The words of every `mtl-anagram ...` line of a page, without the first."""
    lines = re.findall(r"^ *(mtl-anagram .*)$", text.replace("\\\n", " "), re.M)
    return [shlex.split(line)[1:] for line in lines]


def embedded_commands() -> list[list[str]]:
    """README's commands for the embedded cascade."""
    return [words for words in commands() if "--model" not in words]


def quick_python(code: str) -> str:
    return re.sub(r"\b30\b", "2", code)


def quick_command(words: list[str]) -> list[str]:
    best = ["--best-of", "2"] if "--best-of" in words else []
    return [*words, *QUICK.get(words[0], []), *best, *([] if "--quiet" in words else ["--quiet"])]


def write_glide(folder: Path) -> dict[str, Any]:
    """Small random towers as GLIDE's are published: pickled, and CLIP's merges beside them. Returns their states."""
    import torch

    from mtl_anagram.models.noise_clip import ImageEncoder, TextEncoder

    torch.manual_seed(0)
    image = ImageEncoder(image_size=64, patch_size=16, width=64, layers=1, embedding=16)
    text = TextEncoder(vocab=512 + 1 + 2, width=64, layers=1, embedding=16)
    folder.mkdir(parents=True, exist_ok=True)
    states = {"clip_image_enc": image.state_dict(), "clip_text_enc": text.state_dict()}
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    (folder / "merges.txt").write_text("#version: 0.2\nd u\n")
    return states


def main() -> None:
    missing = [name for name in ("numpy", "pytest", "diffusers") if importlib.util.find_spec(name) is None]
    print(f"not installed here: {', '.join(missing) or 'nothing'}", flush=True)
    subprocess.run([sys.executable, "-m", "mtl_anagram", "--help"], check=True, stdout=subprocess.DEVNULL)
    for words in embedded_commands():
        print("+ mtl-anagram", shlex.join(quick_command(words)), flush=True)
        subprocess.run(["mtl-anagram", *quick_command(words)], check=True)
    for number, code in enumerate(python_blocks(), 1):
        print(f"+ Python {number} of {len(python_blocks())}", flush=True)
        subprocess.run([sys.executable, "-c", quick_python(code)], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        from mtl_anagram.models import load_noise_clip

        write_glide(Path(folder, "glide"))
        print("+ GLIDE's files:", load_noise_clip(Path(folder, "glide")).scorer(["a duck"]), flush=True)


if __name__ == "__main__":
    main()
