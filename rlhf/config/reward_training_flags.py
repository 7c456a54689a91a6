"""`rlhf reward train` without a file, or over one: options of the command line, each of which sets a field.

Owns which option sets which field. What an option may be and what its help says is the field's own: bounds, choices, description.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from rlhf.config.arguments import named, output_folder, real, whole
from rlhf.config.base import section_class
from rlhf.config.explain import shortened
from rlhf.config.reward_training import RewardTrainingSettings

FLAGS: Mapping[str, str] = {
    "--model": "model.path",
    "--train": "data.train",
    "--columns": "data.columns",
    "--test": "data.test",
    "--output": "run.dir",
    "--method": "training.method",
    "--objective": "objective.name",
    "--centring": "objective.centring",
    "--dimensions": "objective.dimensions",
    "--gate": "objective.gate",
    "--comparisons": "objective.comparisons",
    "--weights": "objective.weights",
    "--margin": "data.margin",
    "--validation": "data.validation",
    "--max-tokens": "model.max_tokens",
    "--epochs": "training.epochs",
    "--learning-rate": "training.learning_rate",
    "--batch-size": "training.batch_size",
    "--seed": "run.seed",
    "--threads": "cluster.threads",
    "--device": "cluster.device",
    "--ranks": "training.ranks",
    "--zero-stage": "training.zero_stage",
    "--dtype": "model.dtype",
    "--micro-batch-tokens": "training.micro_batch_tokens",
    "--gradient-checkpointing": "model.gradient_checkpointing",
    "--address": "cluster.address",
    "--checkpoint-every": "checkpoint.every",
    "--eval-every": "training.eval_every",
}
"""Option -> field. Those without an option are set as `section.key=value`."""


def flag_of(field: str) -> str | None:
    """The option that sets a field."""
    return next((flag for flag, place in FLAGS.items() if place == field), None)


def both(field: str) -> str:
    """A field and its option, as messages name them."""
    flag = flag_of(field)
    return f"`{field}`" if flag is None else f"`{field}` ({flag})"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the options; one that is not given is not in the namespace."""
    group = parser.add_argument_group("fields of the configuration", "Each wins over the file.")
    for flag, field in FLAGS.items():
        group.add_argument(flag, default=argparse.SUPPRESS, **_option(flag, field))


def asked(args: argparse.Namespace) -> tuple[str | None, list[str], dict[str, tuple[str, Any]]]:
    """The file, if there is one, the overrides, and of the options that were given: field -> option and value."""
    config, overrides = args.config, args.overrides
    if config is not None and "=" in config and not os.path.isfile(config):  # no file: it is the first override
        config, overrides = None, [config, *overrides]
    found = {}
    for flag, field in FLAGS.items():
        name = flag.removeprefix("--").replace("-", "_")
        if name in args:
            value = getattr(args, name)
            found[field] = flag, dict(value) if flag in PAIRS else value
    return config, overrides, found


def _option(flag: str, field: str) -> dict[str, Any]:
    """What argparse is told of a field."""
    section, name = field.split(".")
    whole_schema = _properties(section)[name]
    (schema,) = [one for one in whole_schema.get("anyOf", [whole_schema]) if one.get("type") != "null"]
    told: dict[str, Any] = {"help": whole_schema["description"].replace("`", "").replace("%", "%%")}
    if flag in PAIRS:
        read, metavar = PAIRS[flag]
        return told | {"type": read, "nargs": "+", "metavar": metavar}
    if schema["type"] == "boolean":
        return told | {"action": "store_true"}
    if "enum" in schema:
        return told | {"choices": schema["enum"], "type": int if schema["type"] == "integer" else str}
    return told | {"type": output_folder if flag == "--output" else _type(schema)}


@cache
def _properties(section: str) -> dict[str, Any]:
    """The fields of a section, as JSON schema."""
    return section_class(RewardTrainingSettings, section).model_json_schema()["properties"]


def _type(schema: Mapping[str, Any]) -> Callable[[str], Any]:
    if schema["type"] == "integer":
        return whole(schema["minimum"], schema["maximum"])
    if schema["type"] == "number":
        least, most = (schema.get(name, schema.get(f"exclusive{name.title()}")) for name in ("minimum", "maximum"))
        return real(least, most, above="exclusiveMinimum" in schema, below="exclusiveMaximum" in schema)
    return str if "pattern" in schema else named


def _column(text: str) -> tuple[str, str | None]:
    """An entry of `--columns`."""
    name, equals, column = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"`{shortened(text)}` must be NAME=COLUMN, such as chosen=better")
    return name, column or None


def _weight(text: str) -> tuple[str, float]:
    """An entry of `--weights`."""
    name, _, number = text.partition("=")
    try:
        return name, real()(number)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"`{shortened(text)}`: {error}. Write NAME=NUMBER, such as helpfulness=0.7"
        ) from None


PAIRS: Mapping[str, tuple[Callable[[str], tuple[str, Any]], str]] = {
    "--columns": (_column, "NAME=COLUMN"),
    "--weights": (_weight, "NAME=W"),
}
"""Options that are several NAME=VALUE."""
