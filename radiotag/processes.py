"""The processes of one marking run, started by PyTorch's launcher."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


def launched() -> tuple[int, int]:
    """(rank, size) of this process as set by PyTorch's launcher or a cluster; (0, 1) without them."""
    if "MASTER_ADDR" in os.environ and all(os.environ.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE")):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that mark one data set together; a single process without a launcher."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """Wait for all processes and return the value of each, in the order of ranks."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        try:
            distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise SystemExit(1) from error  # another process has stopped and reports the reason
        return values


@contextmanager
def team() -> Iterator[Team]:
    """Join the processes that `torchrun` started, using its environment variables."""
    rank, size = launched()
    if size == 1:
        yield Team()
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30))  # a process may need hours more than others
    try:
        yield Team(rank, size)
    finally:
        distributed.destroy_process_group()  # its threads may abort the process if they run until the interpreter exits
