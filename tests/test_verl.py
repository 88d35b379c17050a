"""verl's ``linear_cross_entropy`` by our kernels: what it returns, where it gets to, and verl's code on top of it."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from egrsd_kernels.verl import fuse_heads, linear_cross_entropy, unfuse_heads
from tests.support.devices import CPU_COMBOS, CUDA_COMBOS
from tests.support.tolerances import assert_within, relative_error
from tests.test_linear_entropy import exact, incoming_of
from tests.test_linear_logp import make_operands

MODULE = "verl.utils.kernel.linear_cross_entropy"
# The backend is the one that is chosen for the device.
combos = pytest.mark.parametrize("combo", CPU_COMBOS[:3] + CUDA_COMBOS[:3])
# Files of the same names as verl's: it is called by an autograd function's `apply`, which two callers import, one when
# it is loaded and one when it is called.
STAND_IN = {
    "verl/utils/kernel/linear_cross_entropy.py": """
import torch

class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        return torch.full((1,), temperature), torch.full((1,), dist_process_group is not None)

linear_cross_entropy = LinearCrossEntropy.apply
""",
    "verl/models/mcore/model_forward_fused.py": """
from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

def forward(*args):
    return linear_cross_entropy(*args)
""",
    "verl/models/transformers/dense_common.py": """
def forward(*args):
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    return linear_cross_entropy(*args)
""",
}
CALLERS = ("verl.models.mcore.model_forward_fused", "verl.models.transformers.dense_common")


def take_out() -> dict[str, ModuleType]:
    """verl's modules, which are loaded no longer."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "verl"}


@pytest.fixture
def none_loaded():
    """No module of verl is there when a test begins, and those from before are there again when it is over."""
    before = take_out()
    yield
    take_out()
    sys.modules.update(before)


@pytest.fixture
def stand_in(none_loaded, tmp_path, monkeypatch) -> Path:
    for name, text in STAND_IN.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def loaded(name: str) -> ModuleType:
    return importlib.import_module(name)


def small(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    return hidden, weight, torch.randint(11, (5,), generator=generator)


# ------------------------------------------------------------------------------------------------- what it returns


@combos
@pytest.mark.parametrize("shape", [(7,), (1, 9), (3, 5)], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_values_and_both_gradients(combo, shape, frozen):
    operands, labels, _ = make_operands(combo, *shape, width=24, vocabulary=130)
    leaves = {k: x.clone().requires_grad_(k == "hidden" or not frozen) for k, x in operands.items()}
    logp, entropy = linear_cross_entropy(leaves["hidden"], leaves["weight"], labels, 0.7, "none", None)
    assert logp.shape == entropy.shape == (labels.numel(),)
    assert logp.dtype == entropy.dtype == combo.compute_dtype
    incoming = incoming_of(combo, shape)
    torch.autograd.backward([logp, entropy], [x.flatten() for x in incoming])
    want_logp, want_entropy, gradients, widths, bounds = exact(combo, operands, labels, incoming, True, temperature=0.7)
    assert_within("log p", logp, want_logp.flatten(), widths[0].flatten())
    assert_within("entropy", entropy, want_entropy.flatten(), widths[1].flatten())
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert leaf.grad.dtype == operands[name].dtype
            assert_within(f"gradient of {name}", leaf.grad, gradients[name], bounds[name])


@combos
@pytest.mark.parametrize("reduction, of", [("sum", torch.sum), ("Mean", torch.mean)])
def test_reductions_are_of_log_p_alone(combo, reduction, of):
    operands, labels, _ = make_operands(combo, 2, 3)
    hidden = operands["hidden"].requires_grad_()
    rows, entropies = linear_cross_entropy(hidden, operands["weight"], labels)
    logp, entropy = linear_cross_entropy(hidden, operands["weight"], labels, reduction=reduction)
    assert logp.ndim == 0 and torch.equal(logp, of(rows)) and torch.equal(entropy, entropies)
    assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (logp, of(rows))))


def test_megatrons_layout():
    """Its hidden states are (T, 1, D), its labels (1, T)."""
    hidden, weight, labels = small()
    want = linear_cross_entropy(hidden, weight, labels)
    got = linear_cross_entropy(hidden[:, None], weight, labels[None])
    assert all(map(torch.equal, got, want))


