"""The loss among PyTorch's features: autocast, views, checkpoints, compilation, graphs used twice, a real model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.utils.flop_counter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from egrsd_kernels import checks, fused_egrsd_loss, linear_logp, token_statistics
from egrsd_kernels.credit import token_regimes
from egrsd_kernels.rl import length_shaped_reward, response_hidden, response_positions
from reference import egrsd_loss
from tests.support.cases import make_case
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS, Combo, all_combos, few_combos, two_gpus
from tests.support.tolerances import (
    LEARNED,
    assert_gradient,
    check_parity,
    gradient_tolerance,
    package_result,
    reference_result,
)


def with_more_rounding(combo: Combo) -> float:
    """For a gradient that PyTorch adds up or scales after the package."""
    return 2 * gradient_tolerance(combo)


def with_leaves(case: dict) -> tuple[dict, dict]:
    """(arguments whose LEARNED tensors are fresh leaves, those leaves)"""
    leaves = {k: case[k].detach().clone().requires_grad_() for k in LEARNED if case.get(k) is not None}
    return {**case, **leaves}, leaves


def float64_on_cpu(tensors: dict) -> dict:
    return {
        k: (x.detach().cpu().double() if x.is_floating_point() else x.cpu()) if isinstance(x, torch.Tensor) else x
        for k, x in tensors.items()
    }


def check_views(combo: Combo, leaves: dict, rest: dict, views) -> None:
    """Loss and the gradients of ``leaves``, when the loss sees ``views(leaves, rest)``."""
    learned = {k: x.detach().clone().requires_grad_() for k, x in leaves.items()}
    loss = fused_egrsd_loss(**views(learned, rest), backend=combo.backend)
    factor = 16.0 if combo.dtype == torch.float16 else 1.0
    (loss * factor).backward()
    exact = {k: x.requires_grad_() for k, x in float64_on_cpu(leaves).items()}
    want = egrsd_loss(**views(exact, float64_on_cpu(rest)))
    (want * factor).backward()
    torch.testing.assert_close(loss.detach().cpu().double(), want.detach(), rtol=1e-5, atol=1e-5)
    for name, x in learned.items():
        assert_gradient(name, x.grad, exact[name].grad, with_more_rounding(combo))


# ------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("combo", [*CPU_COMBOS[1:2], CPU_COMBOS[3], CUDA_COMBOS[2], CUDA_COMBOS[4]])
def test_autocast(combo):
    """As a linear layer would: operands in the low precision, float32 masters and their gradients in float32."""
    low = torch.float16 if combo.interpreted else torch.bfloat16
    case = make_case(combo, bias=True, lookahead=2, mask="holes")
    arguments, leaves = with_leaves(case)
    factor = 16.0
    with torch.autocast(combo.device, dtype=low):
        loss = fused_egrsd_loss(**arguments, backend=combo.backend)
        logp = linear_logp(case["student_hidden"], case["student_weight"], case["target_ids"], backend=combo.backend)
        h = token_statistics(case["student_hidden"], case["student_weight"], case["target_ids"], backend=combo.backend)
    (loss * factor).backward()
    assert loss.dtype == logp.dtype == h.entropy.dtype == torch.float32

    rounded = {k: case[k].to(low) for k in ("student_hidden", "student_weight", "teacher_hidden")}
    want = reference_result({**case, **rounded}, factor)
    torch.testing.assert_close(loss.detach().cpu().double(), want.loss, rtol=1e-5, atol=1e-5)
    for name, x in leaves.items():
        assert x.grad.dtype == torch.float32
        assert_gradient(name, x.grad, want.gradients[name], gradient_tolerance(combo._replace(dtype=low)))
    shift = (reference_result(case).stats.student_logp - want.stats.student_logp).abs().max()
    assert shift > 1e-4, "the case does not show which precision was used"
    plain = linear_logp(rounded["student_hidden"], rounded["student_weight"], case["target_ids"], backend=combo.backend)
    assert torch.equal(logp, plain) and torch.equal(h.logp, plain)


def test_autocast_leaves_float64_alone():
    combo = Combo("torch", "cpu", torch.float64)
    case = make_case(combo)
    want = package_result(case, combo)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = package_result(case, combo)
    assert torch.equal(got.loss, want.loss)


# ------------------------------------------------------------------------------------------------ views


@all_combos
def test_shifted_slices(combo):
    """hidden[:, :-1] against ids[:, 1:], as a trainer would cut them."""
    case = make_case(combo, lengths=(7, 7, 7), bias=True, lookahead=2, mask="holes")
    leaves = {k: case.pop(k) for k in LEARNED}

    def views(leaves, rest):
        cut = {k: rest[k][:, 1:] for k in ("target_ids", "mask")}
        hidden = {"student_hidden": leaves["student_hidden"][:, :-1], "teacher_hidden": rest["teacher_hidden"][:, :-1]}
        assert not hidden["student_hidden"].is_contiguous()
        return {**rest, **leaves, **hidden, **cut}

    check_views(combo, leaves, case, views)


@all_combos
def test_a_transposed_head(combo):
    case = make_case(combo)
    leaves = {k: case.pop(k) for k in LEARNED[:2]}
    leaves["student_weight"] = leaves["student_weight"].T.contiguous()

    def views(leaves, rest):
        return {**rest, **leaves, "student_weight": leaves["student_weight"].T}

    check_views(combo, leaves, case, views)


@all_combos
def test_a_slice_of_a_larger_head(combo):
    """The first V rows and D columns of a padded matrix: rows lie apart, and start off 16 bytes."""
    case = make_case(combo, width=20, vocabulary=50)
    leaves = {k: case.pop(k) for k in LEARNED[:2]}
    leaves["student_weight"] = torch.nn.functional.pad(leaves["student_weight"], (1, 2, 0, 14), value=math.nan)

    def views(leaves, rest):
        return {**rest, **leaves, "student_weight": leaves["student_weight"][:50, 1:21]}

    check_views(combo, leaves, case, views)


@all_combos
def test_expanded_inputs(combo):
    """One advantage for all, one mask for all sequences, one hidden state for all tokens of a sequence."""
    case = make_case(combo, lengths=(5, 5, 5), bias=True)
    leaves = {k: case.pop(k) for k in LEARNED[:2]}
    leaves["student_hidden"] = leaves["student_hidden"][:, :1]
    rest = (
        case
        | {
            "student_bias": case["student_bias"][:1],  # without gradient: a common shift of all logits has none
            "advantages": torch.tensor([0.7], device=combo.device),
            "mask": torch.tensor([1, 1, 0, 1, 1], device=combo.device),
            "target_ids": case["target_ids"][:1],
            "teacher_hidden": case["teacher_hidden"][:1],
        }
    )

    def views(leaves, rest, advantages=(3,)):
        return {
            **rest,
            "student_weight": leaves["student_weight"],
            "student_hidden": leaves["student_hidden"].expand(3, 5, -1),
            "student_bias": rest["student_bias"].expand(61),
            "advantages": rest["advantages"].expand(*advantages),
            "mask": rest["mask"].expand(3, 5),
            "target_ids": rest["target_ids"].expand(3, 5),
            "teacher_hidden": rest["teacher_hidden"].expand(3, 5, -1),
        }

    check_views(combo, leaves, rest, views)
    if not combo.interpreted:
        check_views(combo, leaves, rest, lambda leaves, rest: views(leaves, rest, (3, 5)))


@few_combos
def test_teacher_statistics_as_slices(combo):
    case = make_case(combo, lengths=(7, 7), teacher="statistics", lookahead=3)
    leaves = {k: case.pop(k) for k in LEARNED[:2]}

    def views(leaves, rest):
        cut = {k: rest[k][:, 1:] for k in ("target_ids", "teacher_logp", "teacher_entropy")}
        return {**rest, **leaves, **cut, "student_hidden": leaves["student_hidden"][:, :-1]}

    check_views(combo, leaves, case, views)


@all_combos
def test_a_tied_embedding_as_head(combo):
    """One matrix makes the hidden states and reads them: both paths reach its gradient, the teacher's does not."""
    case = make_case(combo, lengths=(5, 5))
    ids = case["target_ids"].flip(1)
    rest = {k: case[k] for k in ("target_ids", "advantages")} | {"ids": ids}
    leaves = {"embedding": 2 * case["student_weight"]}

    def views(leaves, rest):
        rest = dict(rest)
        table, ids = leaves["embedding"], rest.pop("ids")
        return {
            **rest,
            "student_hidden": torch.nn.functional.embedding(ids, table) * 2,
            "student_weight": table,
            "teacher_hidden": torch.nn.functional.embedding(ids, table),
        }

    check_views(combo, leaves, rest, views)


