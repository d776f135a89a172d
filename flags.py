"""Flags: a script declares them as fields of a dataclass, and `parse` returns an instance of it.

    @dataclass
    class Config:
        epochs: int = flag(100, "passes over the train split", 1)

    config = parse(Config, argv)
"""
import argparse
import dataclasses
import math
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from common import DataError

# By default the later stages start from the first of these that exists.
ENCODERS = ("runs/pretrain/encoder.pt", "runs/demo/encoder.pt")
# Flags of every stage that trains or extracts features: `precision: str = flag(**PRECISION)`.
PRECISION: dict[str, Any] = dict(
    default="auto", choices=("auto", "bf16", "fp16", "fp32"), may_differ=True,
    help="auto: bf16 on a GPU that has it, and for pre-training on such a CPU; fp16 on other "
         "GPUs, fp32 on other CPUs")
THREADS: dict[str, Any] = dict(
    default=None, low=1, high=256, may_differ=True,
    help="of the loader, for each process (default: cores / processes, at most 8)")


def default_encoder() -> str:
    """The encoder from which a later stage starts without --init; DataError if there is none."""
    for path in ENCODERS:
        if Path(path).exists():
            return path
    raise DataError(f"{ENCODERS[0]} does not exist: pre-train first (`python pretrain.py --demo` "
                    "takes minutes), or name another encoder, random or imagenet with --init")


class RunConfig(Protocol):
    """The fields that every stage's Config must have. It is also a dataclass of `flag` fields."""
    __dataclass_fields__: ClassVar[dict[str, Any]]
    out: str
    overwrite: bool
    precision: str
    threads: int | None


def flag(default: Any, help: str, low: float = -math.inf, high: float = math.inf, *,
         section: str | None = None, choices: tuple | None = None,
         metavar: str | tuple | None = None, may_differ: bool = False) -> Any:
    """A dataclass field that is a flag of the command line.

    low, high: the range of a number, both ends allowed.
    section: a heading of --help, for this flag and those after it.
    may_differ: True if a run may resume with another value than it began with, for example
    because the flag says how or how long it computes and not what."""
    return dataclasses.field(default=default, metadata={
        "help": help, "low": low, "high": high, "section": section, "choices": choices,
        "metavar": metavar, "may_differ": may_differ})


def positional(help: str, metavar: str) -> Any:
    """A dataclass field that is an argument without a flag, or one or more arguments if its type is
    `tuple[str, ...]`. Such fields come first."""
    return dataclasses.field(metadata={
        "help": help, "metavar": metavar, "positional": True, "may_differ": True})


def parse(config_class: type, argv: list[str] | None) -> Any:
    """The command line as an instance of `config_class`.

    A Config may define `presets(args) -> dict`: other defaults, which depend on a flag such as
    --demo. A ValueError from its __post_init__ is reported like a wrong flag."""
    presets = {}
    if hasattr(config_class, "presets"):
        # Ignore --help in this first look, because it should show the defaults from presets.
        first_look = _parser(config_class, presets, add_help=False)
        presets = config_class.presets(first_look.parse_known_args(argv)[0])
    parser = _parser(config_class, presets)
    args = vars(parser.parse_args(argv))
    try:
        return config_class(**{name: tuple(value) if isinstance(value, list) else value
                               for name, value in args.items()})
    except ValueError as error:
        parser.error(str(error))


def _parser(config_class: type, presets: dict, add_help: bool = True) -> argparse.ArgumentParser:
    """A parser with the fields of a Config as flags; presets: {name: another default}."""
    parser = argparse.ArgumentParser(
        description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=add_help)
    group = parser
    for field in dataclasses.fields(config_class):
        if field.metadata.get("section"):
            group = parser.add_argument_group(field.metadata["section"])
        _add_argument(group, field, presets.get(field.name, field.default))
    return parser


def _add_argument(group, field: dataclasses.Field, default: Any) -> None:
    """Add one field of a Config to argparse, by its type and its metadata."""
    about, name = field.metadata, f"--{field.name.replace('_', '-')}"
    if about.get("positional"):
        several = ... in typing.get_args(field.type)
        group.add_argument(field.name, nargs="+" if several else None, help=about["help"],
                           metavar=about["metavar"])
        return
    if field.type is bool:
        group.add_argument(name, action="store_true", default=default, help=about["help"])
        return
    if field.type == bool | None:  # --clahe, --no-clahe, or None without either
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=default,
                           help=about["help"])
        return
    # The type is plain (`int`), optional (`int | None`) or a tuple. A tuple takes as many values as
    # its default has, or one or more values if it is written `tuple[str, ...]`.
    kind: Any
    kind, *rest = typing.get_args(field.type) or (field.type,)
    count = len(field.default) if isinstance(field.default, tuple) else None
    kwargs: Any = {"nargs": "+" if ... in rest else count}
    if ... in rest and not isinstance(about["metavar"], tuple):  # LOW [HIGH] is one setting
        kwargs["action"] = Several
    group.add_argument(
        name, type=number_within(kind, about["low"], about["high"]), default=default,
        choices=about["choices"], metavar=about["metavar"],
        help=about["help"] + _default_text(default), **kwargs)


class Several(argparse.Action):
    """A flag of several values. If it is given twice, both lists count, and the default does not.
    For argparse's `action`."""

    def __call__(self, parser, namespace, values: Any, option_string=None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *values])


def _default_text(default: Any) -> str:
    """The part of --help that shows a default, as one would type it."""
    if default in (None, (), ""):
        return ""
    values = default if isinstance(default, tuple) else [default]
    return f" (default {' '.join(map(str, values))})"


def number_within(kind: Callable, low: float, high: float) -> Callable:
    """A type for argparse: `kind` of the text. Numbers must lie in `low` to `high`."""
    def convert(text):
        value = kind(text)
        if kind is not str and not low <= value <= high:        # refuses NaN as well
            raise argparse.ArgumentTypeError(f"{text} does not lie in {low:g} to {high:g}")
        return value

    convert.__name__ = kind.__name__        # argparse writes "invalid int value" from this
    return convert


def differing_flags(before: dict, now: dict) -> str:
    """`--seed (0 there, 5 here), …` for all settings in which two runs differ, or ""."""
    def typed(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return ", ".join(
        f"--{name.replace('_', '-')} ({typed(before.get(name, 'not given'))} there, "
        f"{typed(now.get(name, 'not given'))} here)"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name))
