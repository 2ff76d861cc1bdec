"""The command: python -m jepa_jax.convert SRC DST

Weights in: SRC a file of torch.save or safetensors, DST a new folder that `load_encoder` and
`--init_from` read. Weights out: SRC the folder of a finished run, DST a new folder with the encoder
as safetensors and StableHLO. Every error a person can act on is one line on stderr and a non-zero
exit.
"""

import argparse
import collections
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jepa_jax.command import Parser, ends_at_once, errors_as_lines, fail
from jepa_jax.errors import ConfigError

_DESCRIPTION = """\
Weights in and out, without PyTorch.

  SRC a file    .pth, .pt, .ckpt, .pth.tar (torch.save of PyTorch 1.6 and newer) or .safetensors,
                with the names of eb_jepa, solo-learn or torchvision, for ResNets of basic
                blocks (ResNet-18, -34) and of bottlenecks (ResNet-50 and larger).
                Nothing in it is run. DST becomes a folder for load_encoder and --init_from.
  SRC a folder  of a finished run, or one made from a file. DST becomes a folder with
                encoder.safetensors (torchvision's names), projector.safetensors,
                encoder.stablehlo (for jax.export, the normalisation inside) and card.json.
"""


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form r,g,b") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m jepa_jax.convert", description=_DESCRIPTION)
    parser.add_argument("src", metavar="SRC", type=pathlib.Path, help="a file or a folder")
    parser.add_argument("dst", metavar="DST", type=pathlib.Path, help="a new folder")
    facts = parser.add_argument_group("what weights do not tell (for a file)")
    facts.add_argument(
        "--stem_padding",
        metavar="N",
        type=int,
        help="of a 3x3 stem, 1 or 2; by default 2 for eb_jepa and solo-learn, 1 for torchvision",
    )
    for name in ("mean", "std"):
        facts.add_argument(
            f"--{name}",
            metavar="r,g,b",
            type=_numbers,
            help=f"{name} per channel of the training images, in [0, 1]; by default the project's",
        )
    return parser.parse_args(argv)


def _print_table(rows: dict[str, Any]) -> None:
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:<{width}}{value}")


def _groups(names: Iterable[str]) -> str:
    """'momentum_backbone (40), queue (1)'."""
    counts = collections.Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "nothing"


def _sizes(model: dict[str, Any]) -> str:
    if "patch_size" in model and "stage_sizes" not in model:
        return (
            f"{model['type']}, patches of {model['patch_size']}, width {model['dim']}, "
            f"{model['depth']} blocks of {model['num_heads']} heads; {model['pos_embed']} "
            f"positions, pool {model['pool']}"
        )
    blocks = ", ".join(map(str, model["stage_sizes"]))
    pool = ", max-pool" if model["stem_pool"] else ""
    kernel = model["stem_kernel"]
    expand_dim = model.get("expand_dim", 0)
    expansion = f"; expanded to {expand_dim} features" if expand_dim else ""
    block = model.get("block", "basic")
    return (
        f"ResNet of {blocks} {block} blocks, width {model['width']}; {kernel}x{kernel} stem of "
        f"stride {model['stem_stride']}, padding {model['stem_padding']}{pool}{expansion}"
    )


def _import(arguments: argparse.Namespace) -> None:
    import jax

    from jepa_jax.api import save_import
    from jepa_jax.interop import import_torch, shown
    from jepa_jax.metrics import read_json

    model = import_torch(
        arguments.src,
        stem_padding=arguments.stem_padding,
        mean=arguments.mean,
        std=arguments.std,
    )
    save_import(model, arguments.dst)
    resnet, projector, probe = model.module.encoder, model.module.projector, model.probe
    count = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    given = {"padding": arguments.stem_padding, "mean": arguments.mean, "std": arguments.std}
    assumed = ["stride", *(name for name, value in given.items() if value is None)]
    is_converted = model.dtypes != ("float32",)
    projector_text = "none"
    if projector is not None:
        hidden = projector.hidden_dim
        projector_text = f"{hidden}-{hidden}-{projector.output_dim}"
    _print_table(
        {
            "read": arguments.src,
            "names of": model.source,
            "stored as": ", ".join(model.dtypes) + (", now float32" if is_converted else ""),
            "encoder": _sizes(vars(resnet)),
            "projector": projector_text,
            "parameters": f"{count:,}",
            "probe": "none" if probe is None else f"{probe['bias'].size} classes",
            "mean": ", ".join(f"{value:g}" for value in model.mean),
            "std": ", ".join(f"{value:g}" for value in model.std),
            "left out": shown(_groups(model.ignored), 300),
            "assumed": f"{', '.join(assumed)}: weights do not tell",
            "wrote": f"{arguments.dst}, for load_encoder and --init_from",
        }
    )
    flags = " ".join(_flags(read_json(arguments.dst.expanduser() / "config.json")["config"]))
    print(f"to train on from it: python -m jepa_jax.main --init_from={arguments.dst} {flags}")


def _flags(config: dict[str, Any]) -> Iterable[str]:
    """The overrides with which any config describes the imported model."""
    for section in ("model", "data"):
        for name, value in config[section].items():
            if name != "use_projector":
                text = f"'{tuple(value)}'".replace(" ", "") if type(value) is list else value
                yield f"--config.{section}.{name}={text}"
    yield "--config.model.stem_init=random"


def _export(arguments: argparse.Namespace) -> None:
    from jepa_jax.api import export_encoder
    from jepa_jax.metrics import read_json

    for name in ("stem_padding", "mean", "std"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} is for a file; {arguments.src} is a folder that says it")
    export_encoder(arguments.src, arguments.dst)
    card = read_json(arguments.dst.expanduser() / "card.json")
    preprocessing, projector = card["preprocessing"], card["architecture"]["projector"]
    height, width, _ = preprocessing["image_shape"]
    _print_table(
        {
            "read": arguments.src,
            "encoder": _sizes(card["architecture"]),
            "projector": "none" if projector is None else "-".join(map(str, projector)),
            "features": card["architecture"]["feature_dim"],
            "images": f"{height}x{width}, RGB in [0, 1]",
            "mean": ", ".join(f"{value:g}" for value in preprocessing["mean"]),
            "std": ", ".join(f"{value:g}" for value in preprocessing["std"]),
            "wrote": arguments.dst,
            **{f"  {n}": f"{file['bytes']:>12,} bytes" for n, file in card["files"].items()},
        }
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is without the program's name, by default this process's."""
    arguments = _parse(argv)
    with errors_as_lines("interrupted; nothing was written"):
        try:
            (_export if arguments.src.expanduser().is_dir() else _import)(arguments)
        except (OSError, RuntimeError) as error:  # of paths: too long, no such user, ...
            fail(" ".join(str(error).split()))


if __name__ == "__main__":
    with ends_at_once():
        main()
