"""One update of a Qwen3 model with LoRA, from token ids to gradients, by every way there is to do it.

An update of EGRSD is the teacher's forward pass (the same weights, adapters off, prompt and solution), the student's
forward and backward pass, and the CL-EGRSD loss; of GRPO it is the latter two with advantages of sequences. bfloat16
under autocast, adapters in float32, SDPA where nothing else is said. What each way does:

- ``trl``: GRPOTrainer's own code, padded as its batches are: ``_get_per_token_logps_and_entropies`` for the teacher,
  ``compute_loss`` and ``accelerator.backward`` for the student, its metrics included. EGRSD is the subclass that a user
  would write, which makes the token advantages once the student's log p is known. ``trl-compiled``: with
  ``torch_compile=True`` and Accelerate's regional compilation, one layer after another; ``trl-liger``: with
  ``use_liger_kernel=True``.
- ``trl-trie``: the prefix trie of TRL's AsyncGRPOTrainer: its rows, its attention, its head. The FlashAttention 3 of
  the Hub that it asks for is PyTorch's own FlashAttention here.
- ``unsloth``: :mod:`benchmarks.unsloth_update`.
- ``padded``, ``padded-compiled``: the same padded rows through ``with_head`` and ``fused_egrsd_loss``.
- ``packed``, ``packed-compiled``: rows without padding, one after another, each with its whole prompt. The second is
  verl's way, but for the head, which is ours.
- ``prefix``, ``prefix-compiled``: every shared prefix once. ``prefix-fused``: compiled, with ``fuse_adapters``.
  ``prefix-graphs``, ``prefix-fused-graphs``: the two launched as CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.rollouts import SHAPES, Rollouts, build
from egrsd_kernels import Head, credit, fused_egrsd_loss, token_statistics, with_head
from egrsd_kernels.adapters import fuse_adapters
from egrsd_kernels.models.adapters import adapters_off
from egrsd_kernels.packing import Pack, pack_rows, packed
from egrsd_kernels.packing.head import CompileLayers
from egrsd_kernels.packing.layers import CUDA_GRAPHS
from egrsd_kernels.packing.varlen import WITHOUT_GRAPH

GAMMA, LOOKAHEAD, GATE_FLOOR, CLIP_EPS = 0.3, 3, 0.1, 0.2
Function = Callable[[Tensor, Head], Any]


class Plan(NamedTuple):
    """How an update is cut up.

    kept: activations are kept; else each layer is computed again in the backward pass. size: rollouts in a forward
    pass, or tokens in a pack of the student's; WITHOUT_GRAPH times as many in the teacher's, as trainers have them.
    """

    kept: bool
    size: int


class Seen(NamedTuple):
    """What an update makes: its loss, and of every response token (N,) what it is worked out from, nats."""

    loss: Tensor
    student_logp: Tensor
    teacher_logp: Tensor
    teacher_entropy: Tensor


@dataclass(frozen=True)
class Task:
    """What is to be done, whichever the way. objective: ``"egrsd"`` or ``"grpo"``."""

    shape: str
    objective: str
    rollouts: Rollouts
    device: torch.device
    layers: int | None = None

    @property
    def has_teacher(self) -> bool:
        return self.objective == "egrsd"

    @cached_property
    def targets(self) -> Tensor:
        """(N,) response tokens."""
        return torch.cat(self.rollouts.responses).to(self.device)

    def model(self, plan: Plan, attention: str = "sdpa") -> nn.Module:
        model = build(self.shape, self.device, attention, self.layers)
        if not plan.kept:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model

    def nothing_seen(self) -> Seen:
        return Seen(torch.zeros((), device=self.device), *torch.zeros(3, len(self.targets), device=self.device))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)


Update = Callable[[], Seen]


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.get_base_model().model.layers


def token_advantages(task: Task, seen: Seen, tokens: Tensor, rollouts: Tensor, logp: Tensor) -> Tensor:
    """Â (M,) of the tokens of these rollouts, whose log p for the student is ``logp``."""
    lengths = task.rollouts.lengths[rollouts].to(task.device)
    advantages = task.rollouts.advantages[rollouts].to(task.device).repeat_interleave(lengths)
    ends = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    ahead = credit.lookahead_entropy(seen.teacher_entropy[tokens], valid, ends, credit.Lookahead(LOOKAHEAD))
    gate = credit.gate(ahead, entropy_scale(seen), GAMMA, gate_floor=GATE_FLOOR)
    magnitude = credit.magnitude(advantages, seen.teacher_logp[tokens] - logp, clip_eps=CLIP_EPS)
    return credit.token_advantage(advantages, magnitude, gate)


def entropy_scale(seen: Seen) -> Tensor:
    return credit.batch_max(seen.teacher_entropy).clamp(min=1.0)


# ----------------------------------------------------------------------------------------- ours: padded, packed, prefix


@dataclass(frozen=True)
class Pass:
    """A forward pass that predicts the response tokens of these numbers (M,), rollout by rollout.

    run: of a function of hidden (M, D) and the head; its result. cu_seqlens: (S + 1,), where rollouts begin among M.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    rollouts: Tensor
    run: Callable[[nn.Module, Function], Any]

    @classmethod
    def of(cls, task: Task, which: Tensor, run: Callable[[nn.Module, Function], Any]) -> Pass:
        cu_seqlens = nn.functional.pad(task.rollouts.lengths[which].cumsum(0), (1, 0))
        tokens = task.rollouts.tokens(which)
        return cls(tokens.to(task.device), cu_seqlens.to(task.device), which.to(task.device), run)


