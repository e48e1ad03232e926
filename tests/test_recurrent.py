"""The gradients of hidden states that diagnose shows, against those that torch keeps, and what it says of them.

nn.RNN, nn.LSTM and nn.GRU are computed step by step for this, which must not change their results.
"""

import functools
import itertools
import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gradkernels as gk
from gradkernels.diagnosis.recurrent import TimeStepObserver

INPUTS, UNITS, STEPS, BATCH = 4, 6, 5, 3
KINDS = {
    "RNN": nn.RNN,
    "relu": functools.partial(nn.RNN, nonlinearity="relu"),
    "LSTM": nn.LSTM,
    "projected LSTM": functools.partial(nn.LSTM, proj_size=3),
    "GRU": nn.GRU,
}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def arguments(module, form):
    """A sequence in one of the forms that torch accepts, its initial state, and its number of steps."""
    places = module.num_layers * (1 + module.bidirectional)

    def state(*batch):
        h, c = random(places, *batch, module.proj_size or UNITS), random(places, *batch, UNITS)
        return (h, c) if isinstance(module, nn.LSTM) else h

    if form.startswith("packed"):
        lengths = [1, STEPS, 4, 4] if form == "packed unsorted" else [STEPS, 4, 4, 1]
        packed = pack_sequence([random(length, INPUTS) for length in lengths], enforce_sorted=form == "packed")
        return packed, state(4) if form == "packed unsorted" else None, STEPS
    if form.startswith("unbatched"):
        return random(STEPS, INPUTS), state() if form.endswith("state") else None, STEPS
    shape = (BATCH, STEPS) if module.batch_first else (STEPS, BATCH)
    return random(*shape, INPUTS), state(BATCH) if form.endswith("state") else None, STEPS


def results(module, x, hx):
    """Outputs, final states and gradients; dropout draws the same numbers each time."""
    torch.manual_seed(0)
    y, state = module(x, hx)
    tensors = [y.data if isinstance(y, PackedSequence) else y, *(state if isinstance(state, tuple) else [state])]
    loss = sum((tensor * random(*tensor.shape)).sum() for tensor in tensors)
    return [*tensors, *torch.autograd.grad(loss, [*module.parameters()])]


