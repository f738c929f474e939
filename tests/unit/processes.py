"""Processes that a test starts and kills, forked from a server without threads: pytest-xdist's own may hang then."""

import multiprocessing
import os
import time

import torch

from mtl_anagram import Cascade

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mtl_anagram.__main__", "mtl_anagram.evaluation.protocol", "tests.unit.tiny"])


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(work, *arguments, **options):
    """work(*arguments, **options) in a process; it ends with status 0 where nothing was raised."""
    process = CONTEXT.Process(target=_run, args=(work, arguments, options), daemon=True)
    process.start()
    return process


def status(process):
    """A process's exit status, once it has ended."""
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _run(work, arguments, options):
    torch.set_num_threads(1)
    work(*arguments, **options)
    os._exit(0)


def on_tiny(work, folder, *arguments, before=None, **options):
    """work(*arguments, model=the cascade of a folder, **options), after before()."""
    if before is not None:
        before()
    work(*arguments, model=Cascade.from_pretrained(folder, device="cpu"), **options)
