"""The processes of one run, as PyTorch's launcher starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


def launched() -> tuple[int, int]:
    """(rank, size) of this process among those that PyTorch's launcher, or a cluster, started; (0, 1) without it."""
    if "MASTER_ADDR" in os.environ and all(os.environ.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE")):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that mark together, as PyTorch's launcher started them; alone without it."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Wait for all, and learn what each has to say."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise SystemExit(1) from error  # another process is gone, and says why
        return values


@contextmanager
def team() -> Iterator[Team]:
    """Join the processes that `torchrun` started, by its environment variables, until all is done."""
    rank, size = launched()
    if size == 1:
        yield Team()
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))  # one may have hours more to do
    try:
        yield Team(rank, size)
    finally:
        distributed.destroy_process_group()  # its threads, left to the interpreter's end, may abort the process
