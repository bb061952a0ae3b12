"""Statistics of outputs without a bias of their own: of a part that several groups share, and of a SwiGLU MLP."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ppcl_rt import BlockSpec, Group, Part, Segment, Streams
from ppcl_train.closed_form.block_statistics import BlockStatistics
from ppcl_train.closed_form.surgery import eliminate
from ppcl_train.data.calibration import Inputs

DIM, UNITS, CHANNELS = 6, 3, 5
OUT = Part(
    path="out",
    name="out",
    rows=DIM,
    columns=2 * UNITS + CHANNELS,
    axis=1,
    segments=(Segment("units", 0, 2), Segment("mlp", 2 * UNITS, 1)),
    stream="joint",
)


class JointBlock(nn.Module):
    """One sequence, text first; one output layer reads two groups side by side."""

    spec = BlockSpec(
        dim=DIM,
        head_dim=2,
        heads=None,
        groups={"units": Group(count=UNITS), "mlp": Group(count=CHANNELS, mappable=True)},
        parts=(OUT,),
    )

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Linear(DIM, 2 * UNITS + CHANNELS), nn.Linear(2 * UNITS + CHANNELS, DIM)

    def forward(self, hidden_states, encoder_hidden_states):
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        x = x + self.out(self.up(x).tanh() + 0.5)
        return x[:, : encoder_hidden_states.shape[1]], x[:, encoder_hidden_states.shape[1] :]


@pytest.fixture(scope="module")
def observed():
    """The block, its statistics, and the rows that count with their weights."""
    torch.manual_seed(0)
    block = JointBlock()
    statistics = BlockStatistics(block)
    rows, weights = [], []
    for _ in range(3):
        state = Streams(image=torch.randn(4, 9, DIM), text=torch.randn(4, 5, DIM))
        mask, t = torch.rand(4, 5) < 0.6, torch.rand(4)
        batch = Inputs(torch.zeros(4, 9, 1), t, {"encoder_hidden_states_mask": mask})
        statistics.add(state, batch, {})
        counts = torch.cat([mask, torch.ones(4, 9, dtype=torch.bool)], 1)
        rows.append(torch.cat([state.text, state.image], 1)[counts])
        weights.append(t.square()[:, None].expand(4, 14)[counts])
    return block, statistics, torch.cat(rows), torch.cat(weights)


def test_each_group_of_a_shared_part_is_compensated_by_itself_without_a_bias(observed):
    block, statistics, x, weight = observed
    with torch.no_grad():
        hidden = (block.up(x).tanh() + 0.5)[:, : 2 * UNITS].double()
        wanted = hidden @ block.out.weight[:, : 2 * UNITS].double().T
    (output,) = block.spec.outputs_of("units")
    assert output.shared and output.name == "out_units"
    order, (found,) = eliminate([(statistics.columns(output), statistics.gram(output))], UNITS, [2], ridge=1e-9)
    fitted, bias = found[2]
    columns = (order[:2, None] * 2 + torch.arange(2)).flatten()
    root = weight.double().sqrt()[:, None]
    best = torch.linalg.lstsq(root * hidden[:, columns], root * wanted).solution.T
    # Gram matrices are in float64 of float32 inputs; the ridge of 1e-9 leaves less.
    assert torch.allclose(fitted, best, atol=1e-5) and not bias.any()


def test_the_map_of_a_shared_part_predicts_what_its_group_adds_without_a_bias(observed):
    block, statistics, x, weight = observed
    with torch.no_grad():
        hidden = block.up(x).tanh() + 0.5
        added = hidden[:, 2 * UNITS :] @ block.out.weight[:, 2 * UNITS :].T
        # What the block returns without the group, the bias of the shared part included.
        without = x + hidden[:, : 2 * UNITS] @ block.out.weight[:, : 2 * UNITS].T + block.out.bias
    (output,) = block.spec.outputs_of("mlp")
    fitted, bias = statistics.linear_map(output, ridge=0.0)
    root = weight.double().sqrt()[:, None]
    best = torch.linalg.lstsq(root * without.double(), root * added.double()).solution.T
    assert torch.allclose(fitted.double(), best, atol=1e-5) and not bias.any()
    assert not block.out._forward_pre_hooks and not block.out._forward_hooks


class GatedBlock(nn.Module):
    """A SwiGLU MLP without biases: one group of channels lies in two input layers and is read by one output layer."""

    spec = BlockSpec(
        dim=DIM,
        head_dim=2,
        heads=None,
        groups={"mlp": Group(count=CHANNELS, mappable=True)},
        parts=(
            *(
                Part(
                    path=path,
                    rows=CHANNELS,
                    columns=DIM,
                    bias=False,
                    axis=0,
                    segments=(Segment("mlp", 0, 1),),
                    stream="joint",
                )
                for path in ("gate", "up")
            ),
            Part(
                path="down",
                name="mlp",
                rows=DIM,
                columns=CHANNELS,
                bias=False,
                axis=1,
                segments=(Segment("mlp", 0, 1),),
                stream="joint",
            ),
        ),
    )

    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(DIM, CHANNELS, bias=False) for _ in range(2))
        self.down = nn.Linear(CHANNELS, DIM, bias=False)

    def hidden(self, x):
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, hidden_states, encoder_hidden_states):
        x = torch.cat([encoder_hidden_states, hidden_states], 1)
        x = x + self.down(self.hidden(x))
        return x[:, : encoder_hidden_states.shape[1]], x[:, encoder_hidden_states.shape[1] :]


@pytest.fixture(scope="module")
def gated():
    """A gated block whose channels have means, its statistics and the rows that it read."""
    torch.manual_seed(0)
    block = GatedBlock()
    statistics, x = BlockStatistics(block), torch.randn(1, 400, DIM) + 1
    batch = Inputs(torch.zeros(1, 400, 1), torch.ones(1), {"encoder_hidden_states": torch.zeros(1, 0, DIM)})
    statistics.add(Streams(image=x, text=torch.zeros(1, 0, DIM)), batch, {})
    return block, statistics, x[0]


def test_channels_of_a_gated_mlp_are_ranked_and_compensated_without_a_bias(gated):
    """Gate and up rows go together: a channel's worth is that of its column in the output layer."""
    block, statistics, x = gated
    (output,) = block.spec.outputs
    assert not output.biased and not output.shared
    with torch.no_grad():
        hidden = block.hidden(x).double()
        wanted = hidden @ block.down.weight.double().T
    order, (found,) = eliminate([(statistics.columns(output), statistics.gram(output))], CHANNELS, [3], ridge=1e-9)
    fitted, bias = found[3]

    def error(kept):
        best = torch.linalg.lstsq(hidden[:, kept], wanted).solution.T
        return best, (hidden[:, kept] @ best.T - wanted).square().sum()

    best, least = error(order[:3])
    assert torch.allclose(fitted, best, atol=1e-5) and not bias.any()
    # No other channel could have gone first at less cost.
    first = [error([n for n in range(CHANNELS) if n != gone])[1] for gone in range(CHANNELS)]
    assert int(torch.stack(first).argmin()) == order[-1]
    assert least < (hidden[:, order[3:]] @ block.down.weight.double()[:, order[3:]].T).square().sum()


def test_the_map_of_a_gated_mlp_has_no_bias(gated):
    block, statistics, x = gated
    fitted, bias = statistics.linear_map(block.spec.outputs[0], ridge=0.0)
    with torch.no_grad():
        added = block.down(block.hidden(x)).double()
    best = torch.linalg.lstsq(x.double(), added).solution.T
    assert torch.allclose(fitted.double(), best, atol=1e-5) and not bias.any()


def test_replacements_without_a_bias_cost_what_the_planner_counts(gated):
    """Parameters of a width are those of the tensors that run."""
    spec = gated[0].spec
    assert spec.params(spec.full.replace(mlp=3)) == 2 * 3 * DIM + DIM * 3
    assert spec.params(spec.full.replace(mlp=0)) == DIM * DIM
