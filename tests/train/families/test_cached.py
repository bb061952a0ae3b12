"""What the families that read a cache have in common."""

import numpy as np
import pytest
import torch

from ppcl_rt.families import registry
from ppcl_train.families import base, pooled
from ppcl_train.families.cached import CachedFamily


def test_a_family_that_reads_a_cache_says_its_name_and_what_to_do(tmp_path):
    found = [name for name in registry.names() if isinstance(base.of(name), CachedFamily)]
    assert len(found) >= 5 and "scenes" not in found
    for name in found:
        with pytest.raises(ValueError, match=f"^{name} reads embeddings from a cache: make one"):
            base.of(name).embed("a cat")
        with pytest.raises(ValueError, match=f"^{name} reads a cache: .* --set data.cache=FOLDER"):
            base.of(name).make([np.random.default_rng(0)], [False])
        with pytest.raises(ValueError, match=r"cannot be opened as an?( .*)? pipeline: "):
            base.of(name).open(str(tmp_path), device="cpu", dtype=torch.float32, draws=False)


def test_pooled_text_of_another_pipeline_is_refused():
    tokens = torch.randn(5, 20)
    with pytest.raises(ValueError, match=r"has 512 channels, FLUX\.1 has 768"):
        pooled.with_pooled(tokens, torch.randn(512), 768, "FLUX.1")
