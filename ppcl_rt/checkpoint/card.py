"""The model card of a checkpoint: what its weights are licensed under and which model they were made from.

A hub reads both from the front matter of ``README.md``; here the catalog holds them, so that they travel where a card
does not, and a card is written beside every checkpoint that has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from ppcl_rt.checkpoint.figures import figures
from ppcl_rt.planning.catalog import LONGEST_LICENSE, LONGEST_MODEL, Catalog

CARD = "README.md"
# What hubs call a licence that is not in their list; its name then stands under ``license_name``.
_OTHER = "other"


class Origin(NamedTuple):
    """Where weights come from.

    Attributes:
        base_model: the model that they were made from, as its hub names it; None: not known.
        license: as hubs write it (``apache-2.0``), ``other/NAME`` for one that they do not list; None: not known.
    """

    base_model: str | None = None
    license: str | None = None


def read_origin(folder: Path) -> Origin:
    """Read the card of a folder, or of the pipeline whose part it is; a card that says nothing is none."""
    # A pipeline's card lies beside model_index.json, above its transformer.
    places = [folder, *([folder.parent] if (folder.parent / "model_index.json").is_file() else [])]
    for path in (place / CARD for place in places):
        if not path.is_file():
            continue
        try:
            content = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
        except Exception:
            # Somebody else's text: whatever the library trips over, it names no origin.
            continue
        license_ = _text(content.get("license"), LONGEST_LICENSE)
        if license_ == _OTHER and (name := _text(content.get("license_name"), LONGEST_LICENSE - len(_OTHER) - 1)):
            license_ = f"{_OTHER}/{name}"
        base = content.get("base_model")
        return Origin(_text(base[0] if isinstance(base, list) and base else base, LONGEST_MODEL), license_)
    return Origin()


def origin_of(metadata: Mapping[str, object]) -> Origin:
    """Read what the header of a file says (`metadata`); what is no name there is none."""
    base, license_ = metadata.get("base_model"), metadata.get("license")
    return Origin(_text(base, LONGEST_MODEL), _text(license_, LONGEST_LICENSE))


def write_card(folder: Path, catalog: Catalog) -> None:
    """Write ``README.md``: the origin in its front matter, as hubs read it, and what a few ratios cost and lose."""
    architecture, tags = catalog.architecture, ("ppcl", catalog.family)
    if catalog.only is not None:
        runs = architecture.params(catalog.largest)
        size = f"{len(catalog.only.blocks)} blocks, {runs / 1e9:.3g} billion parameters"
        use = "One plan: `ppcl_rt.load(folder)`."
        _write(folder, catalog, tags, f"A pruned {catalog.family} transformer", size, use, figures(catalog))
        return
    title = f"A pluggable {catalog.family} transformer"
    size = f"{architecture.depth} blocks, {architecture.dense_params / 1e9:.3g} billion parameters at ratio 1"
    use = "One checkpoint for any ratio: `ppcl_rt.load(folder, ratio=0.5)`. diffusers reads the dense model out of it."
    _write(folder, catalog, tags, title, size, use, figures(catalog))


def write_plain_card(folder: Path, origin: Origin | Catalog, class_name: str, says: str) -> None:
    """The same for a folder without a catalog.

    Args:
        class_name: as ``config.json`` has it.
        says: what the folder is: a phrase without a full stop.
    """
    _write(folder, origin, (), class_name, says)


def _write(
    folder: Path,
    origin: Origin | Catalog,
    tags: tuple[str, ...],
    title: str,
    says: str,
    use: str = "",
    more: Sequence[str] = (),
) -> None:
    license_, name = origin.license, None
    if license_ is not None and license_.startswith(f"{_OTHER}/"):
        license_, name = _OTHER, license_.removeprefix(f"{_OTHER}/")
    data = ModelCardData(
        license=license_,
        license_name=name,
        base_model=origin.base_model,
        library_name="diffusers",
        tags=list(tags) or None,
    )
    made_from = f", made from {origin.base_model}" if origin.base_model else ""
    known = f"{says}{made_from}. Licence: {origin.license or 'not known'}."
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", "", known, *(["", use] if use else [])]
    lines += ["", *more] if more else []
    (folder / CARD).write_text("\n".join(lines) + "\n")


def metadata(origin: Origin | Catalog) -> dict[str, str]:
    """What the header of every safetensors file says."""
    known = {"base_model": origin.base_model, "license": origin.license}
    return {"format": "pt"} | {name: value for name, value in known.items() if value is not None}


def _text(value: object, longest: int) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= longest and value.isprintable() else None
