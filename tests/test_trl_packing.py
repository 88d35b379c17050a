"""TRL's trainers in packs: a step is the padded run's on the same micro-batches, for TRL's losses and for ours."""

from __future__ import annotations

import itertools
import math
import random
import sys
import types
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import transformers
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from egrsd_kernels import linear_logp
from egrsd_kernels.models import ModelError
from egrsd_kernels.models.proof import evaluating
from egrsd_kernels.packing import layers, packed, proof, varlen
from egrsd_kernels.trl import EGRSDConfig, EGRSDTrainer, pack, unpack
from egrsd_kernels.trl.packed_rows import INDEX, groups_together, parts_of
from egrsd_kernels.trl.packed_step import PackedStep
from egrsd_kernels.trl.packing import HOOKED, check_rows_in_packs
from egrsd_kernels.trl.teacher import AdaptersOff
from tests.support.packing import counted_layers
from tests.support.tree_attention import on_cpus
from tests.support.trl_tiny import dataset, make, tiny_config, tiny_model, weights
from tests.test_trl_resume import Kill, Killed, without_clock

# SGD: Adam would turn a gradient that is zero but for rounding into a step of full size.
STEP = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 1, "num_generations": 4}
OURS = {"cls": EGRSDTrainer}
TRAINERS = {
    "grpo": {"cls": GRPOTrainer, "config": GRPOConfig},
    "rloo": {"cls": RLOOTrainer, "config": RLOOConfig},
}
CLOCK = ("time", "tokens_per_second", "memory")
# Of a step: float32 sums in another order, at other positions of a rope.
TOLERANCE = 1e-6


@pytest.fixture
def in_order(monkeypatch):
    """Rollouts are not shuffled, so that packed and padded micro-batches are the same."""
    for module in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
        monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)


def trained(path, packing: bool | None, budget: int = 60, compile_layers=False, **options):
    """A run and its logs, after training; a small budget makes several packs of a micro-batch."""
    ours = options.get("cls") is EGRSDTrainer
    if ours:
        options |= {
            "packing": packing,
            "max_tokens_per_pack": budget,
            "compile_layers": packing is not False and compile_layers,
        }
    run, logs = make(path / f"packing {packing}", **STEP | options)
    assert not ours or (run._packed is not None) == (packing is not False)
    if packing and not ours:
        pack(run, max_tokens_per_pack=budget, compile_layers=compile_layers)
    run.train()
    return run, logs


def norm(tensors) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


def apart(one, other, start) -> float:
    """How far weights are from others, relative to the way that those have come; but for the rounding of w − lr·g."""
    way = norm(other[name] - start[name] for name in other)
    assert way > 1e-4
    rounding = 2 * 2**-24 * norm(other.values())
    return max(norm(one[name] - other[name] for name in other) - rounding, 0.0) / way


START: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def starting_weights(monkeypatch):
    """Adapters are drawn by the trainer: their first weights are kept as it begins to train."""
    for cls in (GRPOTrainer, RLOOTrainer):

        def train(self, *args, own=cls.train, **options):
            START.clear()
            START.update(weights(self))
            return own(self, *args, **options)

        monkeypatch.setattr(cls, "train", train)


def compare(tmp_path, steps: int = 1, tolerance: float = TOLERANCE, packing: bool | None = True, **options) -> None:
    padded, logs = trained(tmp_path, False, max_steps=steps, **options)
    packed_run, packed_logs = trained(tmp_path, packing, max_steps=steps, **options)
    assert apart(weights(packed_run), weights(padded), dict(START)) <= tolerance
    assert len(logs.steps) == len(packed_logs.steps) == steps
    for expected, got in zip(logs.steps, packed_logs.steps, strict=True):
        assert expected.keys() == got.keys()
        for name in expected:
            if not any(word in name for word in CLOCK):
                assert got[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-6), name


# ------------------------------------------------------------------------------------------------------------- one step


