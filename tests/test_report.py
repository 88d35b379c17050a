import base64
import hashlib
import html.parser
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from egrsd_kernels import TokenStats
from egrsd_kernels.credit import REGIMES
from egrsd_kernels.rollouts import Rollout, write_token_report

EVIL = "<script>alert('x')</script>\"'&{{cards}}{{title}}\\1"


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with their attributes, the text outside scripts, and the rollouts' data."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.data: list[dict] = []  # the JSON of each rollout, then of the page's scales
        self._script = ""
        self.feed(text)
        *self.cards, self.scales = self.data

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs).get("type", "code") if tag == "script" else ""

    def policy(self) -> str:
        """The one that is read before anything it could hold for."""
        head = [tag for tag, _ in self.tags]
        (index,) = (i for i, (_, a) in enumerate(self.tags) if a.get("http-equiv") == "Content-Security-Policy")
        assert index < min(head.index("style"), head.index("script"), head.index("title"))
        return self.tags[index][1]["content"]

    def handle_endtag(self, tag):
        self._script = ""

    def handle_data(self, data):
        if self._script == "application/json":
            self.data.append(json.loads(data))
        elif not self._script:
            self.text += data


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
    assert [tag for tag, _ in page.tags].count("script") == 3  # the rollout, the scales, the code
    assert text.count("<") == plain.count("<")  # no text has become markup
    assert page.cards[0]["tokens"] == ["a", EVIL]
    assert page.text.count(EVIL) == 5  # page title, heading, prompt, reference, rollout title


def test_loads_nothing(tmp_path):
    text, page = write(tmp_path, rollout(["a"], reference="b"))
    policy = page.policy()
    assert not re.search(r"https?:|//\w|@import|url\(", text.replace(policy, ""))
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"\{\{\w+\}\}", text)  # every placeholder is filled


