"""What `trace` finds in the classification models of torchvision, how long it takes and how much memory.

Every model runs in a process of its own:

    python benchmarks/zoo.py                       # all of them, as a table
    python benchmarks/zoo.py resnet18 vit_b_16     # some of them
    python benchmarks/zoo.py --write docs/zoo.md   # into the page of the documentation
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

SIZE = 224
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def names() -> list[str]:
    """All classification models of torchvision."""
    from torchvision import models

    return models.list_models(module=models)


def build(name: str, **options: Any) -> Any:
    """A model without trained weights; their values play no part here."""
    from torch import nn
    from torchvision import models

    for init in ("trunc_normal_", "kaiming_normal_", "normal_", "xavier_uniform_"):  # seconds for nothing
        setattr(nn.init, init, lambda tensor, *args, **kwargs: tensor)
    return models.get_model(name, weights=None, **OPTIONS.get(name, {}), **options)


class Memory:
    """Peak of the memory that is resident in this process while the block runs, in bytes."""

    def __enter__(self) -> Memory:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
        return self

    def __exit__(self, *error: object) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        self.peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(name: str) -> dict[str, Any]:
    """Trace one model in this process."""
    import torch

    from lightning_split import trace

    x = torch.randn(2, 3, SIZE, SIZE)
    torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3))  # wake the threads and the libraries
    with Memory() as base:
        pass
    model = build(name)
    with Memory() as forward:
        start = time.perf_counter()
        model(x)
        seconds = time.perf_counter() - start
    with Memory() as tracing:
        start = time.perf_counter()
        arch = trace(model, x)
        traced = time.perf_counter() - start
    found, hidden = share(arch)
    return {
        "name": name,
        "groups": len(arch.groups),
        "neurons": sum(group.width for group in arch.groups),
        "channels": found,
        "hidden": hidden,
        "forward_s": seconds,
        "trace_s": traced,
        "memory": (tracing.peak - base.peak) / (forward.peak - base.peak),
        "reasons": Counter(u.reason.split(" (in ")[0] for u in arch.unsplittable),
        "note": arch.note,
    }


def share(arch: Any) -> tuple[int, int]:
    """Hidden channels (outputs of producers, but for the model's own) that can be split, and all of them."""
    import numpy as np

    splittable = {i for group in arch.groups for i in group.neurons}
    output = {u.name for u in arch.unsplittable if "part of the model's output" in u.reason}
    found = hidden = 0
    for (path, port), here in arch.ports.items():
        if port == "out" and path not in output:
            found += int(np.isin(here.neuron, list(splittable)).sum())
            hidden += len(here.neuron)
    return found, hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of models (default: all)")
    parser.add_argument("--write", type=Path, help="page that receives the table")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0])))
        return
    rows = []
    for name in args.models or names():
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            print(f"{name:24} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{row['name']:24} {row['groups']:4} groups {row['neurons']:6} neurons "
            f"{row['channels'] / row['hidden']:6.1%} of {row['hidden']:6} channels   "
            f"forward {row['forward_s']:5.2f} s  trace {row['trace_s']:6.2f} s  "
            f"memory x {row['memory']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