@pytest.mark.heavy
@pytest.mark.parametrize(("trainer", "accumulation", "peft"), [*itertools.product(TRAINERS, (3, 1), (True, False))])
def test_a_step_of_trls_own_loss_is_the_padded_one(tmp_path, in_order, trainer, accumulation, peft):
    """RLOO's loss is divided by the trainer, GRPO's by itself; a reference is read where there are adapters."""
    options = {"gradient_accumulation_steps": accumulation, "beta": 0.1 if peft else 0.0, "peft": peft}
    options |= {"entropy_coef": 0.05} if trainer == "grpo" and not peft else {}
    compare(tmp_path, **TRAINERS[trainer], **options)


EGRSD = {
    "on policy": {},
    "all weights": {"peft": False},
    "a length's most": {"loss_type": "dr_grpo"},
    "a token's place": {"position_weight": 0.6, "lookahead_filter": "quantile", "lookahead_quantile": 0.5},
    "disagreement before a token": {"prefix_weight": 0.5},
    "TRL's loss": {"loss_type": "grpo"},
    "tokens of a micro-batch": {"loss_type": "bnpo", "beta": 0.2},
    "an entropy bonus": {"entropy_coef": 0.1},
    "the most uncertain tokens": {"top_entropy_quantile": 0.5},
    "without a teacher": {"token_advantage": "grpo", "gamma": None, "lookahead": None},
    "cut rollouts are left out": {"mask_truncated_completions": True},
    "its own weights teach": {"teacher_model_kind": "ema", "teacher_update_rate": 0.5},
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", EGRSD)
def test_a_step_of_ours_is_the_padded_one(tmp_path, in_order, name):
    compare(tmp_path, **OURS, **{"gradient_accumulation_steps": 3} | EGRSD[name])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{**TRAINERS["grpo"], "beta": 0.1}, {**OURS, "beta": 0.1}, TRAINERS["rloo"]])
def test_several_updates_of_a_rollout(tmp_path, in_order, options):
    """The second sees another policy than π_old; its steps carry the rounding of those before."""
    more = {"num_iterations": 2, "steps_per_generation": 4, "epsilon": 0.02, "learning_rate": 0.05}
    compare(tmp_path, steps=4, tolerance=1e-5, **{"beta": 0.0} | options | more)


@pytest.mark.slow
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="TRL calls tools with transformers 5")
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_what_tools_answer_is_read_in_packs_and_not_learned(tmp_path, in_order, loss_type):
    from tests.test_trl_tools import build

    found = []
    for packing in (False, True):
        options = STEP | {"num_generations": 2, "packing": packing, "max_tokens_per_pack": 300, "loss_type": loss_type}
        run, logs = build(tmp_path / str(packing), **options)
        before = weights(run)
        run.train()
        assert logs.steps[0]["tools/call_frequency"] == 0.5
        found.append((weights(run), {k: v for k, v in logs.steps[0].items() if not any(word in k for word in CLOCK)}))
    assert apart(found[1][0], found[0][0], before) <= TOLERANCE
    assert found[1][1] == pytest.approx(found[0][1], rel=2e-5, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "teacher", [{"peft": True}, {"peft": False, "teacher_model_kind": "ema", "teacher_update_rate": 0.3}]
)
def test_a_divergence_is_made_in_packs(tmp_path, in_order, teacher):
    """By the teacher's hidden states, which are read in packs as well."""
    compare(tmp_path, **OURS, gradient_accumulation_steps=3, divergence="reverse_kl", **teacher)


@pytest.mark.slow
def test_evaluation_is_the_padded_one(tmp_path, in_order):
    found = []
    for packing in (False, True):
        options = {"packing": packing, "max_tokens_per_pack": 60, "eval_dataset": dataset(4), "eval_strategy": "steps"}
        run, _ = make(tmp_path / str(packing), **STEP | options)
        torch.manual_seed(3)
        found.append({k: v for k, v in run.evaluate().items() if not any(word in k for word in (*CLOCK, "second"))})
    assert found[1] == pytest.approx(found[0], rel=2e-5, abs=2e-6, nan_ok=True)


