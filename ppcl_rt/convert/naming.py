"""Tensors of somebody's file under diffusers' names, checked against its class.

What a model was first published as is translated by the family's own table, at any width and without a copy; all else
by diffusers' converters.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from ppcl_rt.families import registry
from ppcl_rt.files import one_line
from ppcl_rt.model.exchange import Shapes

Tensors = Mapping[str, torch.Tensor]

# In front of every name of the transformer, in files that hold a whole pipeline.
_PREFIX = "model.diffusion_model."
# No tensor is called so: a converter is then asked whatever there is.
_NOWHERE = ""


def family_of(config: Mapping[str, Any], where: str) -> Any:
    """The family's class for a config of diffusers.

    Raises:
        ValueError: there is none.
    """
    return registry.of_class(config.get("_class_name"), where, stock_alone=True)


def stock_shapes(family: Any, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of diffusers' class, by name; no memory is taken.

    Raises:
        ValueError: the class cannot be built so.
    """
    try:
        with torch.device("meta"):
            built = getattr(diffusers, family.stock_name).from_config(dict(config))
    except Exception as error:
        # Whatever a constructor that checks nothing trips over, it is the config that makes no sense.
        raise ValueError(f"the config describes no {family.stock_name}: {one_line(error)}") from None
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def under_stock_names(tensors: Tensors, family: Any, config: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    """The tensors of a transformer under diffusers' names, all there and of the right shapes.

    Args:
        tensors: under diffusers' names or those of the original, with or without what a pipeline puts in front.
        config: of diffusers' class.
        where: what they are of, for messages.

    Raises:
        ValueError: they are of another model; one line says what is missing or does not fit.
    """
    wanted = stock_shapes(family, config)
    ours = _of_transformer(tensors)
    named = _by_table(ours, family, wanted, where) or _converted(ours, family, wanted, config, where)
    if lost := sorted(set(wanted) - set(named)):
        raise ValueError(f"{where} is no {family.stock_name} of this config: it holds no {lost[0]} ({len(lost)} such)")
    if more := sorted(set(named) - set(wanted)):
        raise ValueError(
            f"{where} is no {family.stock_name} of this config: it also holds {more[0]} ({len(more)} such)"
        )
    for name, shape in wanted.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(f"{where}: {name} is {list(named[name].shape)}, the config asks for {list(shape)}")
    return {name: named[name] for name in wanted}


def _of_transformer(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of the transformer, without what a whole pipeline's file puts in front of their names."""
    ours = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    return ours or dict(tensors)


def _by_table(ours: Tensors, family: Any, wanted: Shapes, where: str) -> dict[str, torch.Tensor]:
    """What the family first called its tensors, translated by its table; nothing where other tensors are there.

    Raises:
        ValueError: nothing else is there, but not all of them are; or one has other rows than the config asks for.
    """
    try:
        there = set(family.originals(wanted))
    except ValueError:
        # A family without a table.
        return {}
    lost, more = sorted(there - set(ours)), set(ours) - there
    if lost and not more:
        raise ValueError(f"{where} is no {family.stock_name} of this config: it holds no {lost[0]} ({len(lost)} such)")
    if lost or more:
        return {}
    try:
        found: dict[str, torch.Tensor] = family.from_original(ours, wanted)
    except ValueError as error:
        raise ValueError(f"{where} is no {family.stock_name} of this config: {error}") from None
    return found


def _converted(
    ours: Tensors, family: Any, wanted: Collection[str], config: Mapping[str, Any], where: str
) -> dict[str, torch.Tensor]:
    """Tensors as diffusers' converter names them; as they are where all that is wanted is there.

    Raises:
        ValueError: the converter misses something.
    """
    if all(name in ours for name in wanted):
        return dict(ours)
    convert = SINGLE_FILE_LOADABLE_CLASSES[family.stock_name]["checkpoint_mapping_fn"]
    try:
        return dict(convert(checkpoint=dict(ours), config=dict(config)))
    except Exception as error:
        # Converters take a model of theirs for granted.
        if any(name in ours for name in wanted):
            # Some are there under diffusers' names: what is missing is for the caller to say.
            return dict(ours)
        raise ValueError(
            f"{where} is no {family.stock_name}, nor the original of one: diffusers' converter trips over "
            f"{type(error).__name__} {one_line(error)}"
        ) from None


def guessed_config(tensors: Tensors, where: str) -> dict[str, Any]:
    """The config of the family whose model, by the default settings of its class, has just these tensors.

    Raises:
        ValueError: there is none.
    """
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    for stock in registry.stock_names():
        # A family of another package may stand in for a class of its own.
        if (built := getattr(diffusers, stock, None)) is None:
            continue
        family = registry.of_stock(stock)
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(built.__init__).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        ours = _of_transformer(empty)
        stocks = any(name.startswith(f"{path}.0.") for name in ours for path in family.block_lists)
        try:
            named = ours if stocks else _converted(ours, family, [_NOWHERE], defaults, where)
            config = {"_class_name": stock, **defaults, **_depths(named, family)}
            under_stock_names(empty, family, config, where)
        except ValueError:
            continue
        return config
    known = ", ".join(registry.stock_names())
    raise ValueError(f"{where} is no {known} by its default settings: --config FOLDER has the settings of such a model")


def _depths(named: Tensors, family: Any) -> dict[str, int]:
    """How many blocks of each list there are."""
    found = {}
    for setting, path in zip(family.depth_settings, family.block_lists, strict=True):
        numbers = {match[1] for name in named if (match := re.match(rf"{re.escape(path)}\.(\d+)\.", name))}
        found[setting] = len(numbers)
    return found