def padded_passes(task: Task, teacher: bool, size: int) -> list[Pass]:
    """``size`` rollouts a pass, all padded to the longest of the update."""
    rows = task.rollouts.rows(teacher)
    ids = pad_sequence(rows, batch_first=True)
    width = ids.shape[1]
    mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long()
    starts = torch.tensor([len(context) - 1 for context in task.rollouts.contexts(teacher)])
    found = []
    for which in torch.arange(len(rows)).split(size):
        places = [
            number * width + starts[row] + torch.arange(task.rollouts.lengths[row])
            for number, row in enumerate(which.tolist())
        ]
        given = (one.to(task.device) for one in (ids[which], mask[which], torch.cat(places)))
        found.append(Pass.of(task, which, partial(_padded, *given)))
    return found


def _padded(ids: Tensor, mask: Tensor, places: Tensor, model: nn.Module, function: Function) -> Any:
    def at_responses(hidden: Tensor, head: Head) -> Any:
        return function(hidden.flatten(0, 1).index_select(0, places), head)

    return with_head(model, at_responses, input_ids=ids, attention_mask=mask)[0]


def packed_passes(task: Task, teacher: bool, size: int, compiled: CompileLayers, shared: bool) -> list[Pass]:
    """Packs of up to ``size`` tokens."""
    rows, contexts = task.rollouts.rows(teacher), task.rollouts.contexts(teacher)
    asked = [torch.arange(len(row)) >= len(context) for row, context in zip(rows, contexts, strict=True)]
    packs = pack_rows(rows, budget=size, targets=asked) if shared else apart(rows, size, asked)
    return [Pass.of(task, torch.tensor(pack.rows), partial(_packed, pack.to(task.device), compiled)) for pack in packs]


def _packed(pack: Pack, compiled: CompileLayers, model: nn.Module, function: Function) -> Any:
    return packed(model, pack, function, compile_layers=compiled)[0]


def apart(rows: list[Tensor], budget: int, targets: list[Tensor]) -> list[Pack]:
    """Packs in which nothing is shared: a first token that no other row has keeps rows apart, and is put back."""
    marked = [torch.cat([torch.tensor([number]), row[1:]]) for number, row in enumerate(rows)]
    packs = pack_rows(marked, budget=budget, targets=targets)
    for pack in packs:
        for row, places in zip(pack.rows, pack.places, strict=True):
            pack.input_ids[places[0]] = rows[row][0]
    return packs


def by_fused_loss(task: Task, model: nn.Module, teacher: list[Pass], student: list[Pass]) -> Seen:
    """An update with our head."""
    model.zero_grad()
    seen = task.nothing_seen()
    gamma, clip_eps = (GAMMA, CLIP_EPS) if task.has_teacher else (0.0, 0.0)
    with task.autocast():
        with torch.no_grad(), adapters_off(model):
            for step in teacher:
                statistics = step.run(
                    model, lambda h, head, at=step.tokens: token_statistics(h, head, task.targets[at])
                )
                seen.teacher_logp[step.tokens], seen.teacher_entropy[step.tokens] = statistics[:2]
        scale = entropy_scale(seen)
        for step in student:
            at = step.tokens

            def loss_of(hidden: Tensor, head: Head, step: Pass = step, at: Tensor = at) -> Any:
                return fused_egrsd_loss(
                    hidden, head, None, task.targets[at], task.rollouts.advantages.to(task.device)[step.rollouts],
                    cu_seqlens=step.cu_seqlens, teacher_logp=seen.teacher_logp[at],
                    teacher_entropy=seen.teacher_entropy[at], gamma=gamma, lookahead=LOOKAHEAD, clip_eps=clip_eps,
                    entropy_scale=scale, normalizer=float(len(task.targets)), return_stats=True,
                )  # fmt: skip

            loss, stats = step.run(model, loss_of)
            loss.backward()
            seen.student_logp[at] = stats.student_logp
            seen.loss.add_(loss.detach())
    return seen