@pytest.mark.slow
def test_a_scaled_loss_is_scaled_once(tmp_path, in_order):
    """What a GradScaler multiplies by is in every pack's gradient, once."""
    factor, found = 1024.0, []
    for packing in (False, True):
        run, _ = make(tmp_path / str(packing), **STEP, **TRAINERS["rloo"], gradient_accumulation_steps=3, beta=0.0)
        if packing:
            pack(run, max_tokens_per_pack=60)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        run.create_optimizer()
        run.optimizer.step = types.MethodType(lambda *_, **__: None, run.optimizer)  # the gradients stay as they are
        run.optimizer.zero_grad = lambda *_, **__: None
        run.model.zero_grad = lambda *_, **__: None
        run.train()
        found.append({name: w.grad for name, w in run.model.named_parameters() if w.requires_grad})
    zeros = {name: torch.zeros_like(value) for name, value in found[0].items()}
    assert apart(found[1], found[0], zeros) <= TOLERANCE
    assert run.accelerator.scaler.get_scale() == factor


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "beta": 0.1}], ids=["direct", "twice"])
def test_a_step_by_cuda_graphs_is_the_padded_one(tmp_path, in_order, options):
    """Several packs of each micro-batch: what a graph has given is not read when the next begins."""
    with counted_layers() as calls:
        compare(tmp_path, **OURS, gradient_accumulation_steps=3, budget=30, compile_layers="cudagraphs", **options)
    assert calls.count("begin") > 4 * 3
    one = ["begin", *["graph"] * tiny_config().num_hidden_layers]
    assert calls == one * calls.count("begin")


@pytest.mark.heavy
def test_where_attention_is_by_segments_packs_and_compiled_layers_are_the_default(tmp_path, in_order):
    with counted_layers() as calls:
        compare(tmp_path, **OURS, gradient_accumulation_steps=3, packing=None, compile_layers=None)
    assert {*calls} == {"plain"}


