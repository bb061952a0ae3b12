"""Reading of checkpoint folders: ``config.json`` with the catalog in it, and safetensors under diffusers' names.

Reading is by tensor: what a plan does not need is never read, and what is read is first checked against the catalog's
SHA-256. Catalogs of older formats are brought up to date as they are read (`ppcl_rt.checkpoint.migration`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ppcl_rt.checkpoint import migration
from ppcl_rt.checkpoint.headers import json_object, tensor_headers
from ppcl_rt.checkpoint.names import (
    CATALOG_KEY,
    CHECKSUM_KEY,
    CONFIG,
    WEIGHTS,
    config_digest,
    digest,
    needs_catalog,
)
from ppcl_rt.files import one_line, refusing_briefly
from ppcl_rt.planning.catalog import FORMAT, MOST_LISTED, Catalog
from ppcl_rt.planning.frozen import read_json
from ppcl_rt.planning.sketch import TENSORS


def read_catalog(folder: Path) -> tuple[dict[str, Any], int, Catalog | None]:
    """Read ``config.json`` without a look at weights: what diffusers' class takes, and the catalog in it.

    Returns:
        The config without the catalog, the format that the catalog was written in, and the catalog; None where there
        is none.

    Raises:
        ValueError: as `Checkpoint`.
    """
    config = json_object(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    written = config.pop(CATALOG_KEY, None)
    if written is None:
        return config, FORMAT, None
    broken = f"{folder / CONFIG} holds a broken catalog"
    number, content = migration.up_to_date(written, broken)
    # Validation would go through millions of them, and keep an error for each.
    for key, listed in content.items():
        if isinstance(listed, list) and len(listed) > MOST_LISTED:
            raise ValueError(f"{broken}: {key} lists {len(listed)}, at most {MOST_LISTED} are read")
    return config, number, read_json(Catalog, json.dumps(content), broken)


class Checkpoint:
    """A checkpoint folder, opened for reading.

    Args:
        folder: where it lies.
        variant: of the weights, as diffusers' ``variant=``.

    Attributes:
        folder: where it lies.
        config: what diffusers' class takes, catalog left out.
        catalog: None for a stock checkpoint, which has none.

    Raises:
        ValueError: a file is missing, cut short or contradicts another; one line says which and what to do.
    """

    # Path -> the file, while `kept_open`.
    _kept: dict[Path, Any] | None = None

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        with refusing_briefly():
            self._open(folder, variant)

    def _open(self, folder: Path, variant: str | None) -> None:
        self.folder = folder
        # The format that the checkpoint was written in, which decides the names of its tensors in the files.
        self.config, self._format, self.catalog = read_catalog(folder)
        self._files = tensor_headers(folder, WEIGHTS, variant)
        if self.catalog is not None:
            self._compare(self.catalog.checksums)
            self._check_dtypes(self.catalog.checksums_of)
        elif (name := next(filter(needs_catalog, self._files), None)) is not None:
            raise ValueError(f"{folder / CONFIG} has no catalog, but {folder} holds {name}: fetch {CONFIG} again")
        self._stored = {migration.current_name(name, self._format): name for name in self._files}

    def _compare(self, checksums: Mapping[str, str]) -> None:
        if lost := sorted(set(checksums) - set(self._files)):
            raise ValueError(f"the catalog of {self.folder} lists {lost[0]}, which no file holds ({len(lost)} such)")
        if more := sorted(set(self._files) - set(checksums)):
            raise ValueError(f"{self.folder} holds {more[0]}, which its catalog does not list ({len(more)} such)")

    def _check_dtypes(self, checksums_of: str) -> None:
        """Refuse integers for weights and floats for rank orders.

        Where checksums are of bytes alone, nothing else would tell that a header calls a tensor by another dtype: all
        floats are then of one, as every program wrote them.
        """
        floats = dict[str, str]()
        for name, (path, _, dtype) in self._files.items():
            is_order = ".order." in name
            if dtype.startswith(("F", "BF")) == is_order:
                wanted = "integers" if is_order else "floats"
                raise ValueError(f"{path}: {name} is {dtype}, wanted {wanted}: fetch it again")
            if not is_order:
                floats.setdefault(dtype, name)
        if checksums_of == "bytes" and len(floats) > 1:
            (one, name), (other, another) = list(floats.items())[:2]
            raise ValueError(f"{self.folder}: {name} is {one} and {another} {other}, wanted one dtype: fetch it again")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._stored)

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Names of all tensors as they lie in the files: of factors, where `names` has their product."""
        return tuple(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header.

        Raises:
            ValueError: there is no such tensor.
        """
        if name not in self._stored:
            raise ValueError(f"{self.folder} holds no tensor {name}, which its catalog promises")
        return self._files[self._stored[name]].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: that of the first of them."""
        first = next((name for name in self.names if ".order." not in name and name not in TENSORS), None)
        if first is None:
            raise ValueError(f"{self.folder} holds no weights: fetch it again")
        return self.read(first).dtype

    def sketches(self) -> list[np.ndarray]:
        """Read the sketches of what choices change (`ppcl_rt.planning.sketch`), ``[choices, size]`` each.

        Raises:
            ValueError: as `read`.
        """
        return [self.read(name).numpy() for name in TENSORS]

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Open a file once for all that is read inside, not once for each tensor.

        To open a file is to parse its whole header: a millisecond for a thousand tensors. What was read stays mapped
        until the end, so keep files open for a block or so where memory counts.
        """
        if self._kept is not None:
            yield
            return
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _opened(self, path: Path) -> Any:
        # Another thread may end its `kept_open` meanwhile.
        kept = self._kept
        if kept is None:
            return safe_open(path, framework="pt")
        if path not in kept:
            kept[path] = safe_open(path, framework="pt")
        return kept[path]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype that it is stored in; floats of eight bits become bfloat16, which holds them.

        Raises:
            ValueError: missing, or altered since the catalog was made.
        """
        self.shape(name)
        return self.read_stored(self._stored[name])

    def read_stored(self, stored: str) -> torch.Tensor:
        """Read one tensor as it lies in the files, by its name there."""
        path = self._files[stored].path
        try:
            tensor: torch.Tensor = self._opened(path).get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not whole ({one_line(error)}): fetch it again") from None
        if self.catalog is not None and digest(tensor, self.catalog.checksums_of) != self.catalog.checksums[stored]:
            raise ValueError(f"{path}: {stored} was altered since the catalog was made: fetch it again")
        # Nothing computes in them.
        return tensor.bfloat16() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Take the checksum of settings and catalog out of ``config``, and compare it where there is one."""
    if CHECKSUM_KEY not in config:
        return
    written, found = config.pop(CHECKSUM_KEY), config_digest(config)
    if written != found:
        raise ValueError(
            f"{path} was altered: its settings and catalog have the checksum {found[:8]}, not {str(written)[:8]}: "
            f'fetch it again, or drop "{CHECKSUM_KEY}" if you changed them'
        )
