"""Work shared by processes that see one folder: each unit under a lock, which opens when its process ends.

Locks are the file system's own (flock), on one machine or on many with a shared folder: whoever is killed gives his
up at once, and no clock, process number or heartbeat is asked.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import SourceError

try:
    import fcntl
except ImportError:  # Windows: work is not shared there
    fcntl = None  # type: ignore[assignment]

POLL = 0.5  # seconds between looks at what others are at work on


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file within `with`; False where it is another's and wait is False."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise SourceError(f"{path} cannot be written ({error}): choose another folder") from error
    with file:  # closing it opens the lock
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            remedy = "choose a folder on a file system with locks (flock)"
            raise SourceError(f"{path} cannot be locked ({error}): {remedy}") from error
        yield True


def restarted() -> bool:
    """Whether torchrun's agent has started this process again, in the same launch."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Claims:
    """Units of work by name, in a folder where every process of the work keeps its locks and marks.

    A mark says that a unit was begun, and goes when its work ends, unless by a kill.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def share(self, names: Sequence[str], done: Callable[[str], bool]) -> Iterator[str]:
        """Every unit that is not done, in turn, under its lock; those that were begun before come last.

        Ends when no unit is anybody's. Each is given out once at most.
        """
        left = sorted(names, key=lambda name: self._mark(name).exists())  # stable: the others stay in order
        while left:
            waiting = []
            for name in left:
                with locked(self.folder / f"{name}.lock", wait=False) as mine:
                    if not mine:
                        waiting.append(name)
                    elif done(name):
                        self._mark(name).unlink(missing_ok=True)
                    else:
                        yield name
            left = waiting
            if left:
                time.sleep(POLL)

    def killed(self, name: str) -> bool:
        """Whether a unit was at work when its worker was killed, in this launch."""
        return restarted() and self._mark(name).exists()

    @contextmanager
    def begun(self, name: str) -> Iterator[None]:
        """The unit's mark, within `with`."""
        self._mark(name).touch()
        try:
            yield
        finally:
            self._mark(name).unlink(missing_ok=True)

    def _mark(self, name: str) -> Path:
        return self.folder / f"{name}.begun"