@pytest.mark.cuda
@pytest.mark.parametrize(
    "options", [TRAINERS["grpo"], OURS, {**OURS, "loss_type": "grpo"}], ids=["grpo", "direct", "ours"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16 compiled", "bf16 cudagraphs"])
def test_a_step_on_a_gpu_is_the_padded_one(tmp_path, in_order, monkeypatch, options, precision):
    """In 16 bits a packed step is as far from float32's as a padded one, with the scaler that float16 needs."""

    def completions(self, prompt_ids, *_, **__):
        random = torch.Generator().manual_seed(11)
        lengths = torch.randint(1, 12, (len(prompt_ids),), generator=random).tolist()
        return [[*torch.randint(6, 60, (n,), generator=random).tolist(), 1] for n in lengths], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", completions)
    common = {"gradient_accumulation_steps": 3, "use_cpu": False, "peft": False, "learning_rate": 0.1} | options
    precision, _, compiled = precision.partition(" ")
    halves = {} if precision == "fp32" else {precision: True}
    exact, _ = trained(tmp_path / "exact", False, **common)
    start = dict(START)
    padded, _ = trained(tmp_path, False, **common | halves)
    compile_layers = compiled if compiled == "cudagraphs" else bool(compiled)
    packed_run, _ = trained(tmp_path, True, compile_layers=compile_layers, **common | halves)
    off, allowed = (apart(weights(run), weights(exact), start) for run in (packed_run, padded))
    sys.stdout.write(f"{precision} {compiled}: packed {off:.2e}, padded {allowed:.2e} from float32\n")
    assert off <= max(2 * allowed, 1e-5)


# ------------------------------------------------------------------------------------------------ dropout, and resuming


def dropout_model():
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(tiny_model(), lora)


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(ids, mask, T): two prompts, of two lengths; completions of 0 to 7 tokens."""
    random = torch.Generator().manual_seed(7)
    prompts = torch.randint(6, 60, (2, 5), generator=random).repeat_interleave(rows // 2, 0)
    completions = torch.randint(6, 60, (rows, 7), generator=random)
    lengths = torch.tensor([7, 3, 0, 5, 1, 6])[:rows, None]
    prompt_mask = torch.ones_like(prompts)
    prompt_mask[rows // 2 :, :2] = 0
    mask = torch.cat([prompt_mask, (torch.arange(7) < lengths).long()], dim=1)
    return torch.cat([prompts, completions], dim=1) * mask, mask, 7


def a_loss(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """No sum over tokens: each token's gradient depends on all others."""
    return logp.sum(1).exp().sum() + logp.square().mean() + 0.3 * (entropy.sum(1) ** 2).mean()


def test_a_rollout_beyond_the_budget_is_said_once():
    step, model = PackedStep(Accelerator(cpu=True), 5), tiny_model()
    with pytest.warns(UserWarning, match="max_tokens_per_pack=5: rows that are longer are packs alone"):
        parts = step.parts(model, *batch())
    assert max(len(part.pack) for part in parts) > 5
    step.remove()


def test_packs_without_a_gradient_are_larger_where_no_mask_is_made():
    step, model = PackedStep(Accelerator(cpu=True), 6), tiny_model()
    sizes = {}
    for by_segments in (False, True):
        with on_cpus() if by_segments else nullcontext():
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    sizes[by_segments, grad] = [len(part.pack) for part in step.parts(model, *batch())]
    few, *many = (sizes.pop((True, False)), *sizes.values())
    assert len({*map(tuple, many)}) == 1 and len(few) < len(many[0]) and 12 < max(few) <= 4 * 6
    step.remove()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("budget", [18, 1000])
def test_both_passes_drop_the_same(budget, device):
    """The gradient in two passes is that of one graph over all packs, whatever was drawn."""
    found = []
    for together in (False, True):
        model = dropout_model().train().to(device)
        AcceleratorState._reset_state()  # it keeps the mixed precision of the process's first run
        accelerator = Accelerator(cpu=device == "cpu")
        step = PackedStep(accelerator, budget)
        ids, mask, width = batch()
        ids, mask = ids.to(device), mask.to(device)
        torch.manual_seed(5)
        if together:
            found_in_parts = [torch.zeros(len(ids), width, device=device) for _ in range(2)]
            for part in step.parts(model, ids, mask, width):
                values, _ = packed(
                    model,
                    part.pack,
                    lambda hidden, head, part=part: linear_logp(
                        hidden, head, part.target_ids, return_entropy=True, entropy_grad=True
                    ),
                )
                for place, value in enumerate(values):
                    found_in_parts[place] = found_in_parts[place].index_put((part.rows, part.columns), value)
            loss = a_loss(*found_in_parts)
            loss.backward()
        else:
            loss = a_loss(*step.read(model, ids, mask, width, entropy_grad=True))
            drawn = torch.rand(3, device=device)
            torch.manual_seed(5)
            again = a_loss(*step.read(model, ids, mask, width, entropy_grad=True))
            accelerator.backward(loss)
            assert torch.equal(torch.rand(3, device=device), drawn)  # the second pass draws nothing new
            assert torch.equal(again, loss)
        step.remove()
        gradients = torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])
        found.append((loss.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    assert (found[0][1] - found[1][1]).norm() <= 1e-6 * found[1][1].norm()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 1])