def ours_padded(task: Task, plan: Plan, compiled: bool = False) -> Update:
    model = task.model(plan)
    if compiled:
        for layer in layers_of(model):
            layer.compile(dynamic=False)
    teacher = padded_passes(task, True, plan.size) if task.has_teacher else []
    return partial(by_fused_loss, task, model, teacher, padded_passes(task, False, plan.size))


def ours_packed(
    task: Task, plan: Plan, compiled: CompileLayers = False, shared: bool = True, fused_adapters: bool = False
) -> Update:
    teacher = packed_passes(task, True, WITHOUT_GRAPH * plan.size, compiled, shared) if task.has_teacher else []
    student = packed_passes(task, False, plan.size, compiled, shared)
    model = task.model(plan)
    if fused_adapters:
        with task.autocast():
            fuse_adapters(model)
    return partial(by_fused_loss, task, model, teacher, student)


# ----------------------------------------------------------------------------------------------------------------- TRL


class Padded(NamedTuple):
    """TRL's batch: prompts padded on the left, completions on the right. (B, P) and (B, T)."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor

    @classmethod
    def of(cls, task: Task, teacher: bool) -> Padded:
        contexts, responses = task.rollouts.contexts(teacher), task.rollouts.responses
        sides = []
        for rows, side in ((contexts, "left"), (responses, "right")):
            masks = [torch.ones_like(row) for row in rows]
            sides += [pad_sequence(one, batch_first=True, padding_side=side).to(task.device) for one in (rows, masks)]
        return cls(*sides)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        ids = torch.cat([self.prompt_ids, self.completion_ids], 1)
        return ids, torch.cat([self.prompt_mask, self.completion_mask], 1)


def trl_tokenizer() -> Any:
    """As much of one as a trainer asks for: a token for padding, one for the end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left")


def by_trl(task: Task, plan: Plan, compiled: bool = False, liger: bool = False) -> Update:
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = str(compiled)
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.models.utils import disable_gradient_checkpointing

    class Trainer(GRPOTrainer):
        """EGRSD by the narrowest door: token advantages, between the student's log p and the loss that reads both."""

        weigh: Callable[[Tensor], Tensor] | None = None
        student_logp: Tensor

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if self.weigh is not None:
                self.student_logp = found[0].detach()
                self.inputs["advantages"] = self.weigh(self.student_logp)
            return found

    count = len(task.rollouts.responses)
    model = task.model(plan)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, lambda completions, **_: [0.0] * len(completions),
            GRPOConfig(
                folder, per_device_train_batch_size=plan.size, gradient_accumulation_steps=count // plan.size,
                num_generations=count, max_completion_length=int(task.rollouts.lengths.max()), bf16=True,
                gradient_checkpointing=not plan.kept, torch_compile=compiled, use_liger_kernel=liger, report_to="none",
                use_cpu=task.device.type == "cpu",
            ),
            train_dataset=Dataset.from_list([{"prompt": "-"}]), processing_class=trl_tokenizer(),
        )  # fmt: skip
    if liger:  # as Trainer.train does
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
    wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = count // plan.size
    student, teacher = Padded.of(task, False), Padded.of(task, True)
    responses = student.completion_mask.bool()
    items = responses.sum()

    def update() -> Seen:
        trainer.model.zero_grad()
        seen = task.nothing_seen()
        if task.has_teacher:
            no_recomputation = disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), no_recomputation, trainer.model.disable_adapter():
                found = trainer._get_per_token_logps_and_entropies(
                    wrapped, *teacher.rows, responses.shape[1], batch_size=plan.size, compute_entropy=True
                )
            for into, values in zip(seen[2:], found, strict=False):
                into.copy_(values[responses])
        for which in torch.arange(count).split(plan.size):
            here = slice(int(which[0]), int(which[-1]) + 1)
            mask, tokens = responses[here], task.rollouts.tokens(which).to(task.device)
            trainer.inputs = {name: value[here] for name, value in student._asdict().items()}
            trainer.inputs |= {"advantages": task.rollouts.advantages[which].to(task.device),
                               "num_items_in_batch": items}  # fmt: skip

            def weigh(logp: Tensor, mask: Tensor = mask, tokens: Tensor = tokens, which: Tensor = which) -> Tensor:
                if not task.has_teacher:
                    return trainer.inputs["advantages"]
                own = token_advantages(task, seen, tokens, which, logp[mask])
                return torch.zeros_like(logp).masked_scatter(mask, own)

            trainer.weigh = weigh
            loss = trainer.compute_loss(wrapped, trainer.inputs)
            trainer.weigh = None
            trainer.accelerator.backward(loss)
            seen.student_logp[tokens] = trainer.student_logp[mask]
            seen.loss.add_(loss.detach())
        return seen

    return update


