"""Settings: what names a family, and a teacher that can be built."""

import pytest

from ppcl_rt.families import registry
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import RunConfig, with_changes


def test_a_task_is_a_family_of_the_registry():
    with pytest.raises(ValueError, match=r"there is no family unheard-of; there are: .*scenes"):
        with_changes(PRESETS["scenes"], {"task": "unheard-of"})
    assert {config.task for config in PRESETS.values()} <= set(registry.names())


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({}, "a teacher has an architecture or is pretrained"),
        ({"foo": 1}, r"teacher\.architecture cannot be built: .*foo"),
        ({**PRESETS["scenes"].teacher.architecture, "num_layers": 1}, "has 1 block: compressing takes 2 or more"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_refused(architecture, message):
    with pytest.raises(ValueError, match=message):
        with_changes(PRESETS["scenes"], {"teacher.architecture": architecture})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_json_both_ways(name):
    config = PRESETS[name]
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