def test_resume_in_the_middle_of_a_generation_is_bit_exact(tmp_path, step):
    """With dropout and groups in packs; the generation serves four steps, twice through the rollouts of two."""
    options = STEP | {
        "packing": True, "max_tokens_per_pack": 60, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 5,
        "peft": False, "learning_rate": 0.05,
    }  # fmt: skip
    straight, logs = make(tmp_path / "straight", **options, model=dropout_model())
    straight.train()
    saving = options | {"save_strategy": "steps", "save_steps": 1}
    killed, _ = make(tmp_path / "killed", **saving, model=dropout_model(), callbacks=[Kill(step)])
    with pytest.raises(Killed):
        killed.train()
    resumed, resumed_logs = make(tmp_path / "killed", **saving, model=dropout_model())
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(straight).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert without_clock(resumed_logs.steps) == without_clock(logs.steps[step:])


@pytest.mark.slow
def test_a_padded_runs_checkpoint_is_another_runs(tmp_path):
    padded, _ = make(tmp_path, packing=False, save_strategy="steps", save_steps=1)
    padded.train()
    packed_run, _ = make(tmp_path, packing=True, max_steps=3)
    with pytest.raises(ValueError, match=r"packing: false there, true here"):
        packed_run.train(resume_from_checkpoint=True)


# ----------------------------------------------------------------------------------------------------- groups and parts


def test_groups_stay_together():
    """Groups in the order in which TRL's shuffle has put their first rollouts, and within in its order."""
    order = [5, 1, 4, 0, 3, 2]
    values = {
        "ids": torch.tensor(order) * 10,
        "name": [str(number) for number in order],
        "none": None,
        "count": torch.tensor(7),
        INDEX: torch.tensor(order) + 6,
    }
    batches = [
        {k: v if v is None or (hasattr(v, "ndim") and not v.ndim) else v[at : at + 2] for k, v in values.items()}
        for at in (0, 2, 4)
    ]
    regrouped = groups_together(batches, 3)
    assert [one["ids"].tolist() for one in regrouped] == [[50, 40], [30, 10], [0, 20]]
    assert [one["name"] for one in regrouped] == [["5", "4"], ["3", "1"], ["0", "2"]]
    assert all(one["none"] is None and one["count"] == 7 and INDEX not in one for one in regrouped)


@pytest.mark.heavy
@pytest.mark.parametrize("options", [TRAINERS["rloo"], TRAINERS["grpo"], {**OURS, "packing": True}])
def test_a_micro_batch_has_whole_groups(tmp_path, options):
    run, _ = make(tmp_path, **STEP | {"gradient_accumulation_steps": 3, "beta": 0.0} | options)
    if "packing" not in options:
        pack(run)
    seen = []
    own = run._compute_loss
    run._compute_loss = lambda model, inputs: seen.append(inputs["prompt_ids"]) or own(model, inputs)
    run.train()
    assert len(seen) == 3
    for prompts in seen:
        assert len(prompts) == 4 and (prompts == prompts[0]).all()


def test_a_read_walks_through_no_modules_by_generators(monkeypatch):
    """Once the model is proved: `modules()` passes each module through the generators of all above it."""
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    ids, mask, width = batch()
    accelerator = Accelerator(cpu=True)
    step, teacher = PackedStep(accelerator, 60), AdaptersOff(model)

    def reads() -> torch.Tensor:
        with torch.no_grad(), evaluating(model), teacher.active() as other:
            step.read(other, ids, mask, width)
        return step.read(model, ids, mask, width)[0]

    logp, walks, own = reads(), [], nn.Module.named_modules
    count = len([*model.modules()])
    monkeypatch.setattr(nn.Module, "named_modules", lambda *args, **more: walks.append(1) or own(*args, **more))
    accelerator.backward((reads() - logp).sum())
    assert len(walks) < count  # of a walk each module is one; a device is that of the first weight


@pytest.mark.parametrize("limit", [math.inf, 6, 0])
def test_every_token_of_a_completion_stands_in_one_part(limit):
    """For prompts of a token and more, empty completions, equal rows, and rows beyond every bound."""
    for seed in range(60):
        check_parts(random.Random(seed), limit)


