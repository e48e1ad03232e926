"""The gradient of hidden states, time step by time step: whether it vanishes or explodes on its way back in time.

torch's RNN, LSTM and GRU compute all time steps in one operator, which does not show the states between them.
During a probe they compute the same step by step. Of other modules, those are recurrent that hold a matrix,
are called several times, and each time depend on their last output, such as cells in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradkernels.gradients import tensor_norms

# Modules with these forwards are computed step by step. A subclass may have a forward of its own.
_FORWARDS = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)
# torch's own recurrent modules are reported, and not the modules that hold them.
_TORCHS = (nn.RNNBase, nn.RNNCellBase)
# A module that is called fewer times is not a recurrence. A head may well be called twice.
_MIN_STEPS = 3


class State(NamedTuple):
    """One tensor of a hidden state, by the node of the graph that made it."""

    node: Node
    output: int


# The tensors of one hidden state: for an LSTM h and c.
Step: TypeAlias = list[State]


@dataclass
class TimeSteps:
    """What one backward pass showed of a recurrent layer.

    Attributes:
        module_name: the module, as in named_modules().
        module: the module.
        suffix: of the names of its weights, such as "_l0" or "_l1_reverse"; "" if the names have none.
        norms: for each time step, in the order in which they ran, the norm of the gradient of the hidden
            state after it; 0 if the loss does not depend on it.
    """

    module_name: str
    module: nn.Module
    suffix: str
    norms: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The module, with the layer and the direction in it if it has several."""
        name = self.module_name or "(model)"
        has_several = isinstance(self.module, nn.RNNBase) and (self.module.num_layers > 1 or self.module.bidirectional)
        return name + self.suffix.replace("_l", " layer ").replace("_", " ") if has_several else name


