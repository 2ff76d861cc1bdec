"""Proves parity with the PyTorch at hand and writes the tables and the plot of docs/parity.md.

    pip install -e '.[parity]'
    python tests/make_parity_report.py      # two to three minutes on two cores

The document's text is written by hand; what stands between `<!-- NAME -->` and `<!-- end -->` is
replaced. Exits with 1 if a row does not hold.
"""

import importlib.metadata
import pathlib
import platform
import re
import sys
import tempfile

import jax
import matplotlib
import numpy as np
import optax
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import parity  # noqa: E402

inputs = parity.inputs
import make_reference  # noqa: E402

from jepa_jax.optim import matrices_only  # noqa: E402

DOCUMENT = ROOT / "docs" / "parity.md"
PLOT = ROOT / "docs" / "training_parity.png"


def table(found: parity.Arrays, wanted: parity.Arrays) -> tuple[str, bool]:
    """The Markdown table of all rows, and whether every one of them holds."""
    lines = ["| piece | measure | asked | worst seen |", "|---|---|---|---|"]
    all_hold = True
    for row in (*parity.ROWS, *parity.WEIGHT_ROWS):
        name, value = parity.compare(row, found, wanted)
        all_hold &= parity.holds(row, value)
        asked = f"{'at least ' if row.measure.at_least else ''}{row.asked:g}"
        lines.append(f"| {row.piece} | {row.measure.words} | {asked} | {value:.3g} |")
        print(f"{'' if parity.holds(row, value) else 'FAILS '}{lines[-1]} {name}", flush=True)
    return "\n".join(lines), all_hold


def optax_lars(wanted: parity.Arrays) -> str:
    """How far optax.lars is from the reference after 20 steps, with the same four numbers."""
    masks = {"weight_decay_mask": matrices_only, "trust_ratio_mask": matrices_only}
    options = {**inputs.LARS_OPTIONS, "trust_coefficient": 0.02, **masks}
    optimizers = {
        "`jepa_jax.lars`": parity.lars(parity.lars_rate, **inputs.LARS_OPTIONS),
        "`optax.lars`": optax.lars(parity.lars_rate, **options),
    }
    lines = ["| after 20 steps | 4 axes | 2 axes | 1 axis |", "|---|---|---|---|"]
    for title, optimizer in optimizers.items():
        last = parity.follow(optimizer, wanted)[-1]
        errors = []
        for parameter in ("conv.weight", "rare.weight", "norm.weight"):
            name = f"lars/19/parameter/{parameter}"
            digest = inputs.digest(name, last[parameter], whole=True)
            errors.append(f"{parity.RELATIVE.compute(name, digest, wanted):.2g}")
        lines.append(f"| {title} | {' | '.join(errors)} |")
    return "\n".join(lines)


def schedule() -> str:
    """Rates of rapid at the beginning of an epoch, here and in the reference."""
    config, steps_per_epoch = parity.SCHEDULES["rapid"]
    rates = parity.schedules({})["schedule/rapid"]
    optim = config.optim

    def references(epoch: int) -> float:
        # Set by epoch - 1 when that epoch ended; before the first one nothing is set.
        if epoch == 0:
            return optim.lr
        last, warmup = epoch - 1, int(optim.warmup_epochs)
        if last < warmup:
            return optim.warmup_start_lr + last * (optim.lr - optim.warmup_start_lr) / (warmup - 1)
        progress = (last - warmup) / (optim.epochs - warmup)
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 + np.cos(np.pi * progress)) / 2

    epochs = (0, 1, 2, 3, 4, 5, 6, 27, 49)
    here = [f"{rates[epoch * steps_per_epoch]:.4g}" for epoch in epochs]
    there = [f"{references(epoch):.4g}" for epoch in epochs]
    return "\n".join(
        [
            f"| epoch | {' | '.join(map(str, epochs))} |",
            "|---" * (len(epochs) + 1) + "|",
            f"| here, at its first step | {' | '.join(here)} |",
            f"| the reference, at all its steps | {' | '.join(there)} |",
        ]
    )


def pytorchs_own_rounding() -> np.ndarray:
    """Relative difference of PyTorch's losses, float64 from float32, at rapid's weights."""
    rapid = {**inputs.LOSS_COEFFS, "peak": 0.1}
    single, double = (
        np.array(make_reference.train(inputs.training_views(), dtype, **rapid))[:, 0]
        for dtype in (torch.float32, torch.float64)
    )
    return double / single - 1


def plot(found: parity.Arrays, wanted: parity.Arrays) -> None:
    """Both loss curves, and their difference beside PyTorch's own from float64."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = found["training/float32/loss"][1:]
    theirs = wanted["training/float32/loss"][1:]
    exact = wanted["training/float64/loss"][1:]
    steps = np.arange(len(ours))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    left.plot(steps, theirs, color="#d95f02", linewidth=5, alpha=0.4, label="PyTorch")
    left.plot(steps, ours, color="#1b1b1b", linewidth=1.2, label="jepa_jax")
    left.set(xlabel="step", ylabel="VICReg loss", title="Loss of 20 training steps, float32")
    left.legend(frameon=False)
    right.axhline(1e-3, color="#777777", linestyle=":", label="asked")
    for difference, color, style, label in (
        (ours / theirs - 1, "#1b1b1b", ".-", "jepa_jax"),
        (exact / theirs - 1, "#7570b3", ".-", "PyTorch in float64"),
        (pytorchs_own_rounding(), "#7570b3", "--", "the same, at rate 0.1\nand weights 1 : 25 : 1"),
    ):
        # Equal floats have no place on a logarithmic axis: they lie on its lower edge.
        right.semilogy(steps, np.maximum(np.abs(difference), 1e-8), style, color=color, label=label)
    right.set_ylim(bottom=1e-8)
    right.set(xlabel="step", title="Relative difference from PyTorch in float32")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.savefig(PLOT, dpi=130, metadata={"Software": None})


def versions() -> str:
    names = ("torch", "torchvision", "pillow", "jax", "flax", "optax", "numpy", "scipy")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return f"Python {platform.python_version()}, {', '.join(found)}, on a CPU."


def main() -> None:
    arrays = {name: a for piece in make_reference.PIECES for name, a in piece().items()}
    found, wanted = parity.both_sides(parity.digests(arrays, whole=True), whole=True)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "latest.pth.tar"
        wanted |= parity.digests(make_reference.weights(path), whole=True)
        found |= parity.digests(parity.weights(path), whole=True)
    rows, all_hold = table(found, wanted)
    plot(found, wanted)
    blocks = {
        "versions": versions(),
        "table": rows,
        "optax.lars": optax_lars(wanted),
        "schedule": schedule(),
    }
    text = DOCUMENT.read_text()
    for name, block in blocks.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}{b}\n{m[2]}", text, flags=re.S)
        if count != 1:
            sys.exit(f"{DOCUMENT} has no block {name}")
    DOCUMENT.write_text(text)
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")
    sys.exit(0 if all_hold else 1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