def by_trie(task: Task, plan: Plan) -> Update:
    from trl.experimental.async_grpo import packing
    from trl.trainer.utils import add_fused_lm_head

    packing.register_tree_attention()
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=flash_attention)
    model = task.model(plan, packing.TREE_ATTENTION)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    teacher = trie_rows(packing.TreeRow, task, True, plan.size) if task.has_teacher else []
    student = trie_rows(packing.TreeRow, task, False, plan.size)

    def read(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = model(**row["inputs"], fused_lm_head=True)
        return out.log_probs.flatten()[row["index"]], out.entropy.flatten()[row["index"]]

    def update() -> Seen:
        model.zero_grad()
        seen = task.nothing_seen()
        with task.autocast():
            with torch.no_grad(), adapters_off(model):
                for row in teacher:
                    seen.teacher_logp[row["tokens"]], seen.teacher_entropy[row["tokens"]] = read(row)
            for row in student:
                logp, _ = read(row)
                at, which = row["tokens"], row["rollouts"]
                if task.has_teacher:
                    weights = token_advantages(task, seen, at, which, logp.detach())
                else:
                    lengths = task.rollouts.lengths[which]
                    weights = task.rollouts.advantages[which].repeat_interleave(lengths).to(task.device)
                loss = -(weights * logp).sum() / len(task.targets)
                loss.backward()
                seen.student_logp[at] = logp.detach()
                seen.loss.add_(loss.detach())
        return seen

    return update


def trie_rows(tree_row: type, task: Task, teacher: bool, size: int) -> list[dict[str, Any]]:
    """TRL's rows of up to ``size`` tokens, as its collator hands them to the model."""
    rows, contexts = task.rollouts.rows(teacher), task.rollouts.contexts(teacher)
    made: list[tuple[Any, list[int]]] = []
    for number, (row, context) in enumerate(zip(rows, contexts, strict=True)):
        sample = {
            "input_ids": row, "completion_mask": torch.arange(len(row)) >= len(context), "advantage": 0.0,
            "old_log_probs": torch.zeros(len(row)), "group_id": id(context),
        }  # fmt: skip
        if not made or not made[-1][0].fits(sample, size):
            made.append((tree_row(), []))
        made[-1][0].add(sample)
        made[-1][1].append(number)
    found = []
    for one, numbers in made:
        row = {name: value.to(task.device) for name, value in one.pack().items()}
        longest = dict(zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), row["tree_max_seqlens"].tolist(), strict=True))
        names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
        inputs = {name: row[name][None] for name in ("input_ids", "position_ids", "shift_labels")}
        which = torch.tensor(numbers)
        found.append({
            "inputs": {**inputs, **{name: row[name] for name in names}, **longest, "use_cache": False},
            "index": row["token_index"], "rollouts": which, "tokens": task.rollouts.tokens(which).to(task.device),
        })  # fmt: skip
    return found


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, longest_query: int,
    longest_key: int, softmax_scale: float, causal: bool, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func by PyTorch's own FlashAttention, masks aligned at the last key; without windows."""
    assert causal and window_size == (-1, -1)
    return torch.ops.aten._flash_attention_forward(
        query, key, value, cu_queries, cu_keys, longest_query, longest_key, 0.0, True, False, scale=softmax_scale
    )[0]


def by_unsloth(task: Task, plan: Plan) -> Update:
    from benchmarks.unsloth_update import update_of

    return update_of(task, plan)


# ------------------------------------------------------------------------------------------------------------ the ways