# ------------------------------------------------------------------------------------------------ graphs


@few_combos
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(combo, use_reentrant):
    case = make_case(combo, bias=True, lookahead=2)

    def loss_of(hidden, weight, bias):
        tensors = {"student_hidden": hidden * 0.5, "student_weight": weight, "student_bias": bias}
        return fused_egrsd_loss(**{**case, **tensors}, backend=combo.backend)

    results = []
    for call in (lambda *x: loss_of(*x), lambda *x: checkpoint(loss_of, *x, use_reentrant=use_reentrant)):
        _, leaves = with_leaves(case)
        loss = call(*leaves.values())
        loss.backward()
        results.append((loss.detach(), *(x.grad for x in leaves.values())))
    # A reentrant checkpoint runs forward without gradients first, where log p is summed in another order.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(results[0][1:], results[1][1:], strict=True))


@all_combos
@pytest.mark.parametrize("factor", [-0.3, 1000.0, 0.0])
def test_an_incoming_gradient_that_is_not_one(combo, factor):
    case = make_case(combo, bias=True)
    got, want = package_result(case, combo, factor), reference_result(case, factor)
    for name in LEARNED:
        assert_gradient(name, got.gradients[name], want.gradients[name], with_more_rounding(combo))
    assert factor == 0 or got.gradients["student_hidden"].any()