def check_parts(draw: random.Random, limit: float) -> None:
    lengths = [(draw.randint(1, 4), draw.randint(0, 6)) for _ in range(draw.randint(1, 6))]
    budget = draw.randint(1, 30)
    rows, width = [], max(length for _, length in lengths)
    for prompt, completion in lengths:
        tokens = [draw.randrange(2) for _ in range(prompt + completion)]  # few ids: many prefixes are shared
        left, right = 4 - prompt, width - completion
        rows.append(([0] * left + tokens + [0] * right, [0] * left + [1] * len(tokens) + [0] * right))
    ids, mask = (torch.tensor(values) for values in zip(*rows, strict=True))
    parts = parts_of(ids, mask, width, budget=budget, row_limit=limit, as_many_as=lambda count: count)
    parts = [part for part in parts if part.counted]
    found = torch.full((len(ids), width), -1)
    for part in parts:
        assert (part.of(found) == -1).all()
        part.put(found, part.target_ids)
        assert part.cu_seqlens[-1] == len(part.rows)
        longest = max(int(mask[row].sum()) for row in part.rows.unique())
        assert len(part.pack.rows) == 1 or longest <= limit
        assert len(part.pack) <= max(budget, longest)
    assert torch.equal(found, torch.where(mask[:, 4:].bool(), ids[:, 4:], -1))


