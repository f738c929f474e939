"""README's first command (64 and 256 px) in processes of its own: time, processor time, memory.

python -m benchmarks.command --rounds 3 --against FOLDER    # a checkout of another commit, in turns
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, compare, fresh, head, in_turns, say

COMMAND = shlex.split('"a rabbit" "a butterfly" --views identity rotate_ccw --style "a poster of" --seed 23')
ROWS = {
    "clock": "seconds", "user": "processor seconds, user", "system": "the system's", "peak": "peak memory, MiB"
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="FOLDER")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further options of the command")
    args = parser.parse_args()
    folders = {"now": ROOT} | ({args.against.name: args.against.resolve()} if args.against else {})

    def run(kind: str) -> dict:
        with tempfile.TemporaryDirectory() as out:
            # Earlier commits have the command in cli.
            module = "cli" if (folders[kind] / "mtl_anagram" / "cli.py").is_file() else "__main__"
            start = f"import sys; from mtl_anagram.{module} import main; sys.exit(main())"
            words = ["-c", start, "generate", *COMMAND, "--quiet", "--out", out, *args.more]
            return fresh(sys.executable, *words, cwd=folders[kind], env={"PYTHONPATH": str(folders[kind])})

    found = in_turns(list(folders), args.rounds, run)
    if args.against:
        compare(found, ROWS)
    else:
        head("README's command", *ROWS.values())
        say("", *(found["now"][name] for name in ROWS))
    now = found["now"]
    print(f"\nThe system's share of the processor time: {now['system'] / (now['user'] + now['system']):.1%}")


if __name__ == "__main__":
    main()
