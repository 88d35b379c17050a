"""A trainer's forwards and backwards through packs: :class:`PackedStep`.

TRL makes its loss of log p and entropy (B, T), and calls ``accelerator.backward(loss)`` once for a micro-batch. Memory
is to be one pack's, so a loss gets numbers first, and the graph later, a pack at a time:

    read               every pack without a graph → log p and entropy (B, T), which the loss hangs on as on leaves
    TRL's own loss     as it stands
    backward(loss)     dL/dlog p and dL/dH (B, T), scaled as the trainer has scaled the loss; then each pack once more,
                       with a graph, and the accelerator's own backward of Σ dL/dlog p · log p + Σ dL/dH · H

That is the chain rule, and no approximation: the second forward is the function of the first, its random numbers
included. Where a loss knows each token's weight in its one forward, :meth:`PackedStep.direct` leaves the first out.

Wrappers reduce gradients once: all packs but the last are to DDP, FSDP and DeepSpeed what micro-batches before the last
of an optimizer step are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from egrsd_kernels import Head
from egrsd_kernels.models.places import every_module
from egrsd_kernels.packing import packed
from egrsd_kernels.packing.head import CompileLayers
from egrsd_kernels.packing.proof import drops, fast_road, row_limit
from egrsd_kernels.packing.varlen import WITHOUT_GRAPH

from .divergence import TeacherStates
from .fused_head import score_labels
from .packed_rows import Part, parts_of

FIELDS = ("log_probs", "entropy")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights or gradients may be spread over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


class _Pending(Protocol):
    """What a loss hangs on, whose packs are run when its gradient is known."""

    model: nn.Module
    parts: Sequence[Part]
    leaves: list[Tensor]

    def forward(self, number: int, gradients: Sequence[Tensor | None]) -> Tensor:
        """0-d, with the graph of a pack: its gradient is the pack's part of the loss's."""
        ...

    def done(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """All packs have been run."""
        ...


class PackedStep:
    """The packed reads of one Accelerator, and the backward that runs their packs.

    Args:
        accelerator: whose ``backward`` is this one's until :meth:`remove`.
        max_tokens_per_pack: the most tokens of a forward; a longer row is one alone. WITHOUT_GRAPH times as many where
            no gradient is asked for and attention is by segments.
        compile_layers: as :func:`egrsd_kernels.packing.packed` has it. None: also not where weights are sharded, and
            where a forward is made twice not with dropout, which a compiled graph may draw otherwise.
    """

    def __init__(self, accelerator: Accelerator, max_tokens_per_pack: int, compile_layers: CompileLayers = None):
        self.accelerator = accelerator
        self.max_tokens_per_pack = max_tokens_per_pack
        self.compile_layers = compile_layers
        self._pending: list[_Pending] = []
        self._running = False
        self._own_backward = accelerator.backward
        vars(accelerator)["backward"] = self.backward

    def remove(self) -> None:
        """Give the accelerator its own backward back."""
        if vars(self.accelerator).get("backward") == self.backward:
            del self.accelerator.backward
            if self.accelerator.backward != self._own_backward:  # somebody had put one over the class's
                vars(self.accelerator)["backward"] = self._own_backward

    # ------------------------------------------------------------------------------------------------------- forwards

    def parts(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> list[Part]:
        """As :func:`parts_of` has them, for a model; a ModelError where it cannot be packed."""
        with self.accelerator.autocast():  # proved before a random state is kept
            by_segments = fast_road(model) is not None
        budget = self.max_tokens_per_pack
        if by_segments and not torch.is_grad_enabled():
            budget *= WITHOUT_GRAPH
        parts = parts_of(
            input_ids,
            attention_mask,
            completion_length,
            budget=budget,
            row_limit=row_limit(model),
            as_many_as=self._most,
        )
        if any(len(part.pack) > budget for part in parts if part.counted):
            most = self.max_tokens_per_pack  # said once: the warning's words are always the same
            warnings.warn(f"max_tokens_per_pack={most}: rows that are longer are packs alone", stacklevel=2)
        return parts

    def read(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        *,
        compute_entropy: bool = True,
        entropy_grad: bool = False,
        states: TeacherStates | None = None,
        **scoring: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """log p and entropy of a batch's completions, each row as it is alone.

        Where gradients are on, they are leaves: :meth:`backward` carries their gradients into the model.

        Args:
            input_ids, attention_mask: (B, L).
            completion_length: T, the last columns of L.
            compute_entropy: otherwise it is None.
            entropy_grad: whether a gradient of the entropy may come.
            states: what keeps the hidden states of all completions beside it.
            scoring: how :func:`.fused_head.score_labels` reads the head.

        Returns:
            (log p, entropy): (B, T) float32 (float64 for such a model), nats, 0 where no token is.
        """
        names = FIELDS[: 1 + compute_entropy]
        compile_layers = self._compile(model, twice=torch.is_grad_enabled())
        reading = _Reading(self.accelerator, model, names, scoring, compile_layers)
        reading.parts = self.parts(model, input_ids, attention_mask, completion_length)
        shape = len(input_ids), completion_length
        found: list[Tensor] = []
        grad = torch.is_grad_enabled()
        devices = _devices(model) if grad else set()
        with torch.no_grad():
            for part in reading.parts:
                if grad:
                    reading.random.append(_random_states(devices))
                scored = reading.scored(part, names, False, states)
                found = found or [values.new_zeros(shape, device=input_ids.device) for values in scored]
                for into, values in zip(found, scored, strict=True):
                    part.put(into, values)
        if states is not None:
            states.place(reading.parts, *shape)
        if grad:
            reading.leaves = found[: 1 + entropy_grad]
            self._wait(reading)
        return found[0], found[1] if compute_entropy else None

    def direct(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        function: Callable[[Part, Tensor, Head], Any],
        done: Callable[[], None],
    ) -> Tensor:
        """A loss that is a sum over tokens of known weights, in one forward of each pack.

        Args:
            function: of a part, hidden (M, D) and the head; returns the part's share of the loss, 0-d. It is called
                once for a part, when the gradient of the loss is asked for, or at once where gradients are off.
            done: called after the last of them.

        Returns:
            The loss, 0-d float32. Where gradients are on its value is put in by :meth:`backward`; until then it is NaN,
            and so is the gradient of whatever is not linear in it.
        """
        grad = torch.is_grad_enabled()
        loss = torch.full((), math.nan if grad else 0.0, device=parts[0].rows.device)
        one = _Direct(self.accelerator, model, parts, function, done, self._compile(model, twice=False))
        if grad:
            one.leaves = [loss]
            self._wait(one)
            return loss.view(())  # a node of its own: a leaf's value may not be put in
        for number in range(len(parts)):
            loss += one.forward(number, [loss.new_ones(())]).detach()
        done()
        return loss

    def _compile(self, model: nn.Module, *, twice: bool) -> CompileLayers:
        """compile_layers of a model's forwards; twice: the second has to be the same function as the first."""
        if self.compile_layers is False:
            return False
        redrawn = twice and drops(model)
        if self.compile_layers and redrawn:
            raise ValueError("compile_layers: expected a model without dropout, which it draws anew in each graph")
        safe = not redrawn and not is_sharded(self.accelerator)
        return False if self.compile_layers is None and not safe else self.compile_layers

    def _wait(self, pending: _Pending) -> None:
        for leaf in pending.leaves:
            leaf.requires_grad_()
            leaf.register_hook(self._only_ours)
        self._pending.append(pending)

    def _only_ours(self, gradient: Tensor) -> None:
        if not self._running:
            raise RuntimeError(
                "packing: expected the loss's backward pass by accelerator.backward(loss), which runs the packs, "
                "got another"
            )

    def _most(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        counts = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))
        return int(counts.max())

    # ------------------------------------------------------------------------------------------------------- backward

    def backward(self, loss: Tensor, **options: Any) -> None:
        """The accelerator's, of a loss whose log p are leaves of :meth:`read`; any other loss's is its own.

        Raises:
            ValueError: the loss depends on such leaves and on other tensors that train, whose gradients would be lost.
        """
        pending, self._pending = self._pending, []
        reached = _variables(loss)
        pending = [one for one in pending if any(leaf in reached for leaf in map(id, one.leaves))]
        if not pending:
            return self._own_backward(loss, **options)
        leaves = [leaf for one in pending for leaf in one.leaves]
        if others := reached.keys() - set(map(id, leaves)):
            shapes = ", ".join(str(tuple(reached[other].shape)) for other in others)
            raise ValueError(
                f"loss: expected one of packed log p and entropies alone, got further tensors that train: {shapes}"
            )
        self._running = True
        try:
            gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
            asked = [(one, [next(gradients) for _ in one.leaves]) for one in pending]
            jobs = [(one, number, given) for one, given in asked for number in range(len(one.parts))]
            for one, number, given in jobs[:-1]:
                with self._unsynchronised(one.model):
                    self._own_backward(one.forward(number, given), **options)
            one, number, given = jobs[-1]
            self._own_backward(one.forward(number, given), **options)
        finally:
            self._running = False
        for one, given in asked:
            one.done(loss, given)

    @contextmanager
    def _unsynchronised(self, model: nn.Module) -> Iterator[None]:
        """A forward and backward in here is not the last before gradients are reduced and the optimizer steps."""
        accelerator = self.accelerator
        if not accelerator.sync_gradients:  # nor is the micro-batch's last, and the trainer has seen to it
            yield
            return
        each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        engine = accelerator.distributed_type == DistributedType.DEEPSPEED  # which is told by sync_gradients alone
        accelerator.gradient_state._set_sync_gradients(False)
        try:
            with nullcontext() if each or engine else accelerator.no_sync(model):
                yield
        finally:
            accelerator.gradient_state._set_sync_gradients(True)


