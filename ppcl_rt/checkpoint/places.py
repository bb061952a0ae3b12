"""Where a checkpoint lies: a folder or file here, or on the hub, from where it is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ppcl_rt.checkpoint.card import CARD
from ppcl_rt.checkpoint.names import CONFIG

# Files that hold a whole transformer, by the ends of their names.
SINGLE_FILES = (".safetensors", ".gguf")
# Of a pipeline: its transformer, and what says that it is one.
TRANSFORMER, _PIPELINE = "transformer", "model_index.json"


def locate(path: str | Path, subfolder: str | None = None, variant: str | None = None, **hub: Any) -> Path:
    """Find a checkpoint folder: a local one, or a hub id whose files are fetched; of a variant, its weights alone.

    Raises:
        ValueError: neither.
    """
    if Path(path).is_dir():
        folder = Path(path)
    elif Path(path).is_file():
        raise ValueError(f"{path} is a file, wanted a folder: `ppcl convert {path} FOLDER` makes one of it")
    else:
        prefix = f"{subfolder}/" if subfolder else ""
        weights = "diffusion_pytorch_model*" if variant is None else f"diffusion_pytorch_model*.{variant}[.-]*"
        fetched = _fetched(str(path), [f"{prefix}{CONFIG}", f"{prefix}{weights}"], hub)
        if fetched is None:
            raise ValueError(f"{path} is neither a checkpoint folder nor a hub id that can be reached")
        folder = fetched
    folder = folder / subfolder if subfolder else folder
    if not (folder / CONFIG).is_file() and (folder / _PIPELINE).is_file():
        raise ValueError(f"{path} is a whole pipeline, wanted its transformer: name its subfolder {TRANSFORMER}")
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {CONFIG}")
    return folder


def locate_transformer(path: str | Path) -> Path:
    """Find the folder of a transformer: the one named, or the transformer of the pipeline that is named.

    Args:
        path: a folder or a hub id.

    Raises:
        ValueError: there is neither.
    """
    try:
        return locate(path, TRANSFORMER)
    except ValueError:
        return locate(path)


def locate_source(path: str | Path) -> Path:
    """Find a transformer in any form: a file, or a folder as for `locate_transformer`.

    Args:
        path: here, or on the hub: ``ORG/NAME``, of a file ``ORG/NAME/FILE``.

    Raises:
        ValueError: there is none.
    """
    is_file = Path(path).is_file() or (Path(path).suffix in SINGLE_FILES and not Path(path).is_dir())
    return locate_file(path) if is_file else locate_transformer(path)


def locate_file(path: str | Path) -> Path:
    """Find a file: here, or of a repository on the hub, whose card is fetched with it.

    Args:
        path: on the hub ``ORG/NAME/FILE``.

    Raises:
        ValueError: there is none.
    """
    if Path(path).is_file():
        return Path(path)
    organisation, _, rest = str(path).partition("/")
    name, _, file = rest.partition("/")
    folder = _fetched(f"{organisation}/{name}", [file], {}) if organisation and name and file else None
    if folder is None or not (folder / file).is_file():
        raise ValueError(f"there is no file {path}, and none on the hub that can be reached (ORG/NAME/FILE)")
    return folder / file


def locate_config(path: str | Path) -> Path:
    """Find the folder of a model or pipeline of which nothing but the settings are needed: here or a hub id.

    Raises:
        ValueError: there is neither.
    """
    if Path(path).exists():
        return Path(path)
    folder = _fetched(str(path), [CONFIG, f"{TRANSFORMER}/{CONFIG}"], {})
    if folder is None:
        raise ValueError(f"{path} is neither a folder with a {CONFIG} nor a hub id that can be reached")
    return folder


def _fetched(repository: str, wanted: Sequence[str], hub: dict[str, Any]) -> Path | None:
    """Fetch files of a repository; None where it cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        # The card, for the licence of a model that has no catalog.
        return Path(snapshot_download(repository, allow_patterns=[*wanted, CARD, _PIPELINE], **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