def test_the_policy_admits_this_style_and_this_script_alone(tmp_path):
    text, page = write(tmp_path, rollout(["a"], reference="b"), title="{{policy}}")
    policy = dict(part.split(" ", 1) for part in page.policy().split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    for tag in ("style", "script"):
        (code,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not any(name.startswith("on") or name == "style" for _, attributes in page.tags for name in attributes)


def test_control_characters_are_seen(tmp_path):
    told = "a\0b\x1b[0m\x7f\tc\nd"
    text, page = write(tmp_path, rollout([told], prompt=told, reference=told, title=told), title=told)
    assert not set(text) & {chr(code) for code in (*range(9), 11, 12, *range(14, 32), 127)}
    assert page.text.count("a␀b␛[0m␡\tc\nd") == 5
    assert page.cards[0]["tokens"] == [told]  # where the script shows U+0000


@pytest.mark.parametrize(
    "reward, shown",
    [(None, "unjudged"), (math.nan, "unjudged"), (torch.tensor(math.nan), "unjudged"), (math.inf, "reward ∞"),
     (-math.inf, "reward −∞"), (-0.5, "reward −0.50")],
)  # fmt: skip
def test_rewards_that_are_no_number(tmp_path, reward, shown):
    text, page = write(tmp_path, rollout(["a"], reward=reward, advantage=math.nan), rollout(["a"], reward=1.5))
    assert f'<span class="pill flat">{shown}</span><span class="pill flat">advantage –</span>' in text
    assert f"2 response tokens, mean reward {'0.50' if reward == -0.5 else '1.50'}." in page.text
    _, page = write(tmp_path, rollout(["a"], reward=reward))
    assert ("1 response token, unjudged." in page.text) == (reward != -0.5)


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
    logp = {"student_logp": [-2.0, -1.0, -0.5, -0.25], "teacher_logp": [-3.5, 1.0, -0.5, -0.125]}
    _, page = write(tmp_path, rollout(list("abcd"), **sequences, **logp))
    (card,) = page.cards
    assert card["tokens"] == list("abcd")
    assert card["regimes"] == "0123"  # lock, fork, pivot, mid
    assert card["thresholds"] == pytest.approx([0.01 * top, 0.17 * top])
    assert card["numbers"] == {name: pytest.approx(values, abs=1e-4) for name, values in {**sequences, **logp}.items()}
    assert page.text.count("25.0%") == 4  # the filter's shares
    assert "reward 1.25" in page.text and "advantage −0.50" in page.text


def test_regimes_follow_each_rollouts_vocabulary(tmp_path):
    small, large = (rollout(["a"], entropy=[1.0], lookahead_entropy=[1.0], vocab_size=size) for size in (10, 1000))
    _, page = write(tmp_path, small, large, rollout(["a"], entropy=[1.0], lookahead_entropy=[1.0]), vocab_size=1000)
    assert [card["regimes"] for card in page.cards] == ["1", "3", "3"]


def test_colours_span_the_page(tmp_path):
    first = rollout(["a", "b"], entropy=[0.0, 2.0], gate=[1.0, 0.5], token_advantage=[-4.0, 1.0])
    _, page = write(tmp_path, first, rollout(["c"], entropy=[1.0], gate=[0.75], token_advantage=[2.0]))
    assert page.scales == {"entropy": 2.0, "gate": 0.5, "advantage": 4.0}


def test_counts(tmp_path):
    text, page = write(tmp_path, rollout(list("abc"), step=7, title="best"), rollout([]))
    assert "2 rollouts, 3 response tokens, mean reward 1.25" in page.text
    assert "step 7 · best" in page.text
    assert [attributes["data-counts"] for _, attributes in page.tags if "data-counts" in attributes] == [
        "0 0 0 3",
        "0 0 0 0",
    ]
    assert re.findall(r'data-regime="(\w+)" data-count="(\d+)"', text) == [
        ("lock", "0"),
        ("fork", "0"),
        ("pivot", "0"),
        ("mid", "3"),
    ]


def test_the_regimes_are_the_methods(tmp_path):
    """A regime that credit.py had more of would be on the page, and would need its look."""
    text, _ = write(tmp_path, rollout(["a"]))
    style, script = text.split("</style>")[0], text.rpartition("<script>")[2]
    for name in REGIMES:
        assert f'<span class="t {name} sample">{name}</span>' in text
        assert f".t.{name} " in style and f".bars .{name} " in style and f"[data-only~={name}])" in style
        assert not re.search(rf"\b{name}\b", script)


def test_opens_with_the_chosen_regimes(tmp_path):
    assert 'data-only="fork pivot"' in write(tmp_path, rollout(["a"]), regimes=["pivot", "fork"])[0]
    assert 'data-only=""' in write(tmp_path, rollout(["a"]))[0]


def test_progress_sees_every_rollout(tmp_path):
    seen = []
    rollouts = [rollout(["a"]), rollout(["b"])]
    write(tmp_path, *rollouts, track=lambda sequence: (seen.append(one) or one for one in sequence))
    assert seen == rollouts


@given(st.lists(st.text(max_size=5), max_size=6), st.floats(allow_nan=True, allow_infinity=True))
def test_any_text_and_any_number(tmp_path_factory, tokens, value):
    count = len(tokens)
    numbers = {"entropy": [value] * count, "gate": [value] * count, "token_advantage": [value] * count}
    _, page = write(tmp_path_factory.mktemp("report"), rollout(tokens, **numbers))
    assert page.cards[0]["tokens"] == tokens
    shown = value if math.isfinite(value) else str(value).replace("-", "−")
    assert all(number == pytest.approx(shown, abs=1e-4) for number in page.cards[0]["numbers"]["gate"])
    assert all(math.isfinite(scale) for scale in page.scales.values())


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
    assert one.student_logp == [5.0, 6.0, 7.0] and one.teacher_logp == [15.0, 16.0, 17.0]
    assert (one.title, one.reference) == ("step 3", None)


def test_bad_input_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match=r"^gate"):
        rollout(["a"], gate=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"^student_logp"):
        rollout(["a"], student_logp=[])
    with pytest.raises(ValueError, match=r"^rollouts"):
        write_token_report(tmp_path / "x.html", [], vocab_size=10)
    with pytest.raises(ValueError, match=r"^vocab_size"):
        write_token_report(tmp_path / "x.html", [rollout(["a"])], vocab_size=1)
    with pytest.raises(ValueError, match=r"^vocab_size"):
        write_token_report(tmp_path / "x.html", [rollout(["a"])])
    with pytest.raises(ValueError, match=r"^regimes.*'lok'"):
        write_token_report(tmp_path / "x.html", [rollout(["a"])], vocab_size=9, regimes=["fork", "lok"])
    with pytest.raises(ValueError, match=r"^tau_low"):
        write_token_report(tmp_path / "x.html", [rollout(["a"])], vocab_size=9, tau_low=0.5)
    assert not list(tmp_path.iterdir())
