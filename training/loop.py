"""What the trainings have in common: the command's options, going on from a checkpoint, the loop and its log."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from training import checkpoints, drawings

CASCADE = "embedded-v5"  # the name of what is trained here
LOGGED = 50  # steps to a line of the log
MEANING = {  # of the plans' fields that are options
    "pictures": "length of the whole training, in pictures",
    "text_until": "pictures that the text encoder learns on",
    "cooldown": "pictures over which the learning rate falls",
    "whole": "pictures that are seen entire, at last",
    "crop": "side of the squares, a multiple of 64",
    "typical": "share of the drawings, 1 = all",
}


class Trainer(Protocol):
    """A training's state, one step at a time. MEASURES names what train_step returns."""

    MEASURES: tuple[str, ...]
    plan: Any
    step: int  # updates since the optimizer began anew
    seen: int  # pictures
    seconds: float

    def train_step(self) -> tuple[float, ...]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def begin_from(self, folder: Path) -> None: ...


T = TypeVar("T", bound=Trainer)


def default_device() -> str:
    """Where a training runs unless it is told: a CUDA device where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes in it; on a CPU without such instructions it is slower than float32."""
    able = device.type != "cpu" or torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


def restore(generator: torch.Generator, state: Tensor, seed: int) -> None:
    """The generator's state as it was saved; another kind of device than then begins anew from the seed."""
    if state.shape == generator.get_state().shape:
        generator.set_state(state)
    else:
        generator.manual_seed(seed)


def seen_by(folder: Path) -> int:
    """How many pictures an exported part of this cascade has seen; 0 for another cascade's, which only begins it."""
    index = folder.parent / "cascade.json"
    if not index.is_file():
        return 0
    about = json.loads(index.read_text(encoding="utf-8"))
    return about["training"].get(folder.name, {}).get("pictures", 0) if about["name"] == CASCADE else 0


def options(
    description: str | None, plan: Any, given: tuple[str, ...], run: str, sheet_minutes: float = 0.0
) -> argparse.ArgumentParser:
    """The command's options; `given` are the fields of the plan that it can set, of their defaults' types."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--data", required=True, help="folder of the drawings (see training/README.md)")
    add("--cache", default="runs/data", help="folder of the packed drawings")
    add("--run", default=run, help="folder of the checkpoint, the log and what it draws")
    add("--minutes", type=float, default=9.0, help="stop after this long; the same command goes on")
    add("--concepts", nargs="+", metavar="NAME", help="what is learnt, the first time")
    add("--init", help="an exported folder of this part to start from, the first time")
    for name in given:
        value = getattr(plan, name)
        count = {"nargs": len(value)} if isinstance(value, tuple) else {}
        kind = type(value[0] if isinstance(value, tuple) else value)
        add(f"--{name.replace('_', '-')}", type=kind, help=MEANING.get(name), **count)
    add("--checkpoint-minutes", type=float, default=3.0)
    add(
        "--sheet-minutes", type=float, default=sheet_minutes, help="0 = show what was learnt at the end alone"
    )
    add("--device", default=default_device(), help="cpu or cuda (default: %(default)s)")
    return parser


def begin(
    args: argparse.Namespace,
    plan: Any,
    given: tuple[str, ...],
    make: Callable[[Any, dict[str, Tensor], tuple[str, ...], Tensor | None], T],
    concepts: tuple[str, ...] = drawings.DRAWN,
) -> T:
    """The trainer as its last checkpoint left it, or a new one; options given now change its plan.

    plan: the default one. make(plan, data, concepts, typical) -> the trainer. concepts: what is learnt unless told.
    """
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    state = checkpoints.load(run)
    settings = dataclasses.asdict(plan) if state is None else dict(state["plan"])
    settings |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    plan = type(plan)(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    concepts = tuple((args.concepts or concepts) if state is None else state["concepts"])
    data = drawings.load_some(args.data, concepts, args.cache)
    data = {name: value.to(args.device) for name, value in data.items()}
    typical = drawings.load_typical(args.cache) if plan.typical < 1 else None
    trainer = make(plan, data, concepts, typical)
    if state is not None:
        trainer.load(state)
    elif args.init is not None:
        trainer.begin_from(Path(args.init))
        trainer.seen = seen_by(Path(args.init))
    facts = {"concepts": len(concepts), "resumed_at": trainer.step, **dataclasses.asdict(plan)}
    print(json.dumps(facts), flush=True)
    return trainer


def go(
    trainer: Trainer,
    args: argparse.Namespace,
    show: Callable[[Path], dict[str, Any] | None],
    facts: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Train until the plan is done, the minutes are over or SIGTERM comes; writes checkpoints and RUN/log.jsonl.

    RUN/done is there once the plan is done.

    show(run) draws or measures what was learnt, at the end and every `sheet_minutes`; what it returns is
    logged. facts: more for every line of the log.
    """
    run = Path(args.run)
    start = saved = logged = shown = time.monotonic()
    carried, seen_before, lines = trainer.seconds, trainer.seen, []
    with (run / "log.jsonl").open("a", buffering=1) as log:

        def note(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)

        def look() -> None:
            found = show(run)
            if found is not None:
                note({"pictures": trainer.seen, **found})

        told: list[int] = []  # by SIGTERM to end, as if the minutes were over
        before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
        while (
            trainer.seen < trainer.plan.pictures and time.monotonic() - start < 60 * args.minutes and not told
        ):
            lines.append(torch.tensor(trainer.train_step()))
            now = time.monotonic()
            trainer.seconds = carried + now - start
            if len(lines) == LOGGED:
                means = [round(value, 5) for value in torch.stack(lines).mean(0).tolist()]
                speed = round((trainer.seen - seen_before) / (now - logged), 1)
                note({
                    "step": trainer.step, "pictures": trainer.seen, "minutes": round(trainer.seconds / 60, 2),
                    **dict(zip(trainer.MEASURES, means, strict=True)), "per_second": speed, **facts(),
                })  # fmt: skip
                lines, logged, seen_before = [], now, trainer.seen
            if now - saved > 60 * args.checkpoint_minutes:
                checkpoints.save(trainer.state(), run)
                saved = time.monotonic()
            if args.sheet_minutes and now - shown > 60 * args.sheet_minutes:
                look()
                shown = time.monotonic()
        checkpoints.save(trainer.state(), run)
        signal.signal(signal.SIGTERM, before)
        if not told:
            look()
        (run / "done").unlink(missing_ok=True)
        if trainer.seen >= trainer.plan.pictures:
            (run / "done").touch()
