"""Data parallelism, in two processes over gloo: the shards of a batch add up to the batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from egrsd_kernels import Head, fused_egrsd_loss, linear_divergence, linear_logp, token_statistics
from tests.support.cases import make_case
from tests.support.devices import CPU_COMBOS, Combo
from tests.support.processes import in_processes
from tests.support.tolerances import LEARNED, reference_result, relative_error

if not dist.is_available():
    pytest.skip("torch.distributed is not available", allow_module_level=True)

WORLD = 2
COMBOS = [CPU_COMBOS[0], CPU_COMBOS[3]]
# float32: as in test_loss, with a second rounding where the shards' head gradients are added.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SETTINGS = {
    "batch_max": {},
    "batch_max_lookahead": {"entropy_scale": "batch_max_lookahead"},
    "an empty shard": {"empty": True},
    "no shared maximum": {"share": False},
}


def make_batch(combo: Combo, empty: bool = False) -> dict:
    """Four sequences. The second shard's teacher is undecided: the batch's largest entropy is there."""
    case = make_case(combo, lengths=(5,) * 4, bias=True, mask="holes", lookahead=2, gamma=1.0, min_entropy_scale=0.01)
    case["teacher_hidden"][:2] *= 2
    case["teacher_hidden"][2:] *= 0.05
    if empty:
        case["mask"][:2] = False
    return case


def shard_loss(case: dict, rank: int, combo: Combo, group, entropy_scale="batch_max", share: bool = True):
    """The rank's loss under the batch's normaliser, and its gradients, twice: the second backward makes them again."""
    normalizer = case["mask"].sum()
    rows = slice(2 * rank, 2 * rank + 2)
    cut = {k: case[k][rows] for k in ("student_hidden", "teacher_hidden", "target_ids", "advantages", "mask")}
    shard = {**case, **cut}
    leaves = {k: shard[k].clone().requires_grad_() for k in LEARNED}
    loss = fused_egrsd_loss(
        **{**shard, **leaves},
        normalizer=normalizer,
        entropy_scale=entropy_scale,
        data_group=group if share else None,
        backend=combo.backend,
    )
    gradients = torch.autograd.grad(loss, [*leaves.values()], retain_graph=True)
    again = torch.autograd.grad(loss, [*leaves.values()])
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
    return loss.detach(), gradients


def worker(rank: int, combo: Combo, settings: list[str]) -> dict[str, tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """By setting, the rank's loss, and its gradients."""
    group, results = dist.new_group([0, 1]), {}
    for name in settings:
        setting = dict(SETTINGS[name])
        case = make_batch(combo, setting.pop("empty", False))
        results[name] = shard_loss(case, rank, combo, group, **setting)
    return results


@pytest.mark.parametrize("combo", COMBOS)
def test_the_shards_add_up_to_the_batch(combo):
    settings = ["batch_max", "an empty shard"] if combo.interpreted else list(SETTINGS)
    shards = in_processes(worker, combo, settings, world=WORLD)
    for name in settings:
        losses, found = zip(*(shard[name] for shard in shards), strict=True)
        loss = sum(losses)
        d_hidden, d_weight, d_bias = zip(*found, strict=True)
        gradients = [torch.cat(d_hidden), sum(d_weight), sum(d_bias)]
        setting = dict(SETTINGS[name])
        case = make_batch(combo, setting.pop("empty", False))
        if setting.pop("share", True):
            want = reference_result(case | setting)
            assert loss.item() == pytest.approx(want.loss.item(), rel=TOLERANCE[combo.dtype]), name
            for key, x in zip(LEARNED, gradients, strict=True):
                assert relative_error(x, want.gradients[key]) <= TOLERANCE[combo.dtype], (name, key)
        else:
            # Each shard by its own maximum is another loss: what the group is for.
            assert relative_error(gradients[0], reference_result(case).gradients["student_hidden"]) > 1e-3


@pytest.mark.parametrize("combo", COMBOS[:1])
def test_one_process_needs_no_group(combo):
    """Without a group nothing is communicated, whether or not torch.distributed was ever initialised."""
    assert not dist.is_initialized()
    case = make_batch(combo)
    loss = fused_egrsd_loss(**case, backend=combo.backend)
    assert loss.item() == pytest.approx(reference_result(case).loss.item(), rel=1e-12)


def refusals(rank: int) -> dict[str, str]:
    """What each function says of an operand that is sharded, by rows or columns, or replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, said = init_device_mesh("cpu", (WORLD,)), {}
    hidden, whole, ids = torch.ones(2, 3, 4), torch.ones(8, 4), torch.zeros(2, 3, dtype=torch.long)
    for placement in (Shard(0), Shard(1), Replicate()):
        weight = distribute_tensor(whole.clone(), mesh, [placement])
        row = distribute_tensor(torch.ones(8), mesh, [Replicate()])
        states = distribute_tensor(hidden.clone(), mesh, [placement])
        tries = {
            "student_weight": lambda w=weight: fused_egrsd_loss(hidden, w, hidden, ids, torch.ones(2)),
            "weight": lambda w=weight: linear_logp(hidden, w, ids),
            "hidden": lambda h=states: token_statistics(h, whole, ids),
            "student_head": lambda w=weight: linear_divergence(hidden, w, hidden, whole),
            "teacher_head": lambda w=weight: linear_divergence(hidden, whole, hidden, w),
            "student_head.bias": lambda b=row: linear_divergence(hidden, Head(whole, b), hidden, whole),
            "student_hidden": lambda h=states: linear_divergence(h, whole, hidden, whole),
        }
        for name, function in tries.items():
            with pytest.raises(TypeError) as caught:
                function()
            said[f"{name}: {placement}"] = str(caught.value)
    return said


def test_sharded_operands_are_refused():
    """By name, whichever function they go to: a part of a head has another softmax."""
    for said in in_processes(refusals, world=WORLD):
        assert len(said) == 21
        for name, message in said.items():
            assert message.startswith(f"{name.split(':')[0]}: expected a whole tensor, not a DTensor"), name
