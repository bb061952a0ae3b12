"""The one list of model families, for the runtime and for training.

A family is named by strings, so that nothing here imports one: a module is imported when its family is first asked for,
and the runtime never imports training.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from ppcl_rt.messages import brief


class Registered(NamedTuple):
    """A family.

    Attributes:
        model: ``module:class`` of the pluggable transformer.
        training: ``module:attribute`` of what training has to know of it (`ppcl_train.families.base.Family`); empty for
            a family that can be run but not trained.
        stock: name of the diffusers class, as ``config.json`` has it; empty for a task that trains the model of another
            family, which alone is found by that name.
        reference: (image, text) tokens of the sample at which a ratio counts FLOPs; None for the model's own.
        authors: module that knows the layout in which the authors of the method publish models of this family; empty
            where there is none.
    """

    model: str
    training: str = ""
    stock: str = ""
    reference: tuple[int, int] | None = None
    authors: str = ""


_FAMILIES: dict[str, Registered] = {
    "qwen-image": Registered(
        model="ppcl_rt.families.qwen_image:PPCLQwenImageTransformer2DModel",
        training="ppcl_train.families.qwen_image:QwenImage",
        stock="QwenImageTransformer2DModel",
        authors="ppcl_rt.families.qwen_image_authors",
    ),
    "flux": Registered(
        model="ppcl_rt.families.flux:PPCLFluxTransformer2DModel",
        training="ppcl_train.families.flux:Flux",
        stock="FluxTransformer2DModel",
    ),
    # The same class; training calls it without a guidance.
    "flux-schnell": Registered(
        model="ppcl_rt.families.flux:PPCLFluxTransformer2DModel", training="ppcl_train.families.flux:FluxSchnell"
    ),
    "sd3": Registered(
        model="ppcl_rt.families.sd3:PPCLSD3Transformer2DModel",
        training="ppcl_train.families.sd3:SD3",
        stock="SD3Transformer2DModel",
    ),
    "z-image": Registered(
        model="ppcl_rt.families.z_image:PPCLZImageTransformer2DModel",
        training="ppcl_train.families.z_image:ZImage",
        stock="ZImageTransformer2DModel",
    ),
    # A task of our own: a small transformer of the family qwen-image, with its own captions and pictures.
    "scenes": Registered(
        model="ppcl_rt.families.qwen_image:PPCLQwenImageTransformer2DModel",
        training="ppcl_train.families.scenes:Scenes",
        reference=(16, 7),
    ),
    # Another: names of emoji and their pictures, through an autoencoder.
    "emoji": Registered(
        model="ppcl_rt.families.qwen_image:PPCLQwenImageTransformer2DModel",
        training="ppcl_train.families.emoji:Emoji",
        reference=(16, 8),
    ),
}


def register(
    name: str,
    model: str,
    training: str = "",
    stock: str = "",
    reference: tuple[int, int] | None = None,
    authors: str = "",
) -> None:
    """Add a family, or replace one; see `Registered`."""
    _FAMILIES[name] = Registered(model, training, stock, reference, authors)


def names() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(_FAMILIES)


def model_class(name: str) -> Any:
    """The pluggable transformer of a family.

    Raises:
        ValueError: there is no such family.
    """
    return _load(_find(name).model)


def training(name: str) -> Any:
    """What training has to know of a family: an instance of the registered class, or the registered object.

    Raises:
        ValueError: there is no such family, or it cannot be trained.
    """
    path = _find(name).training
    if not path:
        raise ValueError(f"the family {name} can be run, but nothing says how to train it")
    found = _load(path)
    return found() if isinstance(found, type) else found


def reference(name: str) -> tuple[int, int]:
    """(image, text) tokens of the sample at which a family's ratios count FLOPs.

    Raises:
        ValueError: there is no such family.
    """
    found = _find(name)
    return found.reference or tuple(_load(found.model).reference[:2])


def of_stock(class_name: object) -> Any:
    """The pluggable transformer that stands in for a diffusers class, None where no family does."""
    for family in _FAMILIES.values():
        if family.stock and family.stock == class_name:
            return _load(family.model)
    return None


def authors(model: type) -> Any:
    """The module that knows the authors' layout of the family of a pluggable class.

    Raises:
        ValueError: there is no such layout.
    """
    for family in _FAMILIES.values():
        if family.authors and family.model.rpartition(":")[2] == model.__name__:
            return importlib.import_module(family.authors)
    known = ", ".join(family.stock for family in _FAMILIES.values() if family.authors)
    raise ValueError(f"no layout of the authors' is known for {model.__name__}, but for: {known}")


def class_names() -> tuple[str, ...]:
    """Names of the pluggable classes."""
    return tuple(dict.fromkeys(family.model.rpartition(":")[2] for family in _FAMILIES.values()))


def by_class_name(name: str) -> Any:
    """The pluggable class of this name, None where no family has one."""
    for family in _FAMILIES.values():
        if family.model.rpartition(":")[2] == name:
            return _load(family.model)
    return None


def of_class(class_name: object, where: object, *, stock_alone: bool = False) -> Any:
    """The pluggable transformer for the class that a ``config.json`` names: diffusers', or ours for one plan.

    Args:
        class_name: as the config has it.
        where: what is being read, for the message.
        stock_alone: take diffusers' class alone.

    Raises:
        ValueError: no family has this class.
    """
    found = of_stock(class_name) or (None if stock_alone else by_class_name(str(class_name)))
    if found is None:
        raise ValueError(brief(f"{where} is a {class_name}; the families here are: {', '.join(stock_names())}"))
    return found


def stock_names() -> tuple[str, ...]:
    """Names of the diffusers classes that some family stands in for."""
    return tuple(family.stock for family in _FAMILIES.values() if family.stock)


def _find(name: str) -> Registered:
    if name not in _FAMILIES:
        raise ValueError(f"there is no family {name}; there are: {', '.join(_FAMILIES)}")
    return _FAMILIES[name]


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