def test_without_gradients_nothing_is_kept():
    hidden, weight, labels = small()
    with torch.no_grad():
        assert not any(x.requires_grad for x in linear_cross_entropy(hidden, weight.requires_grad_(), labels))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"reduction": "max"}, ValueError, "reduction: expected 'none' or 'sum' or 'mean', got 'max'"),
        ({"reduction": None}, TypeError, "reduction: expected a string, got None"),
        (
            {"labels": torch.zeros(4, dtype=torch.long)},
            ValueError,
            "labels: expected 5, one for each hidden state, got",
        ),
        ({"labels": [0] * 5}, TypeError, "labels: expected an integer tensor, got"),
        ({"labels": torch.zeros(5)}, TypeError, "labels: expected an integer tensor, got"),
        ({"temperature": 0.0}, ValueError, "temperature: expected"),
        ({"weight": torch.zeros(11, 9)}, ValueError, "weight: expected"),
    ],
    ids=["reduction", "no reduction", "too few labels", "a list", "no integers", "temperature", "width"],
)
def test_errors_are_one_line(change, error, message):
    arguments = dict(zip(("hidden", "weight", "labels"), small(), strict=True)) | change
    with pytest.raises(error) as raised:
        linear_cross_entropy(**arguments)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------- where it gets to


@pytest.mark.parametrize("before", [False, True], ids=["then loaded", "loaded before"])
def test_every_caller_is_reached_and_given_back(stand_in, before):
    if before:
        originals = [loaded(name).forward(*small(), 2.0, "none") for name in CALLERS]
        assert [float(x) for x, _ in originals] == [2, 2]
    original = loaded(MODULE).linear_cross_entropy
    want = linear_cross_entropy(*small(), 2.0)
    for _ in range(2):
        fuse_heads()
        for name in CALLERS:
            assert all(map(torch.equal, loaded(name).forward(*small(), 2.0, "none"), want))
    for _ in range(2):
        unfuse_heads()
        assert loaded(MODULE).linear_cross_entropy is original
        assert [float(loaded(name).forward(*small(), 2.0, "none")[0]) for name in CALLERS] == [2, 2]
    with fuse_heads():
        assert all(map(torch.equal, loaded(CALLERS[0]).forward(*small(), 2.0, "none"), want))
        with fuse_heads():  # which has changed nothing
            pass
        assert loaded(MODULE).linear_cross_entropy is not original
    assert loaded(MODULE).linear_cross_entropy is original


def test_a_head_that_is_split_over_processes_is_left_to_verl(stand_in):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    fuse_heads()
    forward = loaded(CALLERS[0]).forward
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        temperature, given = forward(*small(), 2.0, "none", dist.group.WORLD)
        assert temperature == 2 and given == 1
        one = forward(*small(), 2.0, "none", dist.new_group([0]))
        assert all(map(torch.equal, one, linear_cross_entropy(*small(), 2.0)))
        with pytest.raises(ValueError, match="dist_process_group: expected one process at most, got <"):
            linear_cross_entropy(*small(), dist_process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "module, fused",
    [("egrsd_kernels.verl", False), ("egrsd_kernels.verl.external_lib", True)],
    ids=["plain", "external"],
)
def test_only_the_external_lib_fuses_on_import(stand_in, module, fused):
    program = f"import {module}, {MODULE} as m; print('egrsd_kernels' in m.linear_cross_entropy.__module__)"
    path = f"{stand_in}:{Path(__file__).parents[1]}"
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == f"{fused}\n", done.stderr


