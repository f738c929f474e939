"""What the trainings have in common: the command's options, going on from a checkpoint, the loop and its log."""

import argparse
import copy
import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from training import checkpoints, drawings

CASCADE = "embedded-v7"  # the name of what is trained here
LOGGED = 50  # steps to a line of the log
EMA_LIMIT = 0.9985  # the average is over a few hundred steps, so it is good at any time
MEANING = {  # of the plans' fields that are options
    "pictures": "length of the whole training, in pictures",
    "text_until": "pictures that the text encoder learns on",
    "cooldown": "pictures over which the learning rate falls",
    "whole": "pictures that are seen entire, at last",
    "crop": "side of the squares, a multiple of 64",
    "typical": "share of the drawings, 1 = all",
}


class Trainer:
    """A training's state, one step at a time; all randomness comes from one generator."""

    MEASURES: tuple[str, ...]  # what train_step returns
    BETAS = (0.9, 0.99)  # AdamW's
    LARGEST = 1.0  # norm of a gradient
    AVERAGED = True  # whether a running average of the weights is kept, and exported

    def __init__(
        self, plan: Any, data: dict[str, Tensor], concepts: tuple[str, ...], network: Callable[[], nn.Module]
    ) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.data, self.concepts = plan, data, concepts
        self.device = next(iter(data.values())).device
        # With a pixel's channels together, convolutions on a CPU take a quarter less time.
        self.model = network().to(self.device, memory_format=torch.channels_last)
        self.begin_averages()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=plan.lr, betas=self.BETAS, weight_decay=plan.weight_decay, fused=True
        )
        self.generator = torch.Generator(self.device).manual_seed(plan.seed + 1)
        self.step, self.seen, self.seconds = 0, 0, 0.0  # updates of this optimizer, pictures

    def train_step(self) -> tuple[float, ...]:
        """One update; returns what MEASURES names."""
        raise NotImplementedError

    def read(self, folder: Path) -> None:
        """Take the weights of an exported network of the same sizes."""
        raise NotImplementedError

    def begin_from(self, folder: Path) -> None:
        """Start from an exported network; the optimizer and the averages begin anew."""
        self.read(folder)
        self.begin_averages()

    def rate(self) -> float:
        """The learning rate now."""
        return self.plan.rate(self.seen)

    def begin_averages(self) -> None:
        parameters = self.model.named_parameters() if self.AVERAGED else ()
        self.ema = {name: p.detach().clone() for name, p in parameters}

    def update(self, loss: Tensor, size: int) -> float:
        """Learn from the loss of `size` pictures, unless its gradient is not finite; returns the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.LARGEST)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.seen = self.step + 1, self.seen + size
        if self.AVERAGED:
            average(self.ema, self.model, self.step)
        return norm.item()

    def averaged(self) -> Any:
        """The network with its averaged weights."""
        model = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)
        model.load_state_dict(self.ema)
        return model.eval()

    def state(self) -> dict[str, Any]:
        """All that a later stretch needs to go on as if there had been no break."""
        return {
            "plan": dataclasses.asdict(self.plan), "concepts": self.concepts, "step": self.step,
            "seen": self.seen, "seconds": self.seconds, "model": self.model.state_dict(), "ema": self.ema,
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema = {name: state["ema"][name].to(self.device) for name in self.ema}
        self.optimizer.load_state_dict(state["optimizer"])
        restore(self.generator, state["generator"], self.plan.seed + 1 + state["step"])
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]


T = TypeVar("T", bound=Trainer)


def fall(plan: Any, seen: int) -> float:
    """What the learning rate is multiplied by after `seen` pictures: 1, over the last `cooldown` linearly to 0.02."""
    return 1 - 0.98 * min(1.0, max(0.0, 1 - (plan.pictures - seen) / plan.cooldown))


@torch.no_grad()
def average(ema: dict[str, Tensor], module: nn.Module, step: int) -> None:
    """Move the parameters' running averages towards the parameters as they are after `step` updates."""
    decay = min(EMA_LIMIT, (1 + step) / (10 + step))
    names, parameters = zip(*module.named_parameters(), strict=True)
    torch._foreach_lerp_([ema[name] for name in names], list(parameters), 1 - decay)


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
