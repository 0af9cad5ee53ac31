"""What `trace` finds in the classification models of torchvision, what it costs, and that splits are exact.

Every model runs in a process of its own:

    python benchmarks/zoo.py                       # all of them, as a table
    python benchmarks/zoo.py resnet18 vit_b_16     # some of them
    python benchmarks/zoo.py --write docs/zoo.md   # into the page of the documentation (make zoo)
    python benchmarks/zoo.py --results zoo.jsonl   # note results in a file; what is there is not run again
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import textwrap
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZE = 224  # of the images that are traced
EXACT = 1e-9  # the deviation that is asked for
# Smaller images for the proof in float64; 7 x 7 maps and larger where a flattened map has to vary in space.
SMALL = {"alexnet": 127, "inception_v3": 299, "googlenet": 96, "maxvit_t": 224}
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


def names() -> list[str]:
    """All classification models of torchvision."""
    from torchvision import models

    return models.list_models(module=models)


def by_cost() -> list[str]:
    """The same, the cheapest forward pass first."""
    from torchvision import models

    cost = {name: models.get_model_weights(name).DEFAULT.meta["_ops"] for name in names()}
    return sorted(cost, key=cost.__getitem__)


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


class Clock:
    """Seconds that the block takes, by the wall and of this process on all cores."""

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def prepare() -> None:
    """Import everything; nothing here may start threads, which do not survive a fork."""
    import torch
    import torchvision  # noqa: F401

    from lightning_split import trace

    trace(torch.nn.Linear(1, 1), torch.zeros(1, 1))


def measure(name: str) -> dict[str, Any]:
    """Trace one model in this process."""
    import torch

    from lightning_split import trace

    prepare()
    size = max(SIZE, SMALL.get(name, 0))
    x = torch.randn(2, 3, size, size)
    torch.nn.functional.conv2d(x, torch.randn(8, 3, 3, 3))  # wake the threads
    with Memory() as base:
        pass
    model = build(name)
    with Memory() as forward, Clock() as once:
        model(x)
    with Memory() as tracing, Clock() as traced:
        arch = trace(model, x)
    found, hidden = share(arch)
    reasons: Counter[str] = Counter()
    for neurons in arch.unsplittable:
        reasons[neurons.reason.split(" (in ")[0]] += neurons.width
    return {
        "name": name,
        "groups": len(arch.groups),
        "neurons": sum(group.width for group in arch.groups),
        "channels": found,
        "hidden": hidden,
        "forward_s": once.wall,
        "forward_cpu_s": once.cpu,
        "trace_s": traced.wall,
        "trace_cpu_s": traced.cpu,
        "memory": (tracing.peak - base.peak) / (forward.peak - base.peak),
        "reasons": reasons,
        "note": arch.note,
    }


def deviation(name: str, seed: int = 0) -> float:
    """Split one or two random neurons of every group, in float64, and return how much the outputs change.

    All parameters and BatchNorm statistics are random. Copies with unequal weights and ghosts (offspring of
    weight zero with other incoming weights), in eval and in train mode; the worst deviation relative to the
    largest output.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import exactness
    import torch

    torch.manual_seed(seed)
    size = SMALL.get(name, 64)
    options = {"image_size": 56 if name == "vit_h_14" else 64} if name.startswith("vit") else {}
    size = options.get("image_size", size)
    model, x = build(name, **options).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    exactness.randomise(model, x, seed)
    return exactness.deviation(model, x, seed)


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


HEAD = """\
# The zoo

What `trace` finds in {count} of the {all} classification models of torchvision, for two images of 224 x 224
pixels (299 for Inception v3). `make zoo` writes this page for all of them, and
`python benchmarks/zoo.py --write PAGE NAMES` one for some of them.

*Channels* are those of all hidden producers; where channels come in equal groups (ShuffleNet, grouped
convolutions, residual streams) one neuron has several of them. *Deviation* is the largest change of the
output, relative to the largest output, after two random neurons of every group have been split without
displacement: in float64, in eval and in train mode, all parameters random, images smaller (`python
benchmarks/zoo.py --one deviation NAME` prints it). *Forward* and *trace* are seconds of one call
on {cores} cores, and *memory* is the peak of `trace` over that of one forward pass, parameters included.

{summary}

What is left alone, and why, is named below the table.

| model | groups | neurons | channels that can be split | deviation | forward | trace | memory |
|---|---:|---:|---:|---:|---:|---:|---:|
"""