def test_a_process_with_fewer_packs_runs_as_many():
    ids, mask, width = batch()
    model = tiny_model()
    accelerator = Accelerator(cpu=True)
    found = []
    for more in (0, 2):
        step = PackedStep(accelerator, 1000)
        step._most = lambda count, more=more: count + more
        model.zero_grad()
        logp, entropy = step.read(model, ids, mask, width, entropy_grad=True)
        accelerator.backward(a_loss(logp, entropy))
        step.remove()
        found.append([logp.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    mask[:, -width:] = 0  # no completion at all
    step = PackedStep(accelerator, 1000)
    logp, _ = step.read(model, ids, mask, width)
    model.zero_grad()
    accelerator.backward(logp.sum())
    step.remove()
    assert not logp.any() and not any(weight.grad.any() for weight in model.parameters())


# -------------------------------------------------------------------------------------------------- what is not allowed


def test_another_backward_and_another_loss_are_refused():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    step = PackedStep(accelerator, 1000)
    ids, mask, width = batch()
    logp, _ = step.read(model, ids, mask, width)
    with pytest.raises(RuntimeError, match=r"accelerator\.backward\(loss\), which runs the packs"):
        logp.sum().backward()
    logp, _ = step.read(model, ids, mask, width)
    with pytest.raises(ValueError, match=r"further tensors that train: \(3,\)"):
        accelerator.backward(logp.sum() + nn.Parameter(torch.ones(3)).sum())
    plain = nn.Parameter(torch.ones(3))
    accelerator.backward(plain.square().sum())  # a loss of other tensors is none of it
    assert torch.equal(plain.grad, torch.full((3,), 2.0))
    step.remove()
    assert "backward" not in vars(accelerator)


@pytest.mark.parametrize("name", ["attention_dropout", "compile_layers"])
def test_what_would_fail_at_the_first_read_is_said_at_the_start(tmp_path, monkeypatch, name):
    options = {"peft": False}
    if name == "attention_dropout":
        config = tiny_config()
        config.attention_dropout = 0.1
        options["model"] = type(tiny_model())(config)
        monkeypatch.setattr(varlen, "DEVICES", ("cpu",))  # a GPU's way, in any dtype
        monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
        monkeypatch.setattr(proof, "_prove_on", lambda *_: True)
    else:
        options["compile_layers"] = True
    with pytest.raises(ModelError, match=f"^{name}: .*expect"):
        make(tmp_path / "ours", packing=True, **options)
    run, _ = make(
        tmp_path / "trl", **STEP, **TRAINERS["grpo"], **{k: v for k, v in options.items() if k != "compile_layers"}
    )
    with pytest.raises(ModelError, match=f"^{name}: .*expect"):
        pack(run, compile_layers=name == "compile_layers")
    assert "backward" not in vars(run.accelerator)


def test_cuda_graphs_are_refused_at_the_start(tmp_path, monkeypatch):
    ours, trls = {"peft": False, "packing": True, "compile_layers": "cudagraphs"}, {**TRAINERS["grpo"], "peft": False}
    with pytest.raises(ModelError, match=r"^compile_layers: expects a model on a GPU in 16 bits that attends by segme"):
        make(tmp_path / "cpu", **ours)
    with counted_layers() as calls:
        dropping = {"model": dropout_model()}
        with pytest.raises(
            ModelError, match=r"^compile_layers: \w+: CUDA graphs expect layers without dropout, got 0.3"
        ):
            make(tmp_path / "dropout", **ours | dropping)
        run, _ = make(tmp_path / "trl", **STEP, **trls | dropping)
        with pytest.raises(
            ModelError, match=r"^compile_layers: \w+: CUDA graphs expect layers without dropout, got 0.3"
        ):
            pack(run, compile_layers="cudagraphs")
        run, _ = make(tmp_path / "whole", **STEP, **trls)
        with pytest.raises(
            ValueError, match=r"^compile_layers: expected True, False, None or 'cudagraphs', got 'graphs'"
        ):
            pack(run, compile_layers="graphs")
        with pack(run, compile_layers="cudagraphs"):
            pass
        monkeypatch.setattr(type(run.accelerator), "distributed_type", DistributedType.FSDP)
        with pytest.raises(ModelError, match=r"^compile_layers: \w+: CUDA graphs expect whole weights that stay where"):
            pack(run, compile_layers="cudagraphs")
        monkeypatch.undo()
        monkeypatch.setattr(layers, "CUT", ())
        with pytest.raises(
            ModelError, match=r"^compile_layers: \w+: CUDA graphs expect operators that the compiler cut"
        ):
            make(tmp_path / "torch", **ours)
    assert not calls


def test_what_packs_may_cost_is_not_the_default(tmp_path, monkeypatch, caplog):
    """A dense mask; and rows that a rope would refuse in the middle of a run. Asked for, both are packed."""
    run, _ = make(tmp_path / "cpu", packing=None)
    assert run._packed is None and not caplog.records  # nor is it said on a CPU
    assert EGRSDConfig.packing is None and EGRSDConfig.compile_layers is None
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    run, _ = make(tmp_path / "dense", packing=None)
    assert run._packed is None and "padded, not packed: model: packing by default expects a model on" in caplog.text
    caplog.clear()
    config = tiny_config()
    config.rope_scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with on_cpus():
        run, _ = make(tmp_path / "rope", packing=None, model=type(tiny_model())(config))
        assert run._packed is None and "padded, not packed: model: packing by default expects a rope" in caplog.text
        run, _ = make(tmp_path / "asked", packing=True, model=type(tiny_model())(config))
        assert run._packed is not None
        check_rows_in_packs(run.accelerator, tiny_model(), by_default=True)
        monkeypatch.setattr(type(run.accelerator), "distributed_type", DistributedType.FSDP)
        with pytest.raises(ModelError, match=r"^model: packing by default expects whole weights, got FSDP"):
            check_rows_in_packs(run.accelerator, tiny_model(), by_default=True)


def test_a_direct_loss_has_no_value_before_its_backward_pass():
    model, accelerator = tiny_model(), Accelerator(cpu=True)
    step = PackedStep(accelerator, 18)
    ids, mask, width = batch()
    parts = step.parts(model, ids, mask, width)

    def share(part, hidden, head):
        return -linear_logp(hidden, head, part.target_ids).sum()

    def direct():
        return step.direct(model, parts, share, lambda: None)

    with torch.no_grad():
        expected = direct()
    loss = direct()
    assert loss.isnan()
    scaled = loss / 4
    accelerator.backward(scaled)
    torch.testing.assert_close(scaled.detach(), expected / 4)
    gradient = next(w.grad for w in model.parameters() if w.requires_grad)
    assert gradient.isfinite().all() and gradient.any()
    model.zero_grad()
    accelerator.backward(direct() ** 2)  # whose gradient would need the value
    assert next(w.grad for w in model.parameters() if w.requires_grad).isnan().any()
    step.remove()


def test_unpack_gives_a_trainer_its_own_methods_back(tmp_path):
    run, _ = make(tmp_path, **STEP, **TRAINERS["grpo"])
    before = dict(vars(run))
    with pack(run):
        assert set(HOOKED) <= vars(run).keys()
        with pytest.raises(ValueError, match="one that is not packed already"):
            pack(run)
    assert vars(run) == before and "backward" not in vars(run.accelerator)
    pack(run)
    unpack(run)
    unpack(run)
    assert vars(run) == before and "backward" not in vars(run.accelerator)


def test_what_cannot_be_packed_is_refused_in_one_line(tmp_path):
    run, _ = make(tmp_path / "ours")
    assert run._packed is None
    with pytest.raises(ValueError, match="EGRSDTrainer overrides: set packing=True in its config"):
        pack(run)
    with pytest.raises(TypeError, match="expected a GRPOTrainer or RLOOTrainer, got object"):
        pack(object())
    run, _ = make(tmp_path / "budget", **STEP, **TRAINERS["grpo"])
    with pytest.raises(ValueError, match="max_tokens_per_pack: expected"):
        pack(run, max_tokens_per_pack=0)
    run.args.optim = "lomo"
    with pytest.raises(ValueError, match="optim: packing expects an optimizer that steps once"):
        pack(run)
    with pytest.raises((TypeError, ValueError), match="packing: expected"):
        make(tmp_path / "flag", packing="yes")
    for given in (True, "cudagraphs"):
        with pytest.raises(ValueError, match=f"compile_layers: expected None or False without packing, got {given!r}"):
            make(tmp_path / "layers", packing=False, compile_layers=given)
    step = PackedStep(Accelerator(cpu=True), 1000, True)
    with pytest.raises(ValueError, match="compile_layers: expected a model without dropout"):
        step.read(dropout_model().train(), *batch())
    step.remove()


@pytest.mark.slow
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="the tiny processors are of transformers 5")
def test_images_stay_padded(tmp_path):
    from tests.support.vlm_tiny import dataset_with_images, qwen2_vl, qwen2_vl_processor

    images = {"model": qwen2_vl(), "processing_class": qwen2_vl_processor(), "train_dataset": dataset_with_images()}
    with pytest.raises(ValueError, match="model: packing expects one of text"):
        make(tmp_path / "images", packing=True, peft=False, **images)


def test_a_load_balancing_loss_and_unproved_models_stay_padded(tmp_path, monkeypatch):
    sizes = {name: getattr(tiny_config(), name) for name in (
        "vocab_size", "hidden_size", "head_dim", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id",
    )}  # fmt: skip
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "bos_token_id": None}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, output_router_logits=True))
    options = {"model": model, "peft": False, "router_aux_loss_coef": 0.01}
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: packing expects 0, got 0\.01"):
        make(tmp_path / "aux", packing=True, **options)
    run, _ = make(tmp_path / "none", packing=None, **options)
    assert run._packed is None
    monkeypatch.setattr(type(run.accelerator), "device", torch.device("cpu:0"))  # no GPU, and another place than "cpu"
    monkeypatch.setattr(
        "egrsd_kernels.trl.packing.row_limit", lambda model: (_ for _ in ()).throw(ModelError("model: Tiny: not so"))
    )
    with pytest.raises(ModelError, match="model: Tiny: not so"):
        make(tmp_path / "proof", packing=True)
    run, _ = make(tmp_path / "no proof", packing=None)
    assert run._packed is None
