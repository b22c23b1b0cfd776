"""Where in a file the weights lie, and under which names: as trainers, wrappers and libraries leave them.

A file may hold several state dicts, nested under any name, and a state dict may hold a network under a prefix, beside
tensors of other things. This module lists what a file holds, the likeliest first; whoever builds a network from it
takes the first that fits. It only looks at names, shapes and sizes, and renames; it converts and runs nothing.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radiotag.inert import Inert, module_state

DEPTH = 4  # of state dicts in what a file holds
MOST = 10_000  # places that are looked at
TRIED = 4  # state dicts of a file, the likeliest first
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg|teacher|shadow|target|encoder_k)([._]|\d*$|_)", re.IGNORECASE)
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|grad|momentum|loops|callbacks|rng|radiotag", re.IGNORECASE)
COUNTERS = ("total_ops", "total_params", "n_averaged")  # of profilers, and of PyTorch's averaging
WRAPPERS = re.compile(r"(^|\.)(?:module|_orig_mod|_fsdp_wrapped_module)\.")  # parallel, compiled, sharded: at any depth
PARAMETRISED = (  # magnitude and direction of a weight, as the two ways of PyTorch name them
    (".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1")
)  # fmt: skip
State = dict[str, Tensor]


class Found(NamedTuple):
    """A state dict in a file."""

    place: str  # keys and positions, joined by dots; "" if it is all that the file holds
    values: dict[Any, Any]  # tensors, and whatever else lies beside them

    @property
    def size(self) -> int:
        """Number of its parameters, those stored once counted once in each."""
        named = ((name, value) for name, value in dict.items(self.values) if isinstance(name, str))
        return sum(min(Tensor.numel(value), _stored(value)) for _, value in named if isinstance(value, Tensor))


def _stored(value: Tensor) -> int:
    """How many numbers are stored of a tensor, which may repeat them."""
    plain = value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"
    return Tensor.untyped_storage(value).nbytes() // value.element_size() if plain else 0


def state_dicts(content: object) -> list[Found]:
    """The state dicts in what a file holds, the likeliest first: not an average, large, near the top."""
    found, pending, looked = list[tuple[int, Found]](), [(0, "", content)], 0
    while pending and looked < MOST:
        depth, place, value = pending.pop(0)
        looked += 1
        if isinstance(value, Inert):
            value = module_state(value) or dict(value.attributes) or value.items or value.parts
        inner: Sequence[tuple[Any, Any]]
        if isinstance(value, dict):
            inner = [(key, part) for key, part in dict.items(value) if isinstance(key, str)]
            if any(isinstance(part, Tensor) for _, part in inner):
                found.append((depth, Found(place, value)))
        elif isinstance(value, list | tuple):
            inner = list(enumerate(value[:10]))
        else:
            continue
        for key, part in inner if depth < DEPTH else ():
            if isinstance(part, dict | list | tuple | Inert) and not NOT_WEIGHTS.search(str(key)):
                pending.append((depth + 1, f"{place}.{key}".removeprefix("."), part))
    found.sort(key=lambda one: (bool(AVERAGED.search(one[1].place)), -one[1].size, one[0]))
    return [one for _, one in found][:TRIED]


def versions(state: State) -> Iterator[State]:
    """A state dict under the names that a network in it may have, the plainest first.

    Without the wrappers' prefixes; without what profilers leave; the part under each prefix that holds much of it; a
    last layer that stands alone in a sequence, as after a dropout, under the name of the sequence.
    """
    state = _composed(state)
    yield state
    plain = {WRAPPERS.sub(r"\1", k): v for k, v in state.items() if k.rpartition(".")[2] not in COUNTERS}
    parts = [part for part in (plain, *_parts(plain, DEPTH)) if part.keys() != state.keys()]
    yield from parts
    for part in (state, *parts):
        for head in _lonely_heads(part):
            sequence = head.rpartition(".")[0]
            yield {f"{sequence}{k.removeprefix(head)}" if k.startswith(f"{head}.") else k: v for k, v in part.items()}


def _parts(state: State, depth: int) -> Iterator[State]:
    """What lies under each prefix that holds a quarter of the numbers or more, averages last, and so on within it."""
    numbers, total = dict[str, int](), sum(value.numel() for value in state.values())
    for name, value in state.items():
        first, dot, _ = name.partition(".")
        if dot and not first.isdigit():  # a stage of a network is not a network
            numbers[first] = numbers.get(first, 0) + value.numel()
    large = [first for first, number in numbers.items() if 4 * number >= total]
    for first in sorted(large, key=lambda first: bool(AVERAGED.search(first))) if depth else ():  # stable
        part = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{first}.")}
        yield part
        yield from _parts(part, depth - 1)


def _lonely_heads(state: State) -> list[str]:
    """Names of linear layers that are the only layer with weights in their sequence: fc.1, for one."""
    layers = {name.rpartition(".")[0] for name in state}
    heads = []
    for layer in layers:
        sequence, dot, number = layer.rpartition(".")
        weight = state.get(f"{layer}.weight")
        alone = dot and number.isdigit() and [one for one in layers if one.startswith(f"{sequence}.")] == [layer]
        if alone and weight is not None and weight.dim() == 2:
            heads.append(layer)
    return sorted(heads)


def _composed(state: State) -> State:
    """The state dict with weights in place of their magnitudes and directions (weight normalisation)."""
    made = dict(state)
    for magnitude, direction in PARAMETRISED:
        for name in [name.removesuffix(magnitude) for name in state if name.endswith(magnitude)]:
            g, v = state[name + magnitude], state.get(name + direction)
            if v is None or v.dim() < 2 or g.shape != (len(v), *[1] * (v.dim() - 1)):
                continue
            del made[name + magnitude], made[name + direction]
            made[f"{name}.weight"] = torch._weight_norm(v.float(), g.float(), 0)
    return made
