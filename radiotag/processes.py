"""The processes of one run, as PyTorch's launcher starts them."""

import os


def launched() -> tuple[int, int]:
    """(rank, size) of this process among those that PyTorch's launcher, or a cluster, started; (0, 1) without it."""
    if "MASTER_ADDR" in os.environ and all(os.environ.get(name, "").isdecimal() for name in ("RANK", "WORLD_SIZE")):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1
