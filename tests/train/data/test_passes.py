"""Passes over portions of a teacher's blocks: where they begin and end, and that it is the teacher's own streams."""

import pytest
import torch

from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import with_changes
from ppcl_train.data import calibration, streams
from ppcl_train.data.passes import Passes
from ppcl_train.stages import teacher

RUN = with_changes(
    PRESETS["scenes"],
    {
        "teacher.architecture": {**PRESETS["scenes"].teacher.architecture, "num_layers": 5, "num_attention_heads": 2},
        "batch": 3,
    },
)
SAMPLES = 7  # Batches of 3, 3 and 1.
PORTIONS = ((range(2), 2), (range(2, 4), 4), (range(4, 5), 0))


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def model():
    built = teacher.initial(RUN).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in built.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


@pytest.fixture(scope="module")
def wanted(model):
    """For each batch, the streams between all blocks."""
    return [streams.trace(model, batch).streams for batch in calibration.batches(RUN, SAMPLES, calibration.WIDTH)]


class Watched:
    """Runs blocks, and remembers the numbers of all runs; what enters and leaves a portion's blocks is compared."""

    def __init__(self, passes, wanted):
        self.passes, self.wanted, self.ran = passes, wanted, []

    def go(self, numbers, following, killed_at=None):
        for batch, (_, walk) in enumerate(self.passes.over(numbers, following)):
            if batch == killed_at:
                raise Killed

            def step(number, state, context, batch=batch):
                before, after = self.wanted[batch][number : number + 2]
                assert torch.equal(state.image, before.image) and torch.equal(state.text, before.text)
                self.ran.append(number)
                state = streams.run_block(self.passes.model.blocks()[number], state, context)
                assert torch.equal(state.image, after.image) and torch.equal(state.text, after.text)
                return state

            walk(step)


def test_each_block_runs_once_where_inputs_are_kept(model, wanted, tmp_path):
    watched = Watched(Passes(RUN, model, SAMPLES, tmp_path / "kept"), wanted)
    for portion in PORTIONS:
        watched.go(*portion)
    assert sorted(watched.ran) == sorted(3 * [*range(5)])
    watched.passes.end()
    assert not (tmp_path / "kept").exists()


def test_without_room_a_pass_begins_at_the_first_block_and_ends_with_its_last(model, wanted, tmp_path):
    # A sample has 16 + 7 tokens of 32 channels in float32, twice: what enters this portion, and the next one.
    least = 2 * SAMPLES * 23 * 32 * 4
    for kept_bytes, runs in ((least, 5), (least - 1, 2 + 4 + 5)):
        folder = tmp_path / str(kept_bytes)
        run = with_changes(RUN, {"width.kept_bytes": kept_bytes})
        watched = Watched(Passes(run, model, SAMPLES, folder), wanted)
        for portion in PORTIONS:
            watched.go(*portion)
        assert len(watched.ran) == 3 * runs and folder.exists() == (runs == 5)


def test_passes_may_overlap(model, wanted, tmp_path):
    """As those of text runs do: the next one begins inside of this one."""
    watched = Watched(Passes(RUN, model, SAMPLES, tmp_path), wanted)
    for numbers, following in ((range(3), 1), (range(1, 4), 2), (range(2, 5), 0)):
        watched.go(numbers, following)
    assert sorted(watched.ran) == sorted(3 * [0, 1, 2, 1, 2, 3, 2, 3, 4])


def test_a_pass_that_was_stopped_begins_where_it_began(model, wanted, tmp_path):
    watched = Watched(Passes(RUN, model, SAMPLES, tmp_path), wanted)
    watched.go(*PORTIONS[0])
    with pytest.raises(Killed):
        watched.go(*PORTIONS[1], killed_at=2)
    again = Watched(Passes(RUN, model, SAMPLES, tmp_path), wanted)
    again.go(*PORTIONS[1])
    assert sorted(again.ran) == sorted(3 * [2, 3])


def test_what_enters_the_first_block_takes_no_block(model, wanted):
    """And what all blocks are called with is that of a whole forward; afterwards the model runs as before."""
    ran = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in model.blocks()]
    batch = next(calibration.batches(RUN, 3, calibration.WIDTH))
    state, context = streams.enter(model, batch)
    assert not ran and torch.equal(state.image, wanted[0][0].image) and torch.equal(state.text, wanted[0][0].text)
    traced = streams.trace(model, batch).context
    assert set(context) == set(traced) and torch.equal(context["temb"], traced["temb"])
    assert len(ran) == 5
    for hook in hooks:
        hook.remove()