class TimeStepObserver:
    """Observes the hidden states of recurrent modules in one forward and one backward pass.

    attach() before the forward pass, watch() between the two, and norms() afterwards.
    """

    def __init__(self) -> None:
        # Module -> its name; and suffix -> for each call its time steps.
        self._names: dict[nn.Module, str] = {}
        self._calls: dict[nn.Module, dict[str, list[list[Step]]]] = {}
        self._unrolled: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        # For each of the time steps found, the gradients of its state.
        self._found: list[tuple[TimeSteps, list[list[Tensor]]]] = []

    def attach(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            self._names[module], self._calls[module] = name, {}
            if isinstance(module, nn.RNNBase) and type(module).forward in _FORWARDS and "forward" not in module.__dict__:
                module.__dict__["forward"] = partial(_unrolled, module, module.forward, partial(self._add, module))
                self._unrolled.append(module)
            else:
                self._handles.append(module.register_forward_hook(self._after_forward))

    def detach(self) -> None:
        for module in self._unrolled:
            module.__dict__.pop("forward", None)
        for handle in self._handles:
            handle.remove()

    def _after_forward(self, module: nn.Module, args: object, output: object) -> None:
        self._add(module, "", [_step(tree_leaves(output))])

    def _add(self, module: nn.Module, suffix: str, steps: list[Step]) -> None:
        self._calls[module].setdefault(suffix, []).append(steps)

    def watch(self) -> None:
        """Find the recurrent modules, and watch the gradients of their states from now on."""
        found = {module: sequences for module in self._calls if (sequences := self._recurrences_of(module))}
        inner = {module for module in found if isinstance(module, _TORCHS)}
        for module, sequences in found.items():
            holds_inner = any(other in inner for other in module.modules())
            holders = [other for other in found if other is not module and any(part is module for part in other.modules())]
            if module in inner or (not holds_inner and not holders):
                for suffix, steps in sequences.items():
                    self._watch(TimeSteps(self._names[module], module, suffix), steps)

    def _watch(self, time_steps: TimeSteps, steps: list[Step]) -> None:
        gradients: list[list[Tensor]] = [[] for _ in steps]
        for step, kept in zip(steps, gradients, strict=True):
            for node, output in step:
                self._handles.append(node.register_prehook(partial(_keep, kept, output)))
        self._found.append((time_steps, gradients))

    def _recurrences_of(self, module: nn.Module) -> dict[str, list[Step]]:
        """Suffix -> the states of the longest recurrence of a module; of equal ones the last, which is closest to the loss."""
        # Layers of a deep network may share an activation or a normalisation, which is no hidden state.
        if not any(parameter.dim() > 1 for parameter in module.parameters()):
            return {}
        found = {suffix: max(reversed([*_recurrences(calls)]), key=len) for suffix, calls in self._calls[module].items()}
        return {suffix: steps for suffix, steps in found.items() if len(steps) >= (2 if module in self._unrolled else _MIN_STEPS)}

    def norms(self) -> list[TimeSteps]:
        """The gradient norms of all time steps, in one pass over the gradients."""
        all_gradients = [gradient for _, steps in self._found for step in steps for gradient in step]
        squares = iter(tensor_norms(all_gradients)[0].square().tolist())
        for time_steps, steps in self._found:
            time_steps.norms = [sum(next(squares) for _ in step) ** 0.5 for step in steps]
        return [time_steps for time_steps, _ in self._found if any(time_steps.norms)]


def _keep(kept: list[Tensor], output: int, gradients: Sequence[Tensor | None]) -> None:
    gradient = gradients[output]
    if gradient is not None:
        kept.append(gradient.detach())


def _step(tensors: Iterable[object]) -> Step:
    return [State(tensor.grad_fn, tensor.output_nr) for tensor in tensors if isinstance(tensor, Tensor) and tensor.grad_fn is not None]


def _recurrences(calls: list[list[Step]]) -> Iterator[list[Step]]:
    """The time steps of calls of which each depends on the one before. Of their outputs, those that do."""
    run, used = calls[0], set[int]()
    for earlier, later in zip(calls, [*calls[1:], None], strict=True):
        reached = set() if later is None else _reached(later[0], earlier[-1])
        if later is not None and reached:
            run, used = run + later, used | reached
            continue
        yield [[state for place, state in enumerate(step) if place in used or not used] for step in run]
        run, used = later or [], set()


def _reached(later: Step, earlier: Step) -> set[int]:
    """The places of those states in `earlier` that `later` depends on."""
    places = {state.node: place for place, state in enumerate(earlier)}
    # A node that was made earlier cannot depend on these.
    first = min((node._sequence_nr() for node in places), default=0)
    waiting, seen, reached = [state.node for state in later], set[Node](), set[int]()
    while waiting:
        node = waiting.pop()
        if node in seen or node._sequence_nr() < first:
            continue
        seen.add(node)
        if node in places:
            reached.add(places[node])
        waiting += [following for following, _ in node.next_functions if following is not None]
    return reached


def _unrolled(module: nn.RNNBase, forward: Callable[..., Any], add: Callable[[str, list[Step]], None], input: Any, hx: Any = None) -> Any:
    """What the forward of nn.RNN, nn.LSTM or nn.GRU computes, step by step.

    add(suffix, steps) gets the states of each layer and direction.
    """
    is_packed, is_lstm = isinstance(input, PackedSequence), module.mode == "LSTM"
    if not is_packed and (not isinstance(input, Tensor) or input.dim() not in (2, 3) or not input.numel()):
        # Torch says what is wrong.
        return forward(input, hx)
    is_batched = is_packed or input.dim() == 3
    if is_packed:
        sizes: list[int] = input.batch_sizes.tolist()
        steps = input.data.split(sizes)
    else:
        x = input.transpose(0, 1) if is_batched and module.batch_first else input if is_batched else input.unsqueeze(1)
        sizes, steps = [x.shape[1]] * len(x), x.unbind()
    first = steps[0]
    directions, hidden = 1 + module.bidirectional, module.proj_size or module.hidden_size
    if hx is None:
        shape = (directions * module.num_layers, sizes[0])
        states = [first.new_zeros(*shape, hidden)] + [first.new_zeros(*shape, module.hidden_size)] * is_lstm
    else:
        states = list(hx) if is_lstm else [hx]
        states = states if is_batched else [state.unsqueeze(1) for state in states]
        if is_packed and input.sorted_indices is not None:
            states = [state.index_select(1, input.sorted_indices) for state in states]
    given: Any = tuple(states) if is_lstm else states[0]
    if is_packed:
        module.check_forward_args(input.data, given, input.batch_sizes)
    else:
        module.check_forward_args(input if is_batched else input.unsqueeze(0 if module.batch_first else 1), given, None)
    finals: list[Sequence[Tensor]] = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            output, final, seen = _run(module, module.all_weights[place], steps, [state[place] for state in states], direction == 1)
            add(f"_l{layer}" + "_reverse" * direction, seen)
            outputs.append(output)
            finals.append(final)
        steps = tuple(torch.cat(parts, -1) for parts in zip(*outputs, strict=True))
        if module.dropout and module.training and layer + 1 < module.num_layers:
            steps = F.dropout(torch.cat(steps), module.dropout).split(sizes)
    states = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    y: Any
    if is_packed:
        y = PackedSequence(torch.cat(steps), input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        if input.unsorted_indices is not None:
            states = [state.index_select(1, input.unsorted_indices) for state in states]
    else:
        y = torch.stack(steps, 1 if is_batched and module.batch_first else 0)
    if not is_batched:
        y, states = y.squeeze(1), [state.squeeze(1) for state in states]
    return y, tuple(states) if is_lstm else states[0]


def _run(
    module: nn.RNNBase, weights: Sequence[Tensor], steps: Sequence[Tensor], state: Sequence[Tensor], is_reverse: bool
) -> tuple[list[Tensor], Sequence[Tensor], list[Step]]:
    """One layer in one direction: its outputs, its final state, and its states in the order in which they ran.

    The batch of a time step is the first rows of the state, because packed sequences begin together and end
    one after another.
    """
    outputs, seen = [], []
    for x in reversed(steps) if is_reverse else steps:
        new = _cell(module, weights, x, [tensor[: len(x)] for tensor in state])
        outputs.append(new[0])
        seen.append(_step(new))
        state = [torch.cat([tensor, old[len(x) :]]) if len(old) > len(x) else tensor for tensor, old in zip(new, state, strict=True)]
    return outputs[::-1] if is_reverse else outputs, state, seen


def _cell(module: nn.RNNBase, weights: Sequence[Tensor], x: Tensor, state: Sequence[Tensor]) -> Sequence[Tensor]:
    """One time step, as in the documentation of nn.RNN, nn.LSTM and nn.GRU."""
    if module.mode != "LSTM":
        cell = {"RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell, "GRU": torch.gru_cell}[module.mode]
        return [cell(x, state[0], *weights)]
    # torch.lstm_cell refuses a projection.
    h, c = state
    projection = weights[-1] if module.proj_size else None
    w_ih, w_hh, *biases = weights[:-1] if module.proj_size else weights
    b_ih, b_hh = biases or (None, None)
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return [h if projection is None else F.linear(h, projection), c]