@pytest.mark.parametrize("there", [[], ["verl/__init__.py"], ["verl/__init__.py", "verl/utils/__init__.py"]], ids=str)
def test_without_verl_the_message_says_so(none_loaded, tmp_path, monkeypatch, there):
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    elsewhere = [path for path in sys.path if not (Path(path) / "verl").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for function in (fuse_heads, unfuse_heads):
        with pytest.raises(ModuleNotFoundError, match=rf"^egrsd_kernels.verl needs verl with {MODULE}, as .* no verl"):
            function()


def test_what_verl_misses_itself_is_named(stand_in):
    (stand_in / "verl/utils/__init__.py").write_text("import omegaconf_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'omegaconf_that_is_not_there'$"):
        fuse_heads()


# ------------------------------------------------------------------------------------------------- inside verl


@pytest.fixture
def verl(none_loaded):
    """verl's own files, of an installed one. Its packages want Ray and more on import, so they are empty here."""
    found = importlib.util.find_spec("verl")
    if found is None:
        pytest.skip("needs verl 0.9.1: make test-verl")
    (root,) = found.submodule_search_locations
    for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.models", "verl.models.transformers"):
        package = ModuleType(name)
        package.__path__ = [str(Path(root).parent.joinpath(*name.split(".")))]
        sys.modules[name] = package
    yield
    unfuse_heads()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_models_forward_is_verls_own(verl, dtype):
    """By all of verl's way to it, against what it computes with full logits in chunks: ``impl_backend=torch``."""
    from tests.support.trl_tiny import tiny_model

    sys.modules.pop("egrsd_kernels.verl.external_lib", None)
    loaded("verl.utils.import_utils").import_external_libs("egrsd_kernels.verl.external_lib")
    patch = loaded("verl.models.transformers.monkey_patch").patch_forward_with_backends
    incoming = list(torch.randn(2, 19, generator=torch.Generator().manual_seed(1)))
    ids = torch.randint(6, 60, (1, 19), generator=torch.Generator().manual_seed(2))
    logits = tiny_model().to(dtype)(ids).logits.double() / 0.7
    found = {}
    for backend in ("torch", "triton"):
        model = tiny_model().to(dtype)
        model.__class__ = type("Model", (type(model),), {})  # verl patches the class
        patch(model, use_fused_kernels=True, fused_kernels_backend=backend)
        output = model(input_ids=ids, shift_labels=ids.roll(-1, -1), temperature=0.7, return_dict=True)
        # As the FSDP engine reads them, without padding.
        both = output.log_probs.squeeze(0), output.entropy.squeeze(0)
        assert both[0].shape == both[1].shape == (19,) and both[0].dtype == torch.float32
        torch.autograd.backward([x.float() for x in both], incoming)
        found[backend] = both, {k: p.grad for k, p in model.named_parameters()}
    (theirs, their_gradients), (ours, our_gradients) = found.values()
    # Full logits are rounded to the model's dtype twice, before and after the temperature, and log p = z_y - lse. In
    # float32 it is the product of 32 numbers that counts.
    unit = 32 * 2.0**-24 if dtype == torch.float32 else 2.0**-9
    dz, entropy = 2 * unit * logits.abs().max(), ours[1].detach().double()
    assert_within("log p", ours[0], theirs[0], 2 * dz)
    assert_within("entropy", ours[1], theirs[1], (1 + 4 * entropy) * dz + unit * entropy)
    if dtype == torch.float32:  # p is off by dz, and in 16 bits that is too much to say anything
        for name, want in their_gradients.items():
            off = relative_error(our_gradients[name], want)
            assert off <= 1e-5, f"gradient of {name}: off by {off:.1e}"


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_verls_kernel_says_the_same(verl, dtype):
    """Without a reduction: verl's adds those up in memory that nobody has set to 0."""
    theirs = loaded(MODULE).linear_cross_entropy
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 300, 256, generator=generator).to("cuda", dtype)
    weight = (0.2 * torch.randn(2000, 256, generator=generator)).to("cuda", dtype)
    labels = torch.randint(2000, (1, 300), generator=generator).cuda()
    of_logp, of_entropy = torch.randn(2, 300, generator=generator).cuda()
    found = []
    for function in (theirs, linear_cross_entropy):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        both = function(*leaves, labels, 0.7, "none", None)
        torch.autograd.backward(both, [of_logp, of_entropy])
        found.append((both, [x.grad for x in leaves]))
    (their_values, their_gradients), (our_values, our_gradients) = found
    for ours, verls in zip((*our_values, *our_gradients), (*their_values, *their_gradients), strict=True):
        assert ours.dtype == verls.dtype and ours.shape == verls.shape
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10  # float32 products there are TF32
    for ours, verls in zip((*our_values, *our_gradients), (*their_values, *their_gradients), strict=True):
        assert (ours.double() - verls.double()).norm() <= 4 * unit * verls.double().norm()