@pytest.mark.parametrize("form", ["sequence", "with a state", "unbatched", "unbatched with a state", "packed", "packed unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_computing_step_by_step_changes_no_result(kind, form):
    for layers, bidirectional, batch_first, bias in itertools.product((1, 2), *[(False, True)] * 3):
        options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
        module = KINDS[kind](INPUTS, UNITS, dropout=0.3 * (layers > 1), **options).double()
        x, hx, steps = arguments(module, form)
        expected = results(module, x, hx)
        observer = TimeStepObserver()
        observer.attach(module)
        found = results(module, x, hx)
        observer.detach()
        torch.testing.assert_close(found, expected)
        assert all(map(torch.equal, results(module, x, hx), expected))
        (sequences,) = observer._calls.values()
        assert [len(calls[0]) for calls in sequences.values()] == [steps] * layers * (1 + bidirectional)


class Sequence(nn.Module):
    """A recurrent module, and a head that reads the last output."""

    def __init__(self, kind, **keywords):
        super().__init__()
        self.rnn = kind(INPUTS, UNITS, **keywords)
        self.head = nn.Linear(UNITS * (1 + self.rnn.bidirectional), 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


class Loop(nn.Module):
    """A cell in a loop over the sequence."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(UNITS, 2)

    def forward(self, x):
        state = None
        self.states = []
        for part in x:
            state = self.cell(part, state)
            self.states.append(state if isinstance(state, tuple) else (state,))
        return self.head(self.states[-1][0])


def batch(steps=STEPS):
    return torch.randn(steps, BATCH, INPUTS), torch.randint(2, (BATCH,))


@pytest.mark.parametrize(("module", "cell"), [(nn.RNN, nn.RNNCell), (nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell)])
def test_norms_are_those_of_the_hidden_states(module, cell):
    sequence, loop = Sequence(module), Loop(cell(INPUTS, UNITS))
    loop.load_state_dict({key.replace("rnn", "cell").replace("_l0", ""): value for key, value in sequence.state_dict().items()})
    data = batch()
    loss = F.cross_entropy(loop(data[0]), data[1])
    for tensor in (tensor for state in loop.states for tensor in state):
        tensor.retain_grad()
    loss.backward()
    expected = [math.hypot(*(tensor.grad.norm().item() for tensor in state if tensor.grad is not None)) for state in loop.states]
    assert gk.diagnose(sequence, data, F.cross_entropy).time_steps == {"rnn": pytest.approx(expected, rel=1e-5)}
    assert gk.diagnose(loop, data, F.cross_entropy).time_steps == {"cell": pytest.approx(expected, rel=1e-5)}


def linear_in_time(gain):
    """A relu network whose recurrent weight is gain times the identity, and which is never off."""
    model = Sequence(nn.RNN, nonlinearity="relu")
    with torch.no_grad():
        model.rnn.weight_ih_l0.copy_(0.01 * torch.rand(UNITS, INPUTS))
        model.rnn.weight_hh_l0.copy_(gain * torch.eye(UNITS))
        model.rnn.bias_ih_l0.fill_(1.0)
        model.rnn.bias_hh_l0.zero_()
    return model


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [(0.5, "vanishing over time"), (2.0, "exploding over time"), (1.0, "healthy"), (0.95, "healthy"), (1.05, "healthy")],
)
def test_a_gradient_that_is_multiplied_by_the_same_factor_in_each_step(gain, verdict):
    x, target = batch(40)
    diagnosis = gk.diagnose(linear_in_time(gain), (x.abs(), target), F.cross_entropy)
    norms = diagnosis.time_steps["rnn"]
    assert norms == pytest.approx([norms[-1] * gain ** (39 - step) for step in range(40)], rel=1e-4)
    row = next(line for line in str(diagnosis).splitlines() if line.startswith("rnn ") and line.split()[1] == "40")
    assert row.endswith(verdict)
    assert f"{gain**39:.3g}" in row
    names = [cure.name for cure in diagnosis.cures]
    assert ("recurrence" in names) == (gain == 0.5)
    if gain == 2.0:
        assert names.index("clipping policy") == names.index("clipping") + 1
        line = "gradkernels.attach_clipping(optimizer, gradkernels.clipping.ZScore())"
        assert diagnosis.cures[names.index("clipping policy")].line.startswith(line)


class OwnCell(nn.Module):
    """Returns a prediction and its state, of which the state alone is a hidden state."""

    def __init__(self):
        super().__init__()
        self.inward, self.recur, self.out = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, UNITS, bias=False), nn.Linear(UNITS, 2)
        nn.init.orthogonal_(self.recur.weight, 0.5)

    def forward(self, x, h):
        h = self.inward(x) + self.recur(h)
        return self.out(h), h


class OwnLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.shared = OwnCell(), nn.Linear(INPUTS, INPUTS)

    def forward(self, x):
        h = x.new_zeros(BATCH, UNITS)
        for part in x:
            y, h = self.cell(self.shared(part), h)
        return y


def test_a_cell_of_ones_own():
    """Reported is the outermost module that depends on its last call, and not what is called for each step."""
    diagnosis = gk.diagnose(OwnLoop(), batch(), F.cross_entropy)
    norms = diagnosis.time_steps.pop("cell")
    assert not diagnosis.time_steps
    assert norms == pytest.approx([norms[-1] * 0.5 ** (STEPS - 1 - step) for step in range(STEPS)], rel=1e-4)
    diagnosis = gk.diagnose(OwnLoop(), batch(20), F.cross_entropy)
    (cure,) = (cure for cure in diagnosis.cures if cure.name == "recurrence")
    assert cure.line == "nn.LSTMCell(inputs, units)    # or nn.GRUCell, instead of cell"


def test_a_module_that_is_called_step_by_step():
    """As a decoder does; the two sequences of an encoder before it are no recurrence of its calls."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.head = nn.GRU(INPUTS, UNITS), nn.GRU(INPUTS, UNITS), nn.Linear(UNITS, 2)

        def forward(self, x):
            h = self.encoder(x)[1] + self.encoder(x[:3])[1]
            for part in x:
                y, h = self.decoder(part[None], h)
            return self.head(y[0])

    diagnosis = gk.diagnose(Decoder(), batch(), F.cross_entropy)
    assert {name: len(norms) for name, norms in diagnosis.time_steps.items()} == {"encoder": STEPS, "decoder": STEPS}
    assert diagnosis.time_steps["decoder"][0] < diagnosis.time_steps["decoder"][-1]


@pytest.mark.parametrize(
    "shared", [nn.Tanh(), nn.Dropout(0.1), nn.PReLU(init=0.1), nn.LayerNorm(UNITS)], ids=lambda shared: type(shared).__name__
)
def test_what_the_layers_of_a_deep_network_share_is_no_recurrence(shared):
    linears = [nn.Linear(INPUTS if place == 0 else UNITS, UNITS) for place in range(12)]
    model = nn.Sequential(*[layer for linear in linears for layer in (linear, shared)], nn.Linear(UNITS, 2))
    x, target = batch()
    assert gk.diagnose(model, (x[0], target), F.cross_entropy).time_steps == {}


def test_of_equal_parts_of_a_sequence_the_last_counts():
    """The gradient does not reach the part before it, as in truncated backpropagation through time."""

    class Truncated(Loop):
        def forward(self, x):
            h = None
            for step, part in enumerate(x):
                h = self.cell(part, h if h is None or step % 4 else h.detach())
            return self.head(h)

    norms = gk.diagnose(Truncated(nn.GRUCell(INPUTS, UNITS)), batch(12), F.cross_entropy).time_steps["cell"]
    assert len(norms) == 4 and all(norms)


def test_layers_and_directions_have_names():
    """The head reads one step of each direction: of the reversed one the first that ran."""
    diagnosis = gk.diagnose(Sequence(nn.LSTM, num_layers=2, bidirectional=True), batch(), F.cross_entropy)
    names = ["rnn layer 0", "rnn layer 0 reverse", "rnn layer 1", "rnn layer 1 reverse"]
    assert [*diagnosis.time_steps] == names
    assert [norm > 0 for norm in diagnosis.time_steps[names[3]]] == [True] + [False] * (STEPS - 1)
    assert all(norm > 0 for name in names[:3] for norm in diagnosis.time_steps[name])


MODELS = {
    "RNN": lambda: Sequence(nn.RNN, num_layers=1),
    "LSTM": lambda: Sequence(nn.LSTM),
    "GRU": lambda: Sequence(nn.GRU),
    "RNNCell": lambda: Loop(nn.RNNCell(INPUTS, UNITS, nonlinearity="relu")),
    "LSTMCell": lambda: Loop(nn.LSTMCell(INPUTS, UNITS)),
    "GRUCell": lambda: Loop(nn.GRUCell(INPUTS, UNITS)),
}


@pytest.mark.parametrize("make", MODELS)
def test_the_line_of_code_runs_and_cures(make):
    model, data = MODELS[make](), batch(60)
    # The line for a plain network makes an LSTM, whose gates then ask for a line of their own.
    for _ in range(1 + make.startswith("RNN")):
        diagnosis = gk.diagnose(model, data, F.cross_entropy)
        (norms,) = diagnosis.time_steps.values()
        assert norms[0] < 1e-3 * max(norms)
        (line,) = (cure.line for cure in diagnosis.cures if cure.name == "recurrence")
        exec(line, {"model": model, "nn": nn})
    diagnosis = gk.diagnose(model, data, F.cross_entropy)
    assert "recurrence" not in [cure.name for cure in diagnosis.cures]
    (norms,) = diagnosis.time_steps.values()
    assert norms[0] > 0.02 * max(norms)


def test_gates_without_biases_have_no_cure():
    diagnosis = gk.diagnose(Sequence(nn.LSTM, bias=False), batch(60), F.cross_entropy)
    assert "vanishing over time" in str(diagnosis)
    assert diagnosis.cures == []


class WithForward(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(2 * x, hx)


def test_a_subclass_with_a_forward_of_its_own_keeps_it():
    model, data = Sequence(WithForward), batch()
    expected = F.cross_entropy(model(data[0]), data[1]).item()
    diagnosis = gk.diagnose(model, data, F.cross_entropy)
    assert diagnosis.loss == pytest.approx(expected)
    assert diagnosis.time_steps == {}


@pytest.mark.parametrize(
    ("kind", "x"),
    [
        (nn.RNN, torch.randn(STEPS, BATCH, INPUTS + 1)),
        (nn.LSTM, torch.randn(STEPS, BATCH, INPUTS, 1)),
        (nn.GRU, torch.randn(STEPS, BATCH, INPUTS).double()),
    ],
)
def test_errors_are_torchs_and_everything_is_as_it_was(kind, x):
    model = Sequence(kind)
    with pytest.raises(Exception) as expected:
        model(x)
    before = dict(model.rnn.__dict__)
    with pytest.raises(type(expected.value)) as found:
        gk.diagnose(model, (x, batch()[1]), F.cross_entropy)
    if x.dtype == torch.float32:
        assert str(found.value) == str(expected.value)
    assert model.rnn.__dict__ == before
    assert not model.rnn._forward_hooks


def test_what_is_not_finite_has_no_verdict_over_time():
    model = linear_in_time(1.0)
    model.rnn.weight_hh_l0.data[0, 0] = math.nan
    diagnosis = gk.diagnose(model, batch(), F.cross_entropy)
    row = next(line for line in str(diagnosis).splitlines() if line.startswith("rnn ") and line.split()[1] == str(STEPS))
    assert row.endswith("non-finite")
    assert "recurrence" not in [cure.name for cure in diagnosis.cures]


def test_picture_and_dict(tmp_path):
    heights = []
    for gain in (0.5, 2.0):
        diagnosis = gk.diagnose(linear_in_time(gain), batch(40), F.cross_entropy)
        assert json.loads(json.dumps(diagnosis.to_dict()))["time_steps"] == diagnosis.time_steps
        diagnosis.plot(tmp_path / "time.png")
        image = imread(tmp_path / "time.png")[..., :3]
        heights.append(image.shape[0])
        # The line is blue or red, in the lower picture.
        lower = image[-300:]
        blue, red = ((lower[..., channel] - lower[..., 2 - channel] > 0.3).mean() for channel in (2, 0))
        assert (blue > 0.001) == (gain == 0.5)
        assert (red > 0.001) == (gain == 2.0)
    assert min(heights) > 700