@all_combos
def test_one_term_of_a_sum(combo):
    """0.5 · loss of one batch − 2 · loss of another + a penalty on the same hidden states and head."""
    case = make_case(combo, bias=True)
    other = make_case(combo, seed=1)
    leaves = {k: case[k] for k in LEARNED}

    def total(leaves, case, other, loss, **options):
        first = loss(**{**case, **leaves}, **options)
        second = loss(**{**other, **{k: leaves[k] for k in LEARNED[:2]}}, **options)
        penalty = 1e-2 * sum(x.to(first.dtype).square().sum() for x in leaves.values())
        return 0.5 * first - 2 * second + penalty

    learned = {k: x.clone().requires_grad_() for k, x in leaves.items()}
    total(learned, case, other, fused_egrsd_loss, backend=combo.backend).backward()
    exact = {k: x.requires_grad_() for k, x in float64_on_cpu(leaves).items()}
    total(exact, float64_on_cpu(case), float64_on_cpu(other), egrsd_loss).backward()
    for name, x in learned.items():
        assert_gradient(name, x.grad, exact[name].grad, with_more_rounding(combo))


@all_combos
def test_a_second_backward(combo):
    case, leaves = with_leaves(make_case(combo, bias=True, lookahead=2, mask="holes"))
    loss = fused_egrsd_loss(**case, backend=combo.backend)

    def gradients(factor, **options):
        # 1024: doubling rounds nothing, unless a float16 gradient lies below its smallest normal number.
        return torch.autograd.grad(loss, [*leaves.values()], torch.full_like(loss, 1024 * factor), **options)

    first = gradients(1, retain_graph=True)
    kept = [x.clone() for x in first]
    second = gradients(1, retain_graph=True)
    twice = gradients(2)
    for x, y, z, w in zip(kept, second, twice, first, strict=True):
        assert torch.equal(x, y) and torch.equal(2 * x, z), "a later backward pass gives another gradient"
        assert torch.equal(x, w), "a later backward pass wrote into an earlier one's gradient"
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, [*leaves.values()])


