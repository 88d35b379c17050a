import html.parser
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels import TokenStats
from egrsd_kernels.report import Rollout, write_token_report

EVIL = "<script>alert('x')</script>\"'&{{cards}}{{title}}\\1"


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, and the text inside each token."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tokens: list[tuple[list[str], list[str], str]] = []  # classes, numbers, text
        self.text = ""
        self._open = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if self._open:
            self._open += tag != "br"
        elif "data-v" in attributes:
            self._open = 1
            self.tokens.append((attributes["class"].split(), json.loads(attributes["data-v"]), ""))

    def handle_endtag(self, tag):
        self._open -= bool(self._open)

    def handle_data(self, data):
        self.text += data
        if self._open:
            classes, numbers, text = self.tokens[-1]
            self.tokens[-1] = (classes, numbers, text + data)


def rollout(tokens, **fields) -> Rollout:
    numbers = {
        name: [0.5] * len(tokens)
        for name in ("entropy", "lookahead_entropy", "gate", "magnitude", "log_ratio", "token_advantage")
    }
    return Rollout(**{"prompt": "1+1", "tokens": tokens, "reward": 1.25, "advantage": -0.5, **numbers, **fields})


def write(path, *rollouts, **options) -> tuple[str, Page]:
    text = write_token_report(path / "page.html", rollouts, **{"vocab_size": 100, **options}).read_text("utf-8")
    return text, Page(text)


def test_every_text_is_escaped(tmp_path):
    evil = rollout(["a", EVIL], prompt=EVIL, reference=EVIL, title=EVIL)
    text, page = write(tmp_path, evil, title=EVIL)
    plain, _ = write(tmp_path, rollout(["a", "b"], reference="r", title="t"))
    assert "<script>alert" not in text
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script"]
    assert text.count("<") == plain.count("<")  # no text has become markup
    assert page.tokens[1][2] == EVIL
    assert page.text.count(EVIL) == 6  # page title, heading, prompt, reference, rollout title, token


def test_loads_nothing(tmp_path):
    text, page = write(tmp_path, rollout(["a"], reference="b"))
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "{{" not in text and "}}" not in text


def test_tokens_carry_regime_and_numbers(tmp_path):
    top = math.log(100)
    sequences = {
        "entropy": [0.005 * top, 0.5 * top, 0.5 * top, 0.1 * top],
        "lookahead_entropy": [0.0, 0.4 * top, 0.005 * top, 0.1 * top],
        "gate": [1.0, 0.25, 0.9, 0.8],
        "magnitude": [0.8, 1.2, 1.0, 1.1],
        "log_ratio": [-1.5, 2.0, 0.0, 0.125],
        "token_advantage": [-0.75, 0.5, 0.25, 0.0],
    }
    _, page = write(tmp_path, rollout(list("abcd"), **sequences))
    assert [classes[1] for classes, _, _ in page.tokens] == ["lock", "fork", "pivot", "mid"]
    assert ["minus" in classes for classes, _, _ in page.tokens] == [True, False, False, False]
    for index, (_, numbers, text) in enumerate(page.tokens):
        assert text == "abcd"[index]
        assert [float(number) for number in numbers] == pytest.approx(
            [values[index] for values in sequences.values()], abs=1e-4
        )
    assert page.text.count("25%") == 4  # the legend's shares
    assert "reward 1.25" in page.text and "advantage −0.50" in page.text


def test_colours_span_the_page(tmp_path):
    first = rollout(["a", "b"], entropy=[0.0, 2.0], gate=[1.0, 0.5], token_advantage=[-4.0, 1.0])
    _, page = write(tmp_path, first, rollout(["c"], entropy=[1.0], gate=[0.75], token_advantage=[2.0]))
    styles = [attributes["style"] for _, attributes in page.tags if "data-v" in attributes]
    assert styles == ["--h:0.000;--g:0.000;--a:1.000", "--h:1.000;--g:1.000;--a:0.250", "--h:0.500;--g:0.500;--a:0.500"]


def test_blanks_and_control_characters_are_visible(tmp_path):
    text, page = write(tmp_path, rollout([" a", "\n\n", "\t", "", "\x00\u202e\ud800\xa0", "é漢"]))
    assert [token for *_, token in page.tokens] == ["·a", "↵↵", "⇥", "∅", "U+0000U+202EU+D800U+00A0", "é漢"]
    assert text.count("<br>") == 2


@given(st.lists(st.text(max_size=5), max_size=6), st.floats(allow_nan=True, allow_infinity=True))
def test_any_text_and_any_number(tmp_path_factory, tokens, value):
    count = len(tokens)
    numbers = {"entropy": [value] * count, "gate": [value] * count, "token_advantage": [value] * count}
    text, page = write(tmp_path_factory.mktemp("report"), rollout(tokens, **numbers))
    assert len(page.tokens) == count
    shares = re.findall(r"--[hga]:([^;\"]*)", text)
    assert all(0.0 <= float(share) <= 1.0 for share in shares if not share.startswith(" "))


def test_from_stats_takes_the_response_of_its_row():
    fields = {name: torch.arange(10.0).view(2, 5) + 10 * index for index, name in enumerate(TokenStats._fields)}
    one = Rollout.from_stats(
        TokenStats(**fields), 1, prompt="p", tokens=["a", "b", "c"], reward=1.0, advantage=0.5, title="step 3"
    )
    assert one.entropy == [25.0, 26.0, 27.0]
    assert one.lookahead_entropy == [35.0, 36.0, 37.0]
    assert one.magnitude == [45.0, 46.0, 47.0]
    assert one.gate == [55.0, 56.0, 57.0]
    assert one.token_advantage == [65.0, 66.0, 67.0]
    assert one.log_ratio == [10.0, 10.0, 10.0]  # teacher's log p minus the student's
    assert (one.title, one.reference) == ("step 3", None)


def test_bad_input_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match=r"^gate"):
        rollout(["a"], gate=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"^rollouts"):
        write_token_report(tmp_path / "x.html", [], vocab_size=10)
    with pytest.raises(ValueError, match=r"^vocab_size"):
        write_token_report(tmp_path / "x.html", [rollout(["a"])], vocab_size=1)
    assert not list(tmp_path.iterdir())