def summary(rows: list[dict[str, Any]]) -> str:
    """The extremes, in a sentence or two."""
    whole = sum(r["channels"] == r["hidden"] for r in rows)
    slow, busy = (max(rows, key=lambda r: r[time]) for time in ("trace_s", "trace_cpu_s"))
    large = max(rows, key=lambda r: r["memory"])
    found = (
        f"All hidden channels can be split in {whole} of these models. Tracing takes at most "
        f"{slow['trace_s']:.1f} s ({slow['name']}; {busy['trace_cpu_s']:.1f} s of processor time for "
        f"{busy['name']}) and {large['memory']:.2f} times the memory of a "
        f"forward pass ({large['name']})"
    )
    proven = [r for r in rows if r["deviation"] is not None]
    if proven:
        above = [f"{r['name']} ({told(r['deviation'])})" for r in proven if r["deviation"] > EXACT]
        found += f"; outputs deviate by at most {EXACT:.0e} in {len(proven) - len(above)} models"
        found += f", and by more in {' and '.join(above)}" if above else ""
    return textwrap.fill(f"{found}.", 110)


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the documentation."""
    rows = sorted(rows, key=lambda r: names().index(r["name"]))
    lines = [
        f"| {r['name']} | {r['groups']} | {r['neurons']:,} "
        f"| {r['channels'] / r['hidden']:.0%} of {r['hidden']:,} "
        f"| {told(r['deviation'])} | {r['forward_s']:.1f} s | {r['trace_s']:.1f} s "
        f"| {r['memory']:.2f} |"
        for r in rows
    ]
    reasons: Counter[str] = Counter()
    models: dict[str, set[str]] = {}
    for r in rows:
        for reason, channels in r["reasons"].items():
            reasons[reason] += channels
            models.setdefault(reason, set()).add(r["name"])
    left = [
        f"| {reason} | {channels:,} | {len(models[reason])} |" for reason, channels in reasons.most_common()
    ]
    return (
        HEAD.format(count=len(rows), all=len(names()), cores=os.cpu_count(), summary=summary(rows))
        + "\n".join(lines)
        + "\n\n## What is left alone\n\n| reason | channels | models |\n|---|---:|---:|\n"
        + "\n".join(left)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of models (default: all, the cheapest first)")
    parser.add_argument("--write", type=Path, help="page that receives the table")
    parser.add_argument("--results", type=Path, help="file of JSON lines with the results so far")
    parser.add_argument("--no-proof", action="store_true", help="do not split anything, only trace")
    parser.add_argument("--one", choices=("measure", "deviation"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(globals()[args.one](args.models[0])))
        return
    known = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    rows = {row["name"]: row for row in map(json.loads, known)}
    failed = []
    prepare()
    for name in args.models or by_cost():
        if name in rows:
            continue
        try:
            row = in_process("measure", name)
            row["deviation"] = None if args.no_proof else in_process("deviation", name)
        except Exception as error:  # the others are still worth knowing
            failed.append(name)
            print(f"{name}: {error!r}", file=sys.stderr, flush=True)
            continue
        rows[name] = row
        show(row)
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if args.write:
            args.write.write_text(page([*rows.values()]))
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


def show(row: dict[str, Any]) -> None:
    """Print what is known of a model."""
    print(
        f"{row['name']:24} {row['groups']:4} groups {row['neurons']:6} neurons "
        f"{row['channels'] / row['hidden']:6.1%} of {row['hidden']:6} channels   "
        f"deviation {told(row['deviation']):7}  "
        f"forward {row['forward_s']:5.2f} s (CPU {row['forward_cpu_s']:5.2f} s)  "
        f"trace {row['trace_s']:5.2f} s (CPU {row['trace_cpu_s']:5.2f} s)  memory x {row['memory']:.2f}",
        flush=True,
    )


def told(deviation: float | None) -> str:
    return "not run" if deviation is None else f"{deviation:.0e}"


def in_process(what: str, name: str) -> Any:
    """Run one measurement in a process of its own, which starts with all that is imported here."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(globals()[what], name).result()


if __name__ == "__main__":
    main()