class _Reading:
    """Log p and entropies of a batch, which a loss hangs on."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        names: Sequence[str],
        scoring: Mapping[str, Any],
        compile_layers: CompileLayers,
    ):
        self.accelerator, self.model, self.names, self.scoring = accelerator, model, names, scoring
        self.compile_layers = compile_layers
        self.parts: Sequence[Part] = ()
        self.random: list[dict[torch.device, Tensor]] = []  # of each part, before its first forward
        self.leaves: list[Tensor] = []

    def scored(
        self, part: Part, names: Sequence[str], entropy_grad: bool, states: TeacherStates | None = None
    ) -> list[Tensor]:
        """(M,) for each of the names."""

        def score(hidden: Tensor, head: Head) -> list[Tensor]:
            fields = score_labels(
                hidden, head, part.target_ids, outputs=names, entropy_grad=entropy_grad, **self.scoring
            )
            return [fields[name] for name in names]

        read = score if states is None else states.keeping(score)
        with self.accelerator.autocast():
            return packed(self.model, part.pack, read, compile_layers=self.compile_layers)[0]

    def forward(self, number: int, gradients: Sequence[Tensor | None]) -> Tensor:
        part = self.parts[number]
        weighed = dict(zip(self.names, gradients, strict=False))  # an entropy without a gradient is none of the leaves
        names = [name for name in self.names if name == "log_probs" or weighed.get(name) is not None]
        with _replayed(self.random[number]):
            found = self.scored(part, names, "entropy" in names)
        loss = torch.zeros((), device=found[0].device)
        for name, values in zip(names, found, strict=True):
            gradient = weighed[name]
            weight = torch.zeros_like(values) if gradient is None or not part.counted else part.of(gradient)
            loss = loss + (weight.to(values.device) * values).sum()
        return loss

    def done(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        pass


class _Direct:
    """A loss whose parts are sums of their own."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        parts: Sequence[Part],
        function: Callable[[Part, Tensor, Head], Any],
        finished: Callable[[], None],
        compile_layers: CompileLayers,
    ):
        self.accelerator, self.model, self.parts = accelerator, model, parts
        self.function, self.finished, self.compile_layers = function, finished, compile_layers
        self.leaves: list[Tensor] = []
        self.total: Tensor | float = 0.0

    def forward(self, number: int, gradients: Sequence[Tensor | None]) -> Tensor:
        part = self.parts[number]

        def share(hidden: Tensor, head: Head) -> Any:
            return self.function(part, hidden, head)

        with self.accelerator.autocast():
            value, _ = packed(self.model, part.pack, share, compile_layers=self.compile_layers)
        (factor,) = gradients  # what the trainer has divided the loss by
        assert factor is not None
        self.total = self.total + factor * value.detach()
        return factor * value

    def done(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        loss.detach().copy_(torch.as_tensor(self.total))  # which the trainer logs
        self.finished()


# -------------------------------------------------------------------------------------------------------------- graphs


def _variables(loss: Tensor) -> dict[int, Tensor]:
    """By id, the leaves that a tensor's gradient would go to."""
    found: dict[int, Tensor] = {}
    todo, seen = [loss.grad_fn], {loss.grad_fn}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            found[id(variable)] = variable
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        todo += new
    return found


# -------------------------------------------------------------------------------------------------------------- random


def _devices(model: nn.Module) -> set[torch.device]:
    """Where a forward may draw random numbers."""
    weights = (weight for module in every_module(model) for weight in module._parameters.values() if weight is not None)
    return {torch.device("cpu"), *(weight.device for weight in weights if not weight.is_meta)}


def _random_states(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """By device, what random numbers are drawn from there."""
    return {device: _generators(device).get_rng_state(device) for device in devices}


def _generators(device: torch.device) -> Any:
    return _Cpu if device.type == "cpu" else torch.get_device_module(device)


class _Cpu:
    """As the modules of other devices have it."""

    @staticmethod
    def get_rng_state(device: torch.device) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: torch.device) -> None:
        torch.set_rng_state(state)


@contextmanager
def _replayed(states: Mapping[torch.device, Tensor]) -> Iterator[None]:
    """In here random numbers are those that were drawn from ``states``; afterwards they go on from where they were."""
    before = _random_states(states)
    try:
        _put(states)
        yield
    finally:
        _put(before)


def _put(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        _generators(device).set_rng_state(state, device)
