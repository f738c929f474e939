"""What the trainings have in common: the command's options, going on from a checkpoint, the loop and its log."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from training import checkpoints, drawings

LOGGED = 50  # steps to a line of the log
MEANING = {  # of the plans' fields that are options
    "pictures": "length of the whole training, in pictures",
    "grow": "pictures at 16 px and at 32 px",
    "batches": "batch sizes at 16, 32 and 64 px",
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
    step: int
    seconds: float

    @property
    def seen(self) -> int: ...
    def train_step(self) -> tuple[float, ...]: ...
    def state(self) -> dict[str, Any]: ...
    def load(self, state: dict[str, Any]) -> None: ...
    def begin_from(self, folder: Path) -> None: ...


T = TypeVar("T", bound=Trainer)


class Threads:
    """One thread or two, whichever is faster just now: on a busy machine two wait for each other.

    Every 60 steps one step is timed with each; a step that takes far longer than the one-thread step did ends
    the use of two at once.
    """

    def __init__(self) -> None:
        self.steps, self.one, self.use = 0, float("inf"), 1

    def before(self) -> None:
        trial = {0: 1, 1: 2}.get(self.steps % 60, self.use)
        torch.set_num_threads(trial)

    def after(self, seconds: float) -> None:
        place = self.steps % 60
        if place == 0:
            self.one = seconds
        elif place == 1:
            self.use = 2 if seconds < 0.85 * self.one else 1
        elif seconds > 1.2 * self.one:
            self.use = 1
        self.steps += 1


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
    add("--concepts", nargs="+", metavar="NAME", help="what is learnt, the first time; all unless given")
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
    add("--threads", type=int, default=2, help="0 = one or two, as it goes faster")
    return parser


def begin(
    args: argparse.Namespace,
    plan: Any,
    given: tuple[str, ...],
    make: Callable[[Any, dict[str, Tensor], tuple[str, ...], Tensor | None], T],
) -> T:
    """The trainer as its last checkpoint left it, or a new one; options given now change its plan.

    plan: the default one. make(plan, data, concepts, typical) -> the trainer.
    """
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    state = checkpoints.load(run)
    settings = dataclasses.asdict(plan) if state is None else dict(state["plan"])
    settings |= {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    plan = type(plan)(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    concepts = tuple((args.concepts or drawings.CONCEPTS) if state is None else state["concepts"])
    data = drawings.load_some(args.data, concepts, args.cache)
    typical = drawings.load_typical(args.cache) if plan.typical < 1 else None
    trainer = make(plan, data, concepts, typical)
    if state is not None:
        trainer.load(state)
    elif args.init is not None:
        trainer.begin_from(Path(args.init))
    facts = {"concepts": len(concepts), "resumed_at": trainer.step, **dataclasses.asdict(plan)}
    print(json.dumps(facts), flush=True)
    return trainer


def go(
    trainer: Trainer,
    args: argparse.Namespace,
    show: Callable[[Path], dict[str, Any] | None],
    facts: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Train until the plan is done or the minutes are over; writes checkpoints and RUN/log.jsonl.

    show(run) draws or measures what was learnt, at the end and every `sheet_minutes`; what it returns is
    logged. facts: more for every line of the log.
    """
    torch.set_num_threads(args.threads or 2)
    threads = None if args.threads else Threads()
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

        while trainer.seen < trainer.plan.pictures and time.monotonic() - start < 60 * args.minutes:
            if threads is not None:
                threads.before()
            began = time.monotonic()
            lines.append(torch.tensor(trainer.train_step()))
            now = time.monotonic()
            if threads is not None:
                threads.after(now - began)
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
        look()
