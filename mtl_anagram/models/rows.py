"""Rows of a batch side by side on a CPU: threads with rows of their own wait less for each other than at one row."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Semaphore
from typing import Any, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
T = TypeVar("T")
_threads = ThreadPoolExecutor(256, "mtl_anagram rows")  # which begins no more than are needed


def each(work: Callable[[B], T], blocks: Sequence[B], side_by_side: bool = True) -> list[T]:
    """work(block) of all blocks, in their order; side by side, torch's threads are shared out to them."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    workers = min(threads, len(blocks)) if side_by_side else 1
    if workers < 2:
        return [work(block) for block in blocks]
    todo, done, ready = iter(enumerate(blocks)), dict[int, T](), Semaphore(0)

    def take() -> None:
        # A thread's own number; but threads that begin later have the last one that was set anywhere.
        if torch.get_num_threads() != threads // workers:
            torch.set_num_threads(threads // workers)
        ready.release()
        with torch.set_grad_enabled(gradients):
            done.update((i, work(block)) for i, block in todo)

    submitted = [_threads.submit(take) for _ in range(workers)]
    for _ in submitted:
        ready.acquire()
    torch.set_num_threads(threads)  # before others begin, such as those of a server's next requests
    for one in wait(submitted)[0]:  # all of them, also after an error
        one.result()
    return [done[i] for i in range(len(blocks))]


class Apart(torch.autograd.Function):
    """work(x[rows], rows) -> tensors of every block of rows, side by side, and so their gradient, once, of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: Callable[..., Sequence[Tensor]], blocks: Sequence[slice]) -> Any:
        def begin(rows: slice) -> tuple[Tensor, Sequence[Tensor]]:
            with torch.enable_grad():  # which records nothing for a part that needs none
                part = x[rows].detach().requires_grad_(ctx.needs_input_grad[0])
                return part, work(part, rows)

        ctx.begun, ctx.blocks = each(begin, blocks), blocks
        return tuple(torch.cat(parts) for parts in zip(*(made for _, made in ctx.begun), strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        def end(i: int) -> Tensor:
            part, made = ctx.begun[i]
            own = [gradient[ctx.blocks[i]] for gradient in gradients]
            with torch.enable_grad():  # A scalar's: given others, torch imports 490 modules more (1 s).
                total = sum((y * g).sum() for y, g in zip(made, own, strict=True))
            return torch.autograd.grad(total, part, retain_graph=True)[0]

        return torch.cat(each(end, range(len(ctx.blocks)))), None, None