@few_combos
def test_linear_logp_and_a_second_backward(combo):
    case, leaves = with_leaves(make_case(combo, bias=True))
    logp = linear_logp(*(leaves[k] for k in LEARNED[:2]), case["target_ids"], bias=leaves["student_bias"])
    grads = [torch.autograd.grad(logp.sum(), [*leaves.values()], retain_graph=True) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@few_combos
@pytest.mark.parametrize("function", ["loss", "linear_logp"])
def test_a_gradient_of_a_gradient_is_refused(combo, function):
    """The token advantage is a constant by definition and its derivative lost: silence would be a wrong answer."""
    case, leaves = with_leaves(make_case(combo, lengths=(3, 3)))
    hidden, weight = (leaves[k] for k in LEARNED[:2])
    with pytest.raises(RuntimeError, match=r"differentia\w+ (only )?(once|twice)"):
        if function == "loss":
            value = fused_egrsd_loss(**case, backend=combo.backend)
        else:
            value = linear_logp(hidden, weight, case["target_ids"], backend=combo.backend).sum()
        (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("function", ["loss", "linear_logp"])
def test_a_frozen_heads_gradient_of_a_gradient_is_refused(function, traced):
    """What is made ahead is a constant, whose gradient would be a 0."""
    hidden, weight = torch.randn(4, 8), torch.randn(12, 8)
    target_ids, advantages = torch.randint(12, (4,)), torch.ones(4)

    def value(hidden):
        if function == "loss":
            return fused_egrsd_loss(hidden, weight, hidden.detach(), target_ids, advantages)
        return linear_logp(hidden, weight, target_ids).sum()

    with pytest.raises(RuntimeError, match="differentiable once only"):
        if traced:
            torch.func.grad(lambda x: torch.func.grad(value)(x).sum() + x.sum())(hidden)
        else:
            hidden.requires_grad_()
            (gradient,) = torch.autograd.grad(value(hidden), hidden, create_graph=True)
            (gradient.sum() + hidden.sum()).backward()


@few_combos
def test_a_graph_of_a_squared_loss_differentiates_once(combo):
    case, leaves = with_leaves(make_case(combo, lengths=(3, 3)))
    loss = fused_egrsd_loss(**case, backend=combo.backend)
    (gradient,) = torch.autograd.grad(loss, leaves["student_hidden"], retain_graph=True)
    (squared,) = torch.autograd.grad(loss.square(), leaves["student_hidden"])
    assert_gradient("hidden", squared, 2 * loss.item() * gradient.double(), with_more_rounding(combo))


@few_combos
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(combo, mode):
    case, _ = with_leaves(make_case(combo, bias=True))
    want = package_result(case, combo)
    with mode():
        loss, stats = fused_egrsd_loss(**case, backend=combo.backend, return_stats=True)
        logp = linear_logp(case["student_hidden"], case["student_weight"], case["target_ids"], backend=combo.backend)
    assert not loss.requires_grad and not logp.requires_grad
    torch.testing.assert_close(loss.cpu(), want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.token_advantage.cpu(), want.stats.token_advantage, rtol=2e-5, atol=1e-5)


@all_combos
@pytest.mark.parametrize("learned", [(), LEARNED[:1], LEARNED[1:2], LEARNED[2:], LEARNED[:2], LEARNED[1:]])
def test_only_what_requires_a_gradient_gets_one(combo, learned):
    """A frozen head, as under LoRA, gets None; and the other gradients do not depend on it."""
    if combo.interpreted and combo.dtype == torch.float16 and len(learned) != 1:
        pytest.skip("float32 shows it")
    case = make_case(combo, bias=True, lengths=(4, 4))
    want = package_result(case, combo)
    leaves = {k: case[k].clone().requires_grad_(k in learned) for k in LEARNED}
    loss = fused_egrsd_loss(**{**case, **leaves}, backend=combo.backend)
    assert loss.requires_grad == bool(learned)
    if learned:
        loss.backward()
    for name, x in leaves.items():
        if name in learned:
            assert torch.equal(x.grad.cpu(), want.gradients[name])
        else:
            assert x.grad is None


@few_combos
def test_gradient_accumulation(combo):
    """Micro-batches with the whole batch's normaliser and entropy scale add up to the batch, in .grad that exists."""
    case = make_case(combo, lengths=(5,) * 4, bias=True, entropy_scale=3.0, mask="holes", lookahead=1)
    case["normalizer"] = case["mask"].sum()
    want = reference_result(case)
    whole = {k: case[k].clone().requires_grad_() for k in LEARNED}
    start = {k: torch.ones_like(x) for k, x in whole.items()}
    for name, x in whole.items():
        x.grad = start[name].clone()
    losses = []
    for half in (slice(0, 3), slice(3, 4)):
        cut = {k: case[k][half] for k in ("teacher_hidden", "target_ids", "advantages", "mask")}
        cut["student_hidden"] = whole["student_hidden"][half]
        loss = fused_egrsd_loss(**{**case, **whole, **cut}, backend=combo.backend)
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(want.loss.item(), rel=1e-5, abs=1e-6)
    for name, x in whole.items():
        if combo.dtype == torch.float32:  # 1 + gradient in bfloat16 would show nothing
            assert_gradient(name, x.grad - start[name], want.gradients[name], 1e-4)
        else:
            assert not torch.equal(x.grad, start[name])


@few_combos
def test_compile(combo):
    case, leaves = with_leaves(make_case(combo, bias=True, lookahead=2))

    def step(hidden, weight, bias):
        tensors = {"student_hidden": hidden.tanh() * 3, "student_weight": weight, "student_bias": bias}
        return fused_egrsd_loss(**{**case, **tensors}, backend=combo.backend) * 2 + 1

    eager = step(*leaves.values())
    compiled = torch.compile(step, backend="eager")(*leaves.values())
    assert torch.equal(eager, compiled)
    for x, y in zip(*(torch.autograd.grad(z, [*leaves.values()]) for z in (eager, compiled)), strict=True):
        assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------------ tracing


def checked(hidden, ids, mask, advantages, logp, entropy, scale, lengths, attention, positions):
    """Everything that looks at values, on values that are wrong."""
    checks.hidden_states("hidden", hidden)
    flat, valid = checks.targets(ids, hidden, 7, mask)
    per_token = checks.token_advantages(advantages, hidden, valid, checks.sequences(None, hidden))
    statistics = checks.teacher_statistic("teacher_logp", logp, ids, valid, "of the test")
    statistics = statistics + checks.teacher_statistic("teacher_entropy", entropy, ids, valid, "of the test")
    scale = checks.scalar("normalizer", scale, valid, torch.float32)
    codes = token_regimes(entropy, entropy, mask=mask)
    rewards = length_shaped_reward(mask[:, 0], lengths, 1)
    rows = response_hidden(hidden, positions)
    where = response_positions(attention, lengths, 2)
    return sum(x.sum() for x in (flat, per_token, statistics, scale, codes, rewards, rows, where))


def wrong_values() -> list[torch.Tensor]:
    twos = torch.full((2, 4), 2)
    return [
        torch.zeros(2, 4, 5), torch.full((2, 4), 99), twos, torch.tensor([math.inf, 1.0]), torch.ones(2, 4),
        -torch.ones(2, 4), torch.tensor(-1.0), torch.tensor([2, 3]), twos, torch.tensor([[1, 2], [0, 3]]),
    ]  # fmt: skip


def in_fake_mode():
    with FakeTensorMode() as mode:
        return checked(*(mode.from_tensor(x) for x in wrong_values()))


class Checked(torch.nn.Module):
    def forward(self, *arguments):
        return checked(*arguments)


@pytest.mark.parametrize(
    "trace",
    [
        in_fake_mode,
        lambda: make_fx(checked)(*wrong_values()),
        lambda: make_fx(checked, tracing_mode="fake")(*wrong_values()),
        lambda: torch.export.export(Checked(), tuple(wrong_values())),
        lambda: torch.compile(checked, backend="eager", fullgraph=True)(*wrong_values()),
        lambda: torch.compile(checked, backend="aot_eager", fullgraph=True)(*wrong_values()),
        lambda: torch.func.functionalize(checked)(*wrong_values()),
        lambda: torch.func.vmap(checked)(*(torch.stack([x, x]) for x in wrong_values())),
        lambda: torch.func.vmap(lambda hidden: checked(hidden, *wrong_values()[1:]))(torch.zeros(3, 2, 4, 5)),
        lambda: torch.func.grad(lambda hidden: checked(hidden, *wrong_values()[1:]))(wrong_values()[0]),
    ],
    ids=["fake", "make_fx", "make_fx fake", "export", "compile", "aot", "functionalize", "vmap", "one of vmap", "grad"],
)
@pytest.mark.parametrize("asked", [False, True])
def test_no_value_is_looked_at_while_tracing(trace, asked, monkeypatch):
    """What depends on values has no answer there; afterwards values are checked again."""
    if asked:
        monkeypatch.setenv("EGRSD_KERNELS_CHECK", "1")
    trace()
    with pytest.raises(ValueError, match=r"^mask: expected only 0 and 1"):
        checked(*wrong_values())


def test_where_values_are_looked_at(monkeypatch):
    monkeypatch.delenv("EGRSD_KERNELS_CHECK", raising=False)
    real = torch.ones(3)
    fake = FakeTensorMode().from_tensor(real)
    assert checks.values_checked(real) and not checks.values_checked(fake)
    assert not checks.values_checked(real.to("meta"))
    with FakeTensorMode():
        assert not checks.values_checked(real)
        fake_on_gpu = torch.empty(3, device="cuda")
    assert not checks.values_checked(fake_on_gpu)
    monkeypatch.setenv("EGRSD_KERNELS_CHECK", "1")
    assert checks.values_checked(real)
    assert not any(checks.values_checked(x) for x in (fake, fake_on_gpu, real.to("meta")))
    inside = []
    torch.func.vmap(lambda x: inside.append([checks.values_checked(x), checks.values_checked(real)]) or x)(real)
    torch.func.grad(lambda x: inside.append([checks.values_checked(x), checks.values_checked(real)]) or x.sum())(real)
    assert inside == [[False, False]] * 2
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # a mode that traces nothing
        assert checks.values_checked(real)


@few_combos
def test_gradients_do_not_share_memory_with_inputs(combo):
    """Neither inputs nor results change when the gradients are scaled in place afterwards, as clipping does."""
    case, leaves = with_leaves(make_case(combo, bias=True))
    before = {k: x.detach().clone() for k, x in leaves.items()}
    loss, stats = fused_egrsd_loss(**case, backend=combo.backend, return_stats=True)
    loss.backward()
    kept = [loss.detach().clone(), *(x.clone() for x in stats)]
    for x in leaves.values():
        x.grad.mul_(0)
    assert all(torch.equal(leaves[k], before[k]) for k in leaves)
    assert all(torch.equal(x, y) for x, y in zip([loss.detach(), *stats], kept, strict=True))


# ------------------------------------------------------------------------------------------------ a real model


@pytest.mark.parametrize("combo", [CPU_COMBOS[1], CUDA_COMBOS[2]])
@pytest.mark.parametrize("tied", [True, False])
def test_one_step_of_a_qwen3(combo, tied):
    """A Qwen3 with its own head, student and teacher contexts of different length: as from full logits in float64.

    Tolerance: the model itself runs in float32, a few hundred operations deep; 1e-4 of each parameter's gradient.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = transformers.Qwen3ForCausalLM(config).to(combo.device)
    exact = copy.deepcopy(model).cpu().double()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    prompt, solution, response = torch.randint(97, (2, 5)), torch.randint(97, (2, 7)), torch.randint(97, (2, 9))
    advantages = torch.tensor([0.8, -0.6])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False

    def hidden_of(model, *context):
        ids = torch.cat([*context, response], 1).to(model.device)
        return model.model(ids).last_hidden_state[:, -10:-1]

    def loss_of(model, function, **options):
        with torch.no_grad():
            teacher = hidden_of(model, prompt, solution)
        return function(
            hidden_of(model, prompt),
            model.lm_head.weight,
            teacher,
            response.to(model.device),
            advantages.to(model.device),
            mask=mask.to(model.device),
            lookahead=3,
            **options,
        )

    loss = loss_of(model, fused_egrsd_loss, backend=combo.backend)
    want = loss_of(exact, egrsd_loss, dtype=torch.float64)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    for each, value in ((model, loss), (exact, want)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        value.backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert_gradient(name, p.grad, q.grad, 1e-4)
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-4, atol=1e-5)
    after = loss_of(model, fused_egrsd_loss, backend=combo.backend)
    assert after.item() == pytest.approx(loss_of(exact, egrsd_loss, dtype=torch.float64).item(), rel=1e-3)
    assert after < loss


# ------------------------------------------------------------------------------------------------ on the GPU


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_gpu_is_never_waited_for(backend, layout):
    combo = Combo(backend, "cuda", torch.bfloat16)
    case, leaves = with_leaves(
        make_case(combo, layout=layout, lengths=(40, 40, 40), bias=True, mask="holes", lookahead=3, width=64)
    )
    case["normalizer"] = case["mask"].sum()
    scale = torch.tensor(2.0, device="cuda")

    def step():
        loss, _ = fused_egrsd_loss(**case, backend=backend, return_stats=True)
        loss = loss + fused_egrsd_loss(**case, backend=backend, entropy_scale=scale, chunk_bytes=1 << 14)
        logp = linear_logp(*(leaves[k] for k in LEARNED[:2]), case["target_ids"], backend=backend)
        token_statistics(case["student_hidden"], case["student_weight"], case["target_ids"], backend=backend)
        (loss + logp.mean()).backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("frozen_head", [True, False])
def test_memory(backend, frozen_head):
    """Above the inputs: the gradients, at most chunk_bytes of logits, and working buffers that N does not change.

    Those are: partial sums of the vocabulary pass and of the split products (up to 80 MiB on 132 multiprocessors) for
    Triton; a block of the head in float32 and its product (64 MiB each) for PyTorch. Full logits would be 256 MiB in
    bfloat16 and 512 MiB in float32, several times over.
    """
    combo, mib = Combo(backend, "cuda", torch.bfloat16), 1 << 20
    n, width, vocabulary, chunk_bytes = 4096, 512, 32768, 32 << 20
    case, leaves = with_leaves(make_case(combo, lengths=(512,) * 8, width=width, vocabulary=vocabulary))
    leaves["student_weight"].requires_grad_(not frozen_head)

    def step():
        for x in leaves.values():
            x.grad = None
        fused_egrsd_loss(**case, backend=backend, lookahead=3, chunk_bytes=chunk_bytes).backward()

    step()
    for x in leaves.values():
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    head_gradient = 0 if frozen_head else vocabulary * width * (4 + 2)
    allowed = n * width * 2 + head_gradient + chunk_bytes + 128 * mib
    print(f"{backend}: peak {peak / mib:.0f} MiB above the inputs, allowed {allowed / mib:.0f} MiB")
    assert peak <= allowed


@pytest.mark.cuda
@two_gpus
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_second_gpu(backend):
    combo = Combo(backend, "cuda:1", torch.bfloat16)
    assert torch.cuda.current_device() == 0
    check_parity(make_case(combo, bias=True, lookahead=2), combo)
    case = make_case(combo)
    logp = linear_logp(case["student_hidden"], case["student_weight"], case["target_ids"], backend=backend)
    out = token_statistics(case["student_hidden"], case["student_weight"], case["target_ids"], backend=backend)
    assert torch.equal(logp, out.logp) and out.entropy.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
