"""Data parallelism, in two processes over gloo: the shards of a batch add up to the batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from egrsd_kernels import fused_egrsd_loss
from tests.support.cases import make_case
from tests.support.devices import CPU_COMBOS, Combo
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


def worker(rank: int, store: str, combo: Combo, settings: list[str], results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        group = dist.new_group([0, 1])
        for name in settings:
            setting = dict(SETTINGS[name])
            case = make_batch(combo, setting.pop("empty", False))
            loss, (d_hidden, d_weight, d_bias) = shard_loss(case, rank, combo, group, **setting)
            for x in (loss, d_weight, d_bias):
                dist.all_reduce(x)
            shards = [torch.empty_like(d_hidden) for _ in range(WORLD)]
            dist.all_gather(shards, d_hidden)
            if rank == 0:
                results[name] = [x.tolist() for x in (loss, torch.cat(shards), d_weight, d_bias)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("combo", COMBOS)
def test_the_shards_add_up_to_the_batch(combo, tmp_path):
    settings = ["batch_max", "an empty shard"] if combo.interpreted else list(SETTINGS)
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(worker, args=(str(tmp_path / "store"), combo, settings, shared), nprocs=WORLD)
        results = dict(shared)
    for name in settings:
        loss, *gradients = (torch.tensor(x, dtype=torch.float64) for x in results[name])
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