@dataclass(frozen=True)
class Way:
    """title: for people. packs: whether a plan's size is tokens. graphs: whether layers are launched as CUDA graphs.
    rounded: whether its head rounds logits to 16 bits."""

    title: str
    make: Callable[[Task, Plan], Update]
    packs: bool = False
    compiled: bool = False
    graphs: bool = False
    rounded: bool = False


def _packs(title: str, compiled: CompileLayers = False, **how: bool) -> Way:
    """The way of :func:`ours_packed`."""
    make = partial(ours_packed, compiled=compiled, **how)
    return Way(title, make, packs=True, compiled=bool(compiled), graphs=compiled == CUDA_GRAPHS)


WAYS = {
    "trl": Way("TRL", by_trl, rounded=True),
    "trl-compiled": Way("TRL, torch_compile", partial(by_trl, compiled=True), compiled=True, rounded=True),
    "trl-liger": Way("TRL, Liger's kernels", partial(by_trl, liger=True), rounded=True),
    "trl-trie": Way("TRL's prefix trie", by_trie, packs=True, rounded=True),
    "unsloth": Way("Unsloth", by_unsloth, rounded=True),
    "padded": Way("ours, padded", ours_padded),
    "padded-compiled": Way("ours, padded, compiled", partial(ours_padded, compiled=True), compiled=True),
    "packed": _packs("ours, packed", shared=False),
    "packed-compiled": _packs("packed, compiled (verl's way)", shared=False, compiled=True),
    "prefix": _packs("ours, one prefix"),
    "prefix-compiled": _packs("ours, one prefix, compiled", compiled=True),
    "prefix-fused": _packs("ours, one prefix, compiled, adapters fused", compiled=True, fused_adapters=True),
    "prefix-graphs": _packs("ours, one prefix, CUDA graphs", compiled=CUDA_GRAPHS),
    "prefix-fused-graphs": _packs(
        "ours, one prefix, CUDA graphs, adapters fused", compiled=CUDA_GRAPHS, fused_adapters=True
    ),
}
OURS = tuple(way for way in WAYS if way.startswith("prefix"))
LEADS = ("trl", "prefix-fused")  # whose layers are timed kept and computed again


def fastest_again(row: dict[str, Any]) -> dict[str, Any] | None:
    """Of a cell's plans, the fastest whose layers are computed again."""
    timed = [one for one in row.get("tried", ()) if "ms" in one and not one["kept"]]
    return min(timed, key=lambda one: one["ms"], default=None)


# ------------------------------------------------------------------------------------------- what all are held against

CHECKED = 2  # rollouts


def exact_logp(task: Task) -> tuple[list[Tensor], list[float]]:
    """For student and teacher: log p of the first rollouts in float32, and how far padded rows in bfloat16 are off."""
    few = Task(task.shape, task.objective, task.rollouts.part(0, CHECKED), task.device, task.layers)
    model = few.model(Plan(True, CHECKED))
    rounded = _logp_alone(few, model)
    exact = _logp_alone(few, copy.deepcopy(model).float(), enabled=False)
    return exact, [rms(*pair) for pair in zip(rounded, exact, strict=True)]


def _logp_alone(task: Task, model: nn.Module, enabled: bool = True) -> list[Tensor]:
    found = []
    with torch.no_grad(), torch.autocast(task.device.type, torch.bfloat16, enabled=enabled):
        for teacher in (False, True):
            with adapters_off(model) if teacher else contextlib.nullcontext():
                (step,) = padded_passes(task, teacher, CHECKED)
                found.append(step.run(model, lambda h, head: token_statistics(h, head, task.targets)[0]))
    return found


def rms(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


def bare_products(task: Task) -> tuple[int, Callable[[], None]]:
    """(layers, the products of one's frozen weights, none twice and no token twice, for teacher and student)."""
    (layer,) = layers_of(build(task.shape, task.device, layers=1))
    weights = [part.base_layer.weight for part in layer.modules() if hasattr(part, "base_layer")]
    counts = {False: 2} | ({True: 1} if task.has_teacher else {})  # student: forward and hidden gradient
    given = []
    for teacher, times in counts.items():
        tokens = sum(len(pack) for pack in pack_rows(task.rollouts.rows(teacher), budget=1 << 30))
        given += times * [[(weight.new_empty(tokens, weight.shape[1]).normal_(), weight) for weight in weights]]
    gc.collect()

    def run() -> None:
        for pairs in given:
            for x, weight in pairs:
                x @ weight.T

    return task.layers or SHAPES[task.shape]["num_hidden_layers"], run
