"""What several test modules share: running the commands in this process and in forked ones, and plain oracles."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import fft, stats
from torch import nn
from torch.distributed import TCPStore

from radiotag import cli
from radiotag.networks import Spec

# ---------------------------------------------------------------- running


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self):
        """The only JSON object on stdout; fails if there is anything else."""
        return json.loads(self.out)


def call(*arguments):
    """Run the entry point in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["radiotag", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def good(*arguments):
    result = call(*arguments)
    assert result.code == 0, result.err
    return result


def bad(*arguments, code=1):
    """Run a command that must fail as all failures do: `error:` and `hint:` on stderr, no traceback, no result."""
    result = call(*arguments)
    assert result.code == code, result
    assert "Traceback" not in result.err
    lines = result.err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert lines[first + 1].startswith("hint: ")
    assert result.out == "" or "--json" in arguments
    return result


def environment(**more):
    root = str(Path(cli.__file__).parents[1])
    left_out = {"NO_COLOR", "FORCE_COLOR", "RADIOTAG_DEBUG", "PYTHONUNBUFFERED"}
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    return kept | {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"} | more


FINISH = """
import os, sys
from radiotag import cli

def finish(argv):  # what a forked process is for
    sys.argv, code = ["radiotag", *argv], 1
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
"""
FORKS = """
import itertools, json, os, resource, signal, sys
import radiotag.marking_run, radiotag.training, radiotag.verification
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would pass on that it is ignored

def die(at, size):
    sync, counter = os.fsync, itertools.count(1)
    def fsync(file):
        if next(counter) == at or (size and os.fstat(file).st_size >= size):
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)
    os.fsync = fsync

for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        signal.alarm(300)  # what hangs ends as a failure
        os.environ.update(task["env"])
        os.dup2(os.open(task["out"], os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(task["err"], os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        die(task["kill_at"], task["kill_size"])
        if task["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["largest"], task["largest"]))
        if task["memory"]:
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + task["memory"], now + task["memory"]))
        finish(task["argv"])
    print(pid, flush=True)
"""


class Forks:
    """Forks processes that run the command line, torch already imported."""

    def __init__(self, folder):
        self.folder, self.count = folder, itertools.count()
        self.parent = subprocess.Popen(
            [sys.executable, "-c", FINISH + FORKS],
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **task):
        self.parent.stdin.write(json.dumps(task) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def start(self, *arguments, err=None, kill_at=0, kill_size=0, largest=0, memory=0, **env):
        """Begin a command that is killed as it completes its `kill_at`th file, or the first of `kill_size` bytes.

        `err` may be a terminal for stderr. Returns what `end` takes: first the process id.
        """
        out, own = (self.folder / f"{next(self.count)}" for _ in range(2))
        pid = self.ask(
            argv=list(map(str, arguments)), out=str(out), err=str(err or own), env=env, kill_at=kill_at,
            kill_size=kill_size, largest=largest, memory=memory,
        )  # fmt: skip
        return pid, out, own

    def end(self, begun):
        pid, out, err = begun
        return Result(self.ask(wait=pid), out.read_text(), err.read_text() if err.exists() else "")

    def run(self, *arguments, **options):
        return self.end(self.start(*arguments, **options))

    def together(self, *arguments, size=2, **options):
        """Run a command in several processes, as the launcher starts them; what each said, by rank."""
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        env |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        begun = [self.start(*arguments, **options, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(size)]
        return [self.end(one) for one in begun]


# ---------------------------------------------------------------- keys


def entropy(seed):
    """A deterministic stand-in for os.urandom: SHA-256 in counter mode."""
    counter = 0

    def read(count):
        nonlocal counter
        blocks = range(counter, counter + -(-count // 32))
        counter = blocks.stop
        return b"".join(hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in blocks)[:count]

    return read


# ---------------------------------------------------------------- files and images


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder):
    """Every file of a folder, hidden ones too, with its content's hash."""
    return {p.relative_to(folder).as_posix(): digest(p) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def leftovers(folder):
    """Hidden files, such as a run's unfinished ones."""
    return sorted(p.name for p in folder.rglob(".*"))


def wait_for_files(folder, count):
    deadline = time.monotonic() + 300
    while len(list(folder.rglob("*.png"))) < count:
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.002)


def pixels(image):
    """The pixels of a file (its path or bytes), read without radiotag: (H, W, 3) float64."""
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return np.asarray(opened.convert("RGB")).astype(np.float64)


def measured_psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((pixels(a) - pixels(b)) ** 2))


def brute_ssim(a, b):
    """SSIM of (H, W, 3) pixels (Wang et al. 2004), window by window, from the definition."""
    bell = [[np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    window = np.array(bell) / np.sum(bell)
    x, y = (0.299 * c[..., 0] + 0.587 * c[..., 1] + 0.114 * c[..., 2] for c in (a.astype(float), b.astype(float)))
    found = []
    for i, j in itertools.product(range(x.shape[0] - 10), range(x.shape[1] - 10)):
        p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
        mean_p, mean_q = np.sum(window * p), np.sum(window * q)
        var_p, var_q = np.sum(window * (p - mean_p) ** 2), np.sum(window * (q - mean_q) ** 2)
        both = np.sum(window * (p - mean_p) * (q - mean_q))
        light = (2 * mean_p * mean_q + 2.55**2) / (mean_p**2 + mean_q**2 + 2.55**2)
        found.append(light * (2 * both + 7.65**2) / (var_p + var_q + 7.65**2))
    return np.mean(found)


# ---------------------------------------------------------------- networks and vectors


SPEC = Spec(
    architecture="resnet10", classes=3, small_stem=True, image_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
)


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def unit(rows):
    rows = np.asarray(rows)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def binomial_limits(count, probability):
    """A check that a valid test fails once in a million runs; seeds are fixed, so it passes always or never."""
    return stats.binom.ppf([5e-7, 1 - 5e-7], count, probability)


def small_weights():
    generator = torch.Generator().manual_seed(1)
    return {
        "conv.weight": torch.randn(2, 3, 2, 2, generator=generator),
        "bn.bias": torch.randn(2, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randint(-127, 128, (3, 4), dtype=torch.int8, generator=generator),
        "fc.weight.scale": torch.rand(3, 1, generator=generator),
    }


class Toy(nn.Module):
    """The part of a Network that the functions under test use, with any features and a linear head."""

    def __init__(self, body, weight, size=4):
        super().__init__()
        self.body = body
        self.head = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
        self.head.weight.data, self.head.bias.data = (
            weight.clone(),
            torch.linspace(-1, 1, len(weight), dtype=weight.dtype),
        )
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.5]).view(1, 3, 1, 1))
        self.spec = dataclasses.replace(SPEC, classes=len(weight), image_size=size)
        self.dimension, self.device = weight.shape[1], torch.device("cpu")
        self.eval().requires_grad_(False)

    def features(self, x):
        return self.body(x).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def linear(matrix):
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False).to(matrix.dtype)
    layer.weight.data = matrix
    return nn.Sequential(nn.Flatten(), layer)


def toys(seed):
    return Toy(linear(gaussian(6, 48, seed=seed)), gaussian(3, 6, seed=seed + 10))


def images_in_unit_range(count, size=4, seed=9):
    return torch.from_numpy(np.random.default_rng(seed).random((count, 3, size, size)))


def by_cosines(image):
    """The patterns' coefficients of (3, H, W) by scipy's DCT: the lowest frequencies, even ones across, no constant."""
    grid = fft.dctn(image, axes=(1, 2), norm="ortho")[:, :6, :6:2]
    short = [(0, wanted - have) for wanted, have in zip((3, 6, 3), grid.shape, strict=True)]
    return np.pad(grid, short).reshape(3, -1)[:, 1:].ravel()


# ---------------------------------------------------------------- files


class Bomb:
    """Unpickled, it runs a command that makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def encoded(image, format="PNG", **options):
    """The bytes of a Pillow image's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind, body):
    """A chunk of a PNG file: length, kind, body, checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
