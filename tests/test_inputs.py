"""Bad input of every kind: an error that names the argument, what it got and what it expects."""

from __future__ import annotations

import math
import re

import pytest
import torch

from egrsd_kernels import checks, fused_egrsd_loss, linear_logp, token_statistics
from tests.support.cases import make_case
from tests.support.devices import INTERPRETED, Combo, all_combos

CPU = Combo("torch", "cpu", torch.float32)
B, T, N, D, V = 3, 6, 14, 16, 61
NAN = math.nan


def padded(**changes) -> dict:
    return make_case(CPU, lengths=(T,) * B) | {"student_bias": torch.zeros(V)} | changes


def packed(**changes) -> dict:
    return make_case(CPU, layout="packed", lengths=(5, 0, 9)) | changes


def given(**changes) -> dict:
    """With the teacher's statistics instead of its hidden states."""
    return make_case(CPU, lengths=(T,) * B, teacher="statistics") | changes


def zeros(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def with_value(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[-1] = value
    return x


def targets(*shape: int, **kind) -> torch.Tensor:
    return zeros(*shape, **{"dtype": torch.long} | kind)


def bounds(*values: int, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


ones = torch.ones(B, T)

# (arguments, error, name of the argument, what the message says it got, what it says it expects)
BAD = {
    # student_hidden
    "hidden, list": (padded(student_hidden=[[0.0]]), TypeError, "student_hidden", "[[0.0]]", "a tensor"),
    "hidden, None": (padded(student_hidden=None), TypeError, "student_hidden", "None", "a tensor"),
    "hidden, integer": (
        padded(student_hidden=zeros(B, T, D, dtype=torch.int64)),
        TypeError,
        "student_hidden",
        "torch.int64",
        "floating-point",
    ),
    "hidden, 1-d": (padded(student_hidden=zeros(D)), ValueError, "student_hidden", "(16,)", "(B, T, D)"),
    "hidden, 4-d": (padded(student_hidden=zeros(1, B, T, D)), ValueError, "student_hidden", "(1, 3, 6, 16)", "(N, D)"),
    "hidden, D 0": (padded(student_hidden=zeros(B, T, 0)), ValueError, "student_hidden", "(3, 6, 0)", "D > 0"),
    # student_weight, student_bias
    "weight, None": (padded(student_weight=None), TypeError, "student_weight", "None", "a tensor"),
    "weight, 1-d": (padded(student_weight=zeros(D)), ValueError, "student_weight", "(16,)", "(V, D)"),
    "weight, V 0": (padded(student_weight=zeros(0, D)), ValueError, "student_weight", "(0, 16)", "V > 0"),
    "weight, D": (padded(student_weight=zeros(V, D + 1)), ValueError, "student_weight", "(61, 17)", "16"),
    "weight, transposed": (padded(student_weight=zeros(D, V)), ValueError, "student_weight", "(16, 61)", "16"),
    "weight, dtype": (
        padded(student_weight=zeros(V, D, dtype=torch.bfloat16)),
        TypeError,
        "student_weight",
        "torch.bfloat16",
        "torch.float32",
    ),
    "weight, device": (padded(student_weight=zeros(V, D, device="meta")), ValueError, "student_weight", "meta", "cpu"),
    "bias, shape": (padded(student_bias=zeros(V + 1)), ValueError, "student_bias", "(62,)", "(61,)"),
    "bias, integer": (
        padded(student_bias=zeros(V, dtype=torch.int32)),
        TypeError,
        "student_bias",
        "torch.int32",
        "floating-point",
    ),
    "bias, number": (padded(student_bias=0.5), TypeError, "student_bias", "0.5", "a tensor"),
    "bias, device": (padded(student_bias=zeros(V, device="meta")), ValueError, "student_bias", "meta", "cpu"),
    # target_ids
    "targets, list": (padded(target_ids=[[1]]), TypeError, "target_ids", "[[1]]", "a tensor"),
    "targets, flat": (padded(target_ids=targets(B * T)), ValueError, "target_ids", "(18,)", "(3, 6)"),
    "targets, unshifted": (padded(target_ids=targets(B, T + 1)), ValueError, "target_ids", "(3, 7)", "(3, 6)"),
    "targets, float": (padded(target_ids=zeros(B, T)), TypeError, "target_ids", "torch.float32", "integer"),
    "targets, bool": (
        padded(target_ids=zeros(B, T, dtype=torch.bool)),
        TypeError,
        "target_ids",
        "torch.bool",
        "integer",
    ),
    "targets, device": (padded(target_ids=targets(B, T, device="meta")), ValueError, "target_ids", "meta", "cpu"),
    "targets, too large": (padded(target_ids=with_value(targets(B, T), V)), ValueError, "target_ids", "61", "[0, 61)"),
    "targets, negative": (padded(target_ids=with_value(targets(B, T), -1)), ValueError, "target_ids", "-1", "[0, 61)"),
    # mask
    "mask, list": (padded(mask=[1, 0]), TypeError, "mask", "[1, 0]", "a tensor"),
    "mask, shape": (padded(mask=torch.ones(B)), ValueError, "mask", "(3,)", "(3, 6)"),
    "mask, two": (padded(mask=with_value(torch.ones(B, T), 2)), ValueError, "mask", "(3, 6)", "0 and 1"),
    "mask, NaN": (padded(mask=with_value(torch.ones(B, T), NAN)), ValueError, "mask", "(3, 6)", "0 and 1"),
    "mask, complex": (
        padded(mask=zeros(B, T, dtype=torch.complex64)),
        TypeError,
        "mask",
        "torch.complex64",
        "bool or 0/1",
    ),
    "mask, device": (padded(mask=zeros(B, T, device="meta")), ValueError, "mask", "meta", "cpu"),
    # advantages
    "advantages, list": (padded(advantages=[1.0, 2.0, 3.0]), TypeError, "advantages", "[1.0, 2.0, 3.0]", "a tensor"),
    "advantages, integer": (
        padded(advantages=torch.ones(B, dtype=torch.long)),
        TypeError,
        "advantages",
        "torch.int64",
        "floating-point",
    ),
    "advantages, shape": (padded(advantages=zeros(T)), ValueError, "advantages", "(6,)", "(3,)"),
    "advantages, column": (padded(advantages=zeros(B, 1)), ValueError, "advantages", "(3, 1)", "(3, 6)"),
    "advantages, scalar": (padded(advantages=torch.tensor(1.0)), ValueError, "advantages", "()", "(3,)"),
    "advantages, packed": (packed(advantages=zeros(4)), ValueError, "advantages", "(4,)", "(3,)"),
    "advantages, NaN": (padded(advantages=torch.tensor([1.0, NAN, 0.0])), ValueError, "advantages", "(3,)", "no NaN"),
    "advantages, a NaN token": (
        packed(advantages=with_value(zeros(N), NAN)),
        ValueError,
        "advantages",
        "(14,)",
        "no NaN",
    ),
    "advantages, device": (padded(advantages=zeros(B, device="meta")), ValueError, "advantages", "meta", "cpu"),
    "filter": (padded(lookahead_filter="mean"), ValueError, "lookahead_filter", "'mean'", '"minimum"'),
    "filter, None": (padded(lookahead_filter=None), ValueError, "lookahead_filter", "None", '"discounted"'),
    "temperature of a minimum": (padded(lookahead_temperature=0.5), ValueError, "lookahead_temperature", "0.5", "0"),
    "quantile above 1": (
        padded(lookahead_filter="quantile", lookahead_quantile=1.5),
        ValueError,
        "lookahead_quantile",
        "1.5",
        "at least 0 and at most 1",
    ),
    "quantile of a soft minimum": (
        padded(lookahead_filter="softmin", lookahead_quantile=0.5),
        ValueError,
        "lookahead_quantile",
        "0.5",
        'lookahead_filter is "softmin"',
    ),
    "decay of a minimum": (padded(lookahead_decay=0.5), ValueError, "lookahead_decay", "0.5", "1"),
    "decay": (
        padded(lookahead_filter="discounted", lookahead_decay=0),
        ValueError,
        "lookahead_decay",
        "0",
        "above 0 and at most 1",
    ),
    # cu_seqlens
    "boundaries, padded": (padded(cu_seqlens=bounds(0, 6, 12, 18)), ValueError, "cu_seqlens", "(4,)", "None"),
    "boundaries, list": (packed(cu_seqlens=[0, 14]), TypeError, "cu_seqlens", "[0, 14]", "a tensor"),
    "boundaries, float": (
        packed(cu_seqlens=torch.tensor([0.0, 14.0])),
        TypeError,
        "cu_seqlens",
        "torch.float32",
        "int32 or int64",
    ),
    "boundaries, 2-d": (packed(cu_seqlens=bounds(0, 5, 5, 14)[None]), ValueError, "cu_seqlens", "(1, 4)", "(S + 1,)"),
    "boundaries, one": (packed(cu_seqlens=bounds(0)), ValueError, "cu_seqlens", "(1,)", "(S + 1,)"),
    "boundaries, start": (packed(cu_seqlens=bounds(1, 5, 5, 14)), ValueError, "cu_seqlens", "[1, 5, 5, 14]", "0"),
    "boundaries, end": (packed(cu_seqlens=bounds(0, 5, 5, 13)), ValueError, "cu_seqlens", "[0, 5, 5, 13]", "14"),
    "boundaries, past the end": (
        packed(cu_seqlens=bounds(0, 5, 5, 15)),
        ValueError,
        "cu_seqlens",
        "[0, 5, 5, 15]",
        "14",
    ),
    "boundaries, falling": (
        packed(cu_seqlens=bounds(0, 9, 5, 14)),
        ValueError,
        "cu_seqlens",
        "[0, 9, 5, 14]",
        "ascending",
    ),
    "boundaries, device": (
        packed(cu_seqlens=zeros(4, dtype=torch.int32, device="meta")),
        ValueError,
        "cu_seqlens",
        "meta",
        "cpu",
    ),
    # the teacher
    "teacher, list": (padded(teacher_hidden=[1.0]), TypeError, "teacher_hidden", "[1.0]", "a tensor"),
    "teacher, shape": (
        padded(teacher_hidden=zeros(B, T + 1, D)),
        ValueError,
        "teacher_hidden",
        "(3, 7, 16)",
        "(3, 6, 'D')",
    ),
    "teacher, flat": (padded(teacher_hidden=zeros(B * T, D)), ValueError, "teacher_hidden", "(18, 16)", "(3, 6, 'D')"),
    "teacher, integer": (
        padded(teacher_hidden=zeros(B, T, D, dtype=torch.int64)),
        TypeError,
        "teacher_hidden",
        "torch.int64",
        "floating-point",
    ),
    "teacher, device": (
        padded(teacher_hidden=zeros(B, T, D, device="meta")),
        ValueError,
        "teacher_hidden",
        "meta",
        "cpu",
    ),
    "teacher, other D, no head": (padded(teacher_hidden=zeros(B, T, 8)), ValueError, "teacher_hidden", "8)", "size 16"),
    "teacher, other dtype, no head": (
        padded(teacher_hidden=zeros(B, T, D, dtype=torch.float64)),
        TypeError,
        "teacher_hidden",
        "torch.float64",
        "torch.float32",
    ),
    "teacher head, statistics": (
        padded(teacher_hidden=None, teacher_logp=zeros(B, T), teacher_entropy=zeros(B, T), teacher_weight=zeros(V, D)),
        ValueError,
        "teacher_weight",
        "(61, 16)",
        "None",
    ),
    "teacher head, V": (padded(teacher_weight=zeros(V + 1, D)), ValueError, "teacher_weight", "(62, 16)", "61"),
    "teacher head, D": (padded(teacher_weight=zeros(V, D + 1)), ValueError, "teacher_weight", "(61, 17)", "16"),
    "teacher head, 3-d": (padded(teacher_weight=zeros(1, V, D)), ValueError, "teacher_weight", "(1, 61, 16)", "(V, D)"),
    "teacher bias, shape": (padded(teacher_bias=zeros(V - 1)), ValueError, "teacher_bias", "(60,)", "(61,)"),
    "teacher bias, list": (padded(teacher_bias=[0.0] * V), TypeError, "teacher_bias", "[0.0,", "a tensor"),
    "both": (
        padded(teacher_logp=zeros(B, T), teacher_entropy=zeros(B, T)),
        ValueError,
        "teacher_logp",
        "(3, 6)",
        "None",
    ),
    "both, logp": (padded(teacher_logp=zeros(B, T)), ValueError, "teacher_logp", "(3, 6)", "None"),
    "both, entropy": (padded(teacher_entropy=zeros(B, T)), ValueError, "teacher_entropy", "(3, 6)", "None"),
    "neither": (padded(teacher_hidden=None), ValueError, "teacher_logp", "None", "teacher_hidden is None"),
    "only logp": (given(teacher_entropy=None), ValueError, "teacher_entropy", "None", "teacher_hidden is None"),
    "only entropy": (given(teacher_logp=None), ValueError, "teacher_logp", "None", "teacher_hidden is None"),
    "logp, shape": (given(teacher_logp=zeros(B)), ValueError, "teacher_logp", "(3,)", "(3, 6)"),
    "entropy, shape": (given(teacher_entropy=zeros(B, T + 1)), ValueError, "teacher_entropy", "(3, 7)", "(3, 6)"),
    "entropy, number": (given(teacher_entropy=1.0), TypeError, "teacher_entropy", "1.0", "a tensor"),
    "logp, device": (given(teacher_logp=zeros(B, T, device="meta")), ValueError, "teacher_logp", "meta", "cpu"),
    "logp, integer": (
        given(teacher_logp=targets(B, T)),
        TypeError,
        "teacher_logp",
        "torch.int64",
        "floating-point",
    ),
    # what no distribution has
    "advantages, infinite": (
        padded(advantages=torch.tensor([1.0, math.inf, 0.0])),
        ValueError,
        "advantages",
        "inf in a torch.float32 tensor of shape (3,)",
        "no infinity",
    ),
    "logp, positive": (given(teacher_logp=with_value(-ones, 0.1)), ValueError, "teacher_logp", "0.1", "at most 0"),
    "logp, infinite": (given(teacher_logp=with_value(-ones, math.inf)), ValueError, "teacher_logp", "inf", "at most 0"),
    "logp, NaN": (given(teacher_logp=with_value(-ones, NAN)), ValueError, "teacher_logp", "nan", "at most 0"),
    "entropy, negative": (
        given(teacher_entropy=with_value(ones, -0.5)),
        ValueError,
        "teacher_entropy",
        "-0.5",
        "at least 0",
    ),
    "entropy, NaN": (given(teacher_entropy=with_value(ones, NAN)), ValueError, "teacher_entropy", "nan", "finite"),
    "entropy, infinite": (
        given(teacher_entropy=with_value(ones, math.inf)),
        ValueError,
        "teacher_entropy",
        "inf",
        "finite",
    ),
    "bias without a teacher": (given(teacher_bias=zeros(V)), ValueError, "teacher_bias", "(61,)", "None"),
    # as many sequences as tokens
    "ambiguous": (
        packed(cu_seqlens=bounds(0, *[5] * 5, *range(6, 15)), advantages=zeros(N)),
        ValueError,
        "advantages",
        "shape (14,), as many as 14 sequences or 14 tokens",
        "without empty sequences",
    ),
}

SCALARS = {
    "gamma": [(-0.1, ValueError), (NAN, ValueError), (math.inf, ValueError), (True, TypeError), ("0.3", TypeError)],
    "gate_floor": [(-0.1, ValueError), (1.1, ValueError), (None, TypeError), (False, TypeError)],
    "clip_eps": [(-0.2, ValueError), (1.5, ValueError), (NAN, ValueError), (True, TypeError)],
    "lookahead": [(-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError), ("3", TypeError)],
    "entropy_scale": [
        ("max", ValueError),
        (0, ValueError),
        (-1.0, ValueError),
        (NAN, ValueError),
        (None, TypeError),
        (True, TypeError),
        (torch.ones(1), ValueError),
        (torch.tensor(-1.0), ValueError),
        (torch.tensor(NAN), ValueError),
        (torch.tensor(math.inf), ValueError),
        (1e39, ValueError),  # infinite in float32
        (torch.tensor(1e39, dtype=torch.float64), ValueError),
        (torch.tensor(True), TypeError),
    ],
    "min_entropy_scale": [(0.0, ValueError), (-1.0, ValueError), (True, TypeError), ("1", TypeError)],
    "temperature": [(0, ValueError), (-1.0, ValueError), (math.inf, ValueError), (True, TypeError), (None, TypeError)],
    "softcap": [(0.0, ValueError), (-30.0, ValueError), (NAN, ValueError), (True, TypeError), ("30", TypeError)],
    "normalizer": [
        (0, ValueError),
        (-4.0, ValueError),
        (NAN, ValueError),
        (True, TypeError),
        ("tokens", TypeError),
        (torch.ones(2), ValueError),
        (torch.tensor(0), ValueError),
        (torch.tensor(NAN), ValueError),
        (torch.tensor(math.inf), ValueError),
        (1e39, ValueError),
        (torch.tensor(1e39, dtype=torch.float64), ValueError),
        (torch.tensor(True), TypeError),
        (torch.tensor(1j), TypeError),
    ],
    "return_stats": [(1, TypeError), ("yes", TypeError), (None, TypeError), (torch.tensor(True), TypeError)],
    "grad_mode": [("Exact", ValueError), (None, ValueError), (["exact"], ValueError)],
    "data_group": [("world", TypeError), (0, TypeError)],
    "chunk_bytes": [(0, ValueError), (-5, ValueError), (2.0**20, TypeError), (True, TypeError), (None, TypeError)],
    "backend": [("cuda", ValueError), (None, ValueError), (1, ValueError), ("Triton", ValueError)],
}
OF_THE_BUILDING_BLOCKS = ("temperature", "softcap", "chunk_bytes", "backend")


def check_message(error: Exception, name: str, got: str, expected: str) -> None:
    """ "name: expected ..., got ..."; two arguments at fault may share one message."""
    parts = re.fullmatch(r"(?P<names>[\w, ]+): expected (?P<expected>.+), got (?P<got>.+)", str(error), re.DOTALL)
    assert parts, f"not of the form 'name: expected ..., got ...': {error}"
    assert name in re.split(r",\s*", parts["names"]), str(error)
    assert expected in parts["expected"] and got in parts["got"], str(error)


@pytest.mark.parametrize("kind", BAD)
def test_bad_tensors(kind):
    case, error, name, got, expected = BAD[kind]
    with pytest.raises(error) as caught:
        fused_egrsd_loss(**case)
    assert type(caught.value) is error
    check_message(caught.value, name, got, expected)


@pytest.mark.parametrize("name, value, error", [(n, *x) for n, values in SCALARS.items() for x in values], ids=str)
def test_bad_scalars(name, value, error):
    with pytest.raises(error) as caught:
        fused_egrsd_loss(**padded(**{name: value}))
    got = "" if isinstance(value, torch.Tensor) else repr(value)
    check_message(caught.value, name, got, "")


@pytest.mark.parametrize("function", [linear_logp, token_statistics])
@pytest.mark.parametrize("name, value, error", [(n, *x) for n in OF_THE_BUILDING_BLOCKS for x in SCALARS[n]], ids=str)
def test_bad_scalars_of_the_building_blocks(function, name, value, error):
    case = padded()
    with pytest.raises(error) as caught:
        function(case["student_hidden"], case["student_weight"], case["target_ids"], **{name: value})
    check_message(caught.value, name, repr(value), "")


@pytest.mark.parametrize("function", [linear_logp, token_statistics])
@pytest.mark.parametrize(
    "changes, error, got, expected",
    [
        ({"hidden": None}, TypeError, "None", "a tensor"),
        ({"hidden": zeros(B, T, D, dtype=torch.int32)}, TypeError, "torch.int32", "floating-point"),
        ({"hidden": zeros(D)}, ValueError, "(16,)", "(N, D)"),
        ({"weight": zeros(V)}, ValueError, "(61,)", "(V, D)"),
        ({"weight": zeros(V, D + 1)}, ValueError, "(61, 17)", "hidden size of hidden"),
        ({"weight": zeros(V, D, dtype=torch.float64)}, TypeError, "torch.float64", "torch.float32"),
        ({"weight": zeros(V, D, device="meta")}, ValueError, "meta", "cpu"),
        ({"bias": zeros(D)}, ValueError, "(16,)", "(61,)"),
        ({"target_ids": targets(B, T + 1)}, ValueError, "(3, 7)", "(3, 6)"),
        ({"target_ids": zeros(B, T)}, TypeError, "torch.float32", "integer"),
        ({"target_ids": with_value(targets(B, T), V)}, ValueError, "61", "[0, 61)"),
        ({"mask": torch.ones(T)}, ValueError, "(6,)", "(3, 6)"),
        ({"mask": with_value(torch.ones(B, T), 0.5)}, ValueError, "(3, 6)", "0 and 1"),
    ],
    ids=str,
)
def test_bad_tensors_of_the_building_blocks(function, changes, error, got, expected):
    case = padded()
    arguments = {"hidden": case["student_hidden"], "weight": case["student_weight"], "target_ids": case["target_ids"]}
    with pytest.raises(error) as caught:
        function(**arguments | changes)
    check_message(caught.value, next(iter(changes)), got, expected)


@pytest.mark.parametrize("function", ["loss", "linear_logp", "token_statistics"])
def test_triton_with_float64(function):
    case = make_case(Combo("torch", "cpu", torch.float64))
    with pytest.raises(ValueError) as caught:
        if function == "loss":
            fused_egrsd_loss(**case, backend="triton")
        else:
            call = linear_logp if function == "linear_logp" else token_statistics
            call(case["student_hidden"], case["student_weight"], case["target_ids"], backend="triton")
    assert str(caught.value).startswith("backend: ")
    assert "float64" in str(caught.value) and "bfloat16, float16 or float32" in str(caught.value)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes CPU tensors")
def test_triton_with_cpu_tensors():
    with pytest.raises(ValueError, match=r"^backend: .*needs .*GPU.*got .*cpu"):
        fused_egrsd_loss(**padded(), backend="triton")


def test_what_is_masked_is_not_checked():
    """Padding tokens may hold any id; those the loss looks at may not."""
    case = padded(mask=torch.ones(B, T, dtype=torch.bool))
    case["target_ids"] = case["target_ids"].clone()
    case["target_ids"][1, 2] = V + 5
    with pytest.raises(ValueError, match="target_ids"):
        fused_egrsd_loss(**case)
    case["mask"][1, 2] = False
    assert fused_egrsd_loss(**case).isfinite()


STRANGE = {
    "sparse": (lambda x: x.to_sparse(), "a dense tensor", "torch.sparse_coo"),
    "nested": (lambda x: torch.nested.nested_tensor([zeros(2), zeros(3)]), "a dense tensor", "a nested"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([zeros(2), zeros(3)], layout=torch.jagged),
        "a dense tensor",
        "a nested",
    ),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.quint8),
        "a dense tensor",
        "torch.quint8",
    ),
    "string": (lambda x: "abc", "a", "'abc'"),
    "complex": (lambda x: x.to(torch.complex64), "", "torch.complex64"),
    "float8": (lambda x: x.float().to(torch.float8_e4m3fn), "", "torch.float8_e4m3fn"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of quantised and nested tensors
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("precision", ["plain", "autocast"])
def test_tensors_that_no_kernel_takes(kind, precision):
    """One line for every tensor argument; also under autocast, which casts what it is given."""
    change, expected, got = STRANGE[kind]
    cases = [(padded(mask=ones), n) for n in ("student_hidden", "student_weight", "student_bias", "teacher_hidden")]
    cases += [(padded(mask=ones), n) for n in ("target_ids", "advantages", "mask")]
    cases += [(padded(teacher_weight=zeros(V, D)), "teacher_weight"), (packed(), "cu_seqlens")]
    cases += [(given(), n) for n in ("teacher_logp", "teacher_entropy")]
    cases += [(padded(normalizer=torch.tensor(2.0)), "normalizer")]
    for case, name in cases:
        case[name] = change(case[name])
        with pytest.raises(TypeError) as caught, torch.autocast("cpu", enabled=precision == "autocast"):
            fused_egrsd_loss(**case)
        assert "\n" not in str(caught.value)
        wanted = "" if isinstance(case[name], str) and name == "normalizer" else expected
        check_message(caught.value, name, got, wanted)


@pytest.mark.parametrize("name", ["student_hidden", "normalizer", "entropy_scale"])
def test_a_tensor_on_meta(name):
    values = {"student_hidden": zeros(B, T, D, device="meta"), "normalizer": torch.tensor(2.0, device="meta")}
    values["entropy_scale"] = values["normalizer"]
    with pytest.raises(ValueError) as caught:
        fused_egrsd_loss(**padded(**{name: values[name]}))
    check_message(caught.value, name, "on meta", "a tensor that holds values")


def test_a_message_is_one_line_of_reasonable_length():
    with pytest.raises(TypeError) as caught:
        fused_egrsd_loss(**padded(student_hidden=[[0.0] * 1000] * 1000))
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=r"^gamma: expected a finite number at least 0, got 1000.*…$"):
        fused_egrsd_loss(**padded(gamma=10**400))
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError) as caught:
        fused_egrsd_loss(**padded(advantages=numpy.zeros((3, 3))))
    assert "\n" not in str(caught.value)
    check_message(caught.value, "advantages", "array(", "a tensor")


def test_as_many_sequences_as_tokens():
    """One token each: both readings of the advantages are the same. One empty sequence less: no ambiguity either."""
    case = packed(cu_seqlens=bounds(*range(N + 1)), advantages=torch.linspace(-1, 1, N))
    assert fused_egrsd_loss(**case).isfinite()
    with_empty = bounds(0, *[5] * 4, *range(6, 15))  # 13 sequences of 14 tokens
    for count in (N, N - 1):
        assert fused_egrsd_loss(**packed(cu_seqlens=with_empty, advantages=torch.linspace(-1, 1, count))).isfinite()


def test_one_a_token_wins_where_values_cannot_be_seen(monkeypatch):
    monkeypatch.setattr(checks, "values_checked", lambda tensor: False)
    advantages = torch.linspace(-1, 1, N)
    case = packed(cu_seqlens=bounds(0, *[5] * 5, *range(6, 15)), advantages=advantages)
    _, stats = fused_egrsd_loss(**case, return_stats=True)
    assert torch.equal(stats.token_advantage.sign(), advantages.sign())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_rounding_leaves_is_accepted(dtype):
    """z_y - logsumexp(z), in the dtype of logits of up to 50, of tokens with p = 1; and -inf, which a mask leaves."""
    logits = torch.full((18, V), -50.0, dtype=dtype)
    logits[:, 0] = torch.linspace(-50, 50, 18)
    logits[:, 1] = logits[:, 0] - 6
    logp = (logits[:, 0] - logits.float().logsumexp(1).to(dtype)).view(B, T)
    rounding = torch.finfo(dtype).eps * 16
    logp[0, :3] = torch.tensor([rounding, 1e-7, -math.inf])
    entropy = torch.full((B, T), -rounding, dtype=dtype)
    assert fused_egrsd_loss(**given(teacher_logp=logp, teacher_entropy=entropy)).isfinite()
    with pytest.raises(ValueError, match=r"^teacher_logp: .*, got 0\.5"):
        fused_egrsd_loss(**given(teacher_logp=with_value(logp, 0.5), teacher_entropy=entropy))
    with pytest.raises(ValueError, match=r"^teacher_entropy: .*, got -0\.5"):
        fused_egrsd_loss(**given(teacher_logp=logp, teacher_entropy=with_value(entropy, -0.5)))


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_of_the_package_are_accepted(size, dtype):
    """Whatever token_statistics gives of its own inputs, logits of thousands included."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, dtype=dtype), size * torch.randn(V, 32, dtype=dtype)
    target = (hidden.float() @ weight.float().T).argmax(1)
    logp, entropy, _ = token_statistics(hidden, weight, target)
    arguments = {"teacher_logp": logp, "teacher_entropy": entropy}
    assert fused_egrsd_loss(hidden, weight, None, target, torch.ones(64), **arguments).isfinite()


def test_what_is_masked_may_hold_anything():
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[-1, -1] = False
    strange = {"teacher_logp": with_value(-ones, NAN), "teacher_entropy": with_value(ones, -3)}
    strange["advantages"] = with_value(ones, math.inf)
    assert fused_egrsd_loss(**given(mask=mask, **strange)).isfinite()


@pytest.mark.parametrize("dtype", checks.INTEGERS)
def test_every_integer_dtype_is_one_of_ids_and_masks(dtype):
    want = fused_egrsd_loss(**padded(mask=ones.bool()))
    case = padded(mask=ones.to(dtype))
    assert torch.equal(fused_egrsd_loss(**case | {"target_ids": case["target_ids"].to(dtype)}), want)


def test_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")
    case = padded()
    options = {"gamma": 0.5, "lookahead": 2, "temperature": 0.5, "clip_eps": 0.25, "normalizer": 7}
    other = {"gamma": numpy.float32(0.5), "lookahead": numpy.int64(2), "temperature": numpy.float64(0.5)}
    other |= {"clip_eps": numpy.float16(0.25), "normalizer": numpy.int32(7)}
    assert torch.equal(fused_egrsd_loss(**case, **options), fused_egrsd_loss(**case, **other))


# ------------------------------------------------------------------------------------------------ unchecked values


@all_combos
def test_a_target_outside_the_vocabulary_is_nan_where_nobody_checks(combo, monkeypatch):
    """As on a GPU: no read outside the head, log p NaN for that token alone, and a loss that shows it."""
    monkeypatch.delenv("EGRSD_KERNELS_CHECK", raising=False)
    monkeypatch.setattr(checks, "values_checked", lambda tensor: False)
    case = make_case(combo, bias=True, teacher="own head", lookahead=2)
    for bad in (61, -1, 2**31 - 1, -(2**31), 2**40):
        case["target_ids"][1, 3] = bad
        for advantage in (0.5, 0.0):
            case["advantages"][1] = advantage
            hidden = case["student_hidden"].clone().requires_grad_()
            arguments = case | {"student_hidden": hidden}
            loss, stats = fused_egrsd_loss(**arguments, backend=combo.backend, return_stats=True)
            loss.backward()
            assert loss.isnan()
            others = torch.ones(3, 6, dtype=torch.bool, device=combo.device)
            others[1, 3] = False
            for name, x in stats._asdict().items():
                assert x[others].isfinite().all(), name
            assert stats.student_logp[1, 3].isnan() and stats.teacher_logp[1, 3].isnan()
            assert stats.teacher_entropy[1, 3].isfinite()
            assert hidden.grad[others].isfinite().all()
        if combo.interpreted:
            break
    operands = {"hidden": case["student_hidden"], "weight": case["student_weight"], "target_ids": case["target_ids"]}
    for logp in (
        token_statistics(**operands, backend=combo.backend).logp,
        linear_logp(**operands, backend=combo.backend),
    ):
        assert logp[1, 3].isnan() and logp.isnan().sum() == 1


@pytest.mark.cuda
def test_values_on_a_gpu_are_checked_on_request(monkeypatch):
    combo = Combo("triton", "cuda", torch.bfloat16)
    bad = {
        "target_ids": torch.full((B, T), V, device="cuda"),
        "advantages": torch.full((B,), NAN, device="cuda"),
        "mask": torch.full((B, T), 2, device="cuda"),
        "normalizer": torch.tensor(0, device="cuda"),
        "entropy_scale": torch.tensor(-1.0, device="cuda"),
    }
    monkeypatch.delenv("EGRSD_KERNELS_CHECK", raising=False)
    for name, value in bad.items():
        loss = fused_egrsd_loss(**make_case(combo, lengths=(T,) * B) | {name: value})
        assert loss.isnan() or name not in ("target_ids", "advantages")
    monkeypatch.setenv("EGRSD_KERNELS_CHECK", "1")
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
            fused_egrsd_loss(**make_case(combo, lengths=(T,) * B) | {name: value})
    case = make_case(combo, layout="packed", lengths=(5, 9))
    case["cu_seqlens"] = torch.tensor([0, 15, 14], dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected ascending .*, got \[0, 15, 14\]"):
        fused_egrsd_loss(**case)


@pytest.mark.cuda
def test_tensors_on_two_devices():
    combo = Combo("triton", "cuda", torch.bfloat16)
    for name in ("student_weight", "teacher_hidden", "target_ids", "advantages"):
        case = make_case(combo)
        case[name] = case[name].cpu()
        with pytest.raises(ValueError, match=rf"^{name}: expected .*cuda.*, got .*cpu"):
            fused_egrsd_loss(**case)
