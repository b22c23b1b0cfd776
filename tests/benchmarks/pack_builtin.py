"""Turn a checkpoint of train-demo into the built-in marking network: int8 weights, a quarter of the bytes.

radiotag train-demo cifar10/train -o marker.pt --arch resnet10 --epochs 8 --seed 1 --val cifar10/test
python tests/benchmarks/pack_builtin.py marker.pt
"""

import json
import sys
from pathlib import Path

import safetensors.torch

from radiotag.networks import BUILTIN, load, pack, to_metadata

network = load(Path(sys.argv[1]))
metadata = {"radiotag": json.dumps(to_metadata(network.spec), sort_keys=True)}
BUILTIN.write_bytes(safetensors.torch.save(pack(network.module.state_dict()), metadata))
print(f"{BUILTIN}: {BUILTIN.stat().st_size / 1e6:.2f} MB")
