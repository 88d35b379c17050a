import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from egrsd_kernels import cli
from egrsd_kernels.rollouts import (
    Rollout,
    append_rollouts,
    find_rollout_files,
    read_rollouts,
    write_rollouts,
    write_token_report,
)
from tests.support import chromium

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--&lt;\\u003c"


def rollout(tokens=("a", " b"), **fields) -> Rollout:
    numbers = {
        name: [0.5] * len(tokens)
        for name in ("entropy", "lookahead_entropy", "gate", "magnitude", "log_ratio", "token_advantage")
    }
    texts = {"prompt": "1+1", "tokens": list(tokens), "reward": 1.25, "advantage": -0.5, "vocab_size": 100}
    return Rollout(**{**texts, **numbers, **fields})


def in_regimes(names: str, **fields) -> Rollout:
    """A rollout with a token for each letter of ``names``: l(ock), f(ork), p(ivot), m(id)."""
    pairs = [{"l": (0.01, 0.0), "f": (2.0, 1.5), "p": (3.0, 0.01), "m": (0.5, 0.25)}[name] for name in names]
    entropy, lookahead = zip(*pairs, strict=True)
    words = [f" {name}{index}" for index, name in enumerate(names)]
    return rollout(words, entropy=list(entropy), lookahead_entropy=list(lookahead), **fields)


# ---------------------------------------------------------------------------------------------------- files of rollouts


def test_what_is_written_is_read(tmp_path):
    full = rollout(
        ["\ud83d", EVIL, "\n", "é漢"],
        student_logp=[-1.0, -2.5, float("-inf"), 0.0],
        teacher_logp=[-0.1, -0.2, -0.3, -0.4],
        log_ratio=[float("inf"), 1 / 3, -1e-9, 0.0],
        reference="r",
        title="t",
        step=3,
    )
    file = tmp_path / "new" / "rollouts.jsonl"
    append_rollouts(file, [full])
    append_rollouts(file, iter([rollout([]), rollout(vocab_size=None)]))
    first, *rest = read_rollouts(file)
    assert first.log_ratio == pytest.approx(full.log_ratio, rel=1e-6)
    assert replace(first, log_ratio=full.log_ratio) == full
    assert rest == [rollout([]), rollout(vocab_size=None)]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "new" / "rollouts.jsonl"
    write_rollouts(file, [rollout(), rollout()])

    def interrupted():
        yield rollout([])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rollouts(file, interrupted())
    assert list(read_rollouts(file)) == [rollout(), rollout()]
    write_rollouts(file, [rollout([])])
    assert list(read_rollouts(file)) == [rollout([])]
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch, method):
    file = tmp_path / "rollouts.jsonl"
    write_rollouts(file, [rollout()])

    def full(path, *_):
        Path(path).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"write_bytes": (Path, method), "replace": (os, method)}[method], full)
    with pytest.raises(OSError, match="No space left"):
        write_rollouts(file, [rollout([])])
    assert list(tmp_path.iterdir()) == [file]
    assert list(read_rollouts(file)) == [rollout()]


def test_a_rollout_that_nothing_judged(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    unjudged = rollout(reward=None, advantage=0.0)
    append_rollouts(file, [unjudged, rollout()])
    assert '"reward":null' in file.read_text().splitlines()[0]
    assert list(read_rollouts(file)) == [unjudged, rollout()]
    page = write_token_report(tmp_path / "page.html", [unjudged, rollout()]).read_text()
    assert '<span class="pill flat">unjudged</span>' in page and ">reward 1.25<" in page
    assert "mean reward 1.25." in page
    page = write_token_report(tmp_path / "page.html", [unjudged]).read_text()
    assert "2 response tokens, unjudged." in page


def test_takes_tensors(tmp_path):
    append_rollouts(tmp_path / "r.jsonl", [rollout(gate=torch.tensor([0.1, 1.0]), reward=torch.tensor(1.25))])
    (read,) = read_rollouts(tmp_path / "r.jsonl")
    assert read.gate == [0.1, 1.0] and read.reward == 1.25


def test_unfinished_last_line(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    append_rollouts(file, [rollout()])
    whole = file.read_bytes()
    file.write_bytes(whole + b"\n" + whole[:-20])  # a killed writer's
    assert len(list(read_rollouts(file))) == 1
    append_rollouts(file, [rollout()])
    assert file.read_bytes() == whole + b"\n" + whole
    file.write_bytes(whole[:-1])  # whole, and only its line break missing
    assert len(list(read_rollouts(file))) == 1
    append_rollouts(file, [rollout(["x" * 200_000])])
    append_rollouts(file, [rollout()])
    assert [len(one.tokens) for one in read_rollouts(file)] == [2, 1, 2]
    file.write_bytes(file.read_bytes()[:-1] + b'\n{"tokens": ["' + b"x" * 200_000)
    append_rollouts(file, [rollout()])
    assert [len(one.tokens) for one in read_rollouts(file)] == [2, 1, 2, 2]


def line(**changes) -> str:
    """A file's line with some fields changed; ``...`` takes one away."""
    fields = {"prompt": "p", "tokens": ["a"], "reward": 1, "advantage": 0.5} | {
        name: [0.5] for name in ("entropy", "lookahead_entropy", "gate", "magnitude", "log_ratio", "token_advantage")
    }
    return json.dumps({name: value for name, value in {**fields, **changes}.items() if value is not ...})


@pytest.mark.parametrize(
    "bad, says",
    [
        ("nonsense", "not JSON in UTF-8"),
        ("[" * 100_000, "not JSON in UTF-8"),
        ("[1]", "expected an object, got an array"),
        (line(gate=...), "gate: missing"),
        (line(prompt=None), "prompt: missing"),
        (line(tokens="a"), "tokens: expected an array, got a string"),
        (line(tokens=[1]), "tokens[0]: expected a string, got a number"),
        (line(entropy=[0.5, 0.5]), "entropy: expected one value for each of the 1 tokens, got 2"),
        (line(teacher_logp=[]), "teacher_logp: expected one value for each of the 1 tokens, got 0"),
        (line(magnitude=["1.0"]), "magnitude[0]: expected a number, got a string"),
        (line(log_ratio=[None]), "log_ratio[0]: expected a number, got null"),
        (line(reward=True), "reward: expected a number, got true or false"),
        (line(advantage=10**400), "advantage: expected a number, got an integer beyond any float"),
        (line(vocab_size=1), "vocab_size: expected an integer of at least 2, got 1"),
        (line(step=1.5), "step: expected an integer of at least 0, got a number"),
        (line(reference=3), "reference: expected a string, got a number"),
    ],
)
def test_bad_line_is_named(tmp_path, capsys, bad, says):
    file = tmp_path / "rollouts.jsonl"
    file.write_text(line() + "\n\n" + bad + "\n" + line() + "\n")
    with pytest.raises(ValueError) as error:
        list(read_rollouts(file))
    assert str(error.value).startswith(f"{file}, line 3: {says}")
    assert cli.main(["inspect", str(file), "--vocab-size", "9"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and f"line 3: {says}" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]  # no page


def test_not_utf8(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: not JSON in UTF-8"):
        list(read_rollouts(tmp_path / "r.jsonl"))


def test_integers_nulls_and_other_fields_are_fine(tmp_path):
    (tmp_path / "r.jsonl").write_text(line(gate=[1], title=None, step=None, mood="good"))
    (read,) = read_rollouts(tmp_path / "r.jsonl")
    assert read.gate == [1.0] and read.title == "" and read.step is None


def test_finds_files_in_order(tmp_path):
    for name in ("rollouts-10.jsonl", "rollouts-9.jsonl", "deep/er/rollouts.jsonl", "other.jsonl", "rollouts.json"):
        append_rollouts(tmp_path / name, [])
    found = [str(path.relative_to(tmp_path)) for path in find_rollout_files(tmp_path)]
    assert found == ["deep/er/rollouts.jsonl", "rollouts-9.jsonl", "rollouts-10.jsonl"]
    assert find_rollout_files(tmp_path / "other.jsonl") == [tmp_path / "other.jsonl"]


# ---------------------------------------------------------------------------------------------------- the command line


def test_page_of_a_run(tmp_path, capsys):
    for rank in range(2):
        append_rollouts(
            tmp_path / f"run/rank{rank}/rollouts.jsonl", [rollout(step=step, title=f"r{rank}") for step in range(20)]
        )
    append_rollouts(tmp_path / "run/rank1/rollouts.jsonl", [rollout(title="no step")])
    assert cli.main(["inspect", str(tmp_path / "run"), "--last", "3", "--regime", "fork"]) == 0
    page = tmp_path / "run" / "rollouts.html"
    assert capsys.readouterr().out == f"{page}: 3 rollouts\n"
    text = page.read_text()
    order = [text.index(f"step {step} · r{rank}") for step, rank in ((18, 1), (19, 0), (19, 1))]
    assert order == sorted(order) and text.count("<article>") == 3 and "<title>run</title>" in text
    assert 'data-only="fork"' in text


def test_page_of_a_file(tmp_path, capsys):
    append_rollouts(tmp_path / "r.jsonl", [rollout(vocab_size=None)])
    assert cli.main(["inspect", str(tmp_path / "r.jsonl")]) == 2
    assert "give --vocab-size" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "r.jsonl"), "--vocab-size", "50", "--title", "<t>"]) == 0
    assert "<title>&lt;t&gt;</title>" in (tmp_path / "r.html").read_text()
    output = tmp_path / "new" / "page.html"
    assert cli.main(["inspect", str(tmp_path / "r.jsonl"), "--vocab-size", "50", "--output", str(output)]) == 0
    assert output.exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["absent"], "absent: no such file or folder"),
        (["."], "no rollouts*.jsonl in this folder or below it"),
        (["empty.jsonl"], "empty.jsonl: no rollouts"),
        (["good.jsonl", "--tau-low", "0.5"], "tau_low: expected less than tau_high"),
        (["good.jsonl", "--vocab-size", "1"], "vocab_size: expected at least 2, got 1"),
        (["good.jsonl", "--output", "empty.jsonl/page.html"], "empty.jsonl"),
        (["good.jsonl", "--last", "0"], "--last: expected at least 1, got 0"),
        (["good.jsonl", "--last", "x"], "--last"),
        (["good.jsonl", "--regime", "fork,mid"], "--regime: invalid choice"),
    ],
)
def test_bad_arguments(tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    append_rollouts("empty.jsonl", [])
    append_rollouts("good.jsonl", [rollout(vocab_size=None if "--vocab-size" in arguments else 9)])
    try:
        status = cli.main(["inspect", *arguments])
    except SystemExit as exited:  # argparse's own errors
        status = exited.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "error: " in last and says in last


def test_runs_as_a_module(tmp_path):
    append_rollouts(tmp_path / "rollouts.jsonl", [rollout()])
    root = Path(cli.__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-m", "egrsd_kernels", "inspect", tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{tmp_path / 'rollouts.html'}: 1 rollout\n"


# ---------------------------------------------------------------------------------------------------- in a browser

HELPERS = """
var articles = [...document.querySelectorAll("article")];
var tokens = number => [...articles[number].querySelectorAll(".tokens .t")];
var built = () => articles.map((_, number) => tokens(number).length);
var fading = number => tokens(number).map(token => getComputedStyle(token).opacity < 1 ? "-" : "x").join("");
var numbers = () => [...tip.querySelectorAll("tr")].map(row => [...row.cells].map(cell => cell.textContent));
var shown = () => document.getElementById("shown").textContent;
var center = target => {
  const box = target.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
};
// What text, trace and tip of a rollout say about the current token.
var state = number => {
  const at = tokens(number).flatMap((token, index) => token.classList.contains("at") ? [index] : []);
  const marker = articles[number].querySelector(".marker");
  return [at, marker.hidden ? null : Number(parseFloat(marker.style.left).toFixed(2)),
    tip.hidden ? null : tip.querySelector("small").textContent];
};
"""
NOTHING = [[], None, None]


def at(index: int, regime: str, of: int = 8) -> list:
    """What ``state`` gives when that token is shown."""
    return [[index], round(100 * (index + 0.5) / of, 2), f"{regime}, token {index + 1} of {of}"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip("no Chromium is installed")
    with chromium.Browser(tmp_path_factory.mktemp("profile")) as one:
        yield one


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    first = replace(
        in_regimes("lfpmlfff"),
        token_advantage=[-1.0, 0.5, 0.25, 0.0, 0.5, 0.5, 0.5, 0.5],
        student_logp=[-1.5] * 8,
        teacher_logp=[-0.125] * 8,
    )
    others = [in_regimes("lm" * 300) for _ in range(39)]
    return write_token_report(tmp_path_factory.mktemp("page") / "page.html", [first, *others])


@pytest.fixture
def opened(browser, page) -> chromium.Browser:
    browser.resize(1200, 900)
    browser.move(0, 0)
    browser.open(page, HELPERS)
    return browser


def test_rollouts_are_built_near_the_screen(opened):
    first = opened.run("return built()")
    assert first[:2] == [8, 600] and first[5:] == [0] * 35
    opened.run("articles[30].scrollIntoView()")
    opened.settle()
    later = opened.run("return built()")
    assert later[30] == 600 and later[10] == later[39] == 0


def test_tokens_are_marked_and_coloured(opened):
    assert opened.run("return tokens(0).map(token => token.className)") == [
        "t lock minus",
        *(f"t {name}" for name in ("fork", "pivot", "mid", "lock", "fork", "fork", "fork")),
    ]
    styles = opened.run("return tokens(0).map(token => token.style.cssText)")
    assert styles[0] == "--h: 0.003; --g: 1.000; --a: 1.000;" and styles[2] == "--h: 1.000; --g: 1.000; --a: 0.250;"
    background = "return getComputedStyle(tokens(0)[2]).backgroundColor"
    by_entropy = opened.run(background)
    opened.click(*opened.run("return center(document.querySelector('[data-to=gate]'))"))
    assert opened.run(background) != by_entropy
    pressed = "return [...document.querySelectorAll('.view button')].map(one => one.getAttribute('aria-pressed'))"
    assert opened.run(pressed) == ["false", "true", "false"]


def test_filter_fades_the_others(opened):
    total = 8 + 39 * 600
    state = "return [fading(0), shown(), articles[0].querySelector('.count').textContent]"
    button = "document.querySelector('[data-regime={}]')"
    assert opened.run(state) == ["x" * 8, f"{total:,} tokens", "8 tokens"]
    forks = ["-x---xxx", f"4 of {total:,} tokens", "4 of 8 tokens"]
    opened.click(*opened.run(f"return center({button.format('fork')})"))
    assert opened.run(state) == forks
    bars = "return [...articles[0].querySelectorAll('.bars path')].map(path => getComputedStyle(path).opacity < 1)"
    assert opened.run(bars) == [True, False, True, True]
    opened.key("Tab")  # from fork to pivot
    opened.key(" ")
    assert opened.run(state) == ["-xx--xxx", f"5 of {total:,} tokens", "5 of 8 tokens"]
    assert opened.run(f"return {button.format('pivot')}.getAttribute('aria-pressed')") == "true"
    opened.key("Enter")
    assert opened.run(state) == forks
    # It holds for what is built later.
    opened.move(0, 0)
    opened.run("articles[30].scrollIntoView()")
    opened.settle()
    assert opened.run("return fading(30)") == "-" * 600
    opened.click(*opened.run(f"return center({button.format('mid')})"))
    assert opened.run("return fading(30)") == "-x" * 300
    opened.click(*opened.run(f"return center({button.format('mid')})"))
    opened.click(*opened.run(f"return center({button.format('fork')})"))
    assert opened.run(state) == ["x" * 8, f"{total:,} tokens", "8 tokens"]


def test_hover_shows_the_numbers(opened):
    assert opened.run("return state(0)") == NOTHING
    opened.move(*opened.run("return center(tokens(0)[1])"))
    assert opened.run("return state(0)") == at(1, "fork")
    assert opened.run("return tip.querySelector('strong').textContent") == "“·f1”"
    assert opened.run("return numbers()") == [
        ["entropy H, nats", "2.0000"],
        ["lookahead Hᶜᴸ, nats", "1.5000"],
        ["gate ω", "0.5000"],
        ["magnitude w", "0.5000"],
        ["token advantage Â", "0.5000"],
        ["log-ratio δ, nats", "0.5000"],
        ["log p student, nats", "−1.5000"],
        ["log p teacher, nats", "−0.1250"],
    ]
    box, token = opened.run("return [tip, tokens(0)[1]].map(one => one.getBoundingClientRect().toJSON())")
    assert box["left"] >= 0 and box["right"] <= 1200 and box["top"] >= token["bottom"] and box["bottom"] <= 900
    opened.run("tokens(1)[0].scrollIntoView({block: 'center'})")
    opened.move(*opened.run("return center(tokens(1)[0])"))
    assert opened.run("return state(0)") == [[], None, "lock, token 1 of 600"]
    assert opened.run("return numbers().length") == 6  # no log p was given
    opened.move(2, 2)
    assert opened.run("return state(1)") == NOTHING


def test_faded_token_under_the_pointer_can_be_read(opened):
    opened.click(*opened.run("return center(document.querySelector('[data-regime=lock]'))"))
    opened.move(*opened.run("return center(tokens(0)[1])"))
    assert opened.run("return fading(0)") == "xx--x---"


def test_trace_and_text_move_together(opened):
    area = opened.run("return articles[0].querySelector('.plot').getBoundingClientRect().toJSON()")
    for share, index, regime in ((0.3, 2, "pivot"), (0.99, 7, "fork"), (0.01, 0, "lock")):
        opened.move(area["left"] + share * area["width"], area["top"] + 20)
        assert opened.run("return state(0)") == at(index, regime)
    # A click brings the token to the screen where the response is long.
    opened.resize(1200, 500)
    opened.run("articles[1].scrollIntoView()")
    opened.settle()
    area = opened.run("return articles[1].querySelector('.plot').getBoundingClientRect().toJSON()")
    spot = area["left"] + 0.901 * area["width"], area["top"] + 20
    opened.move(*spot)
    opened.click(*spot)
    opened.settle()
    top = opened.run("return tokens(1)[540].getBoundingClientRect().top")
    assert 0 < top < 500
    assert opened.run("return state(1)") == at(540, "lock", of=600)


def test_trace_draws_both_curves(opened):
    paths = opened.run(
        "return Object.fromEntries([...articles[0].querySelectorAll('.curves path')]"
        ".map(path => [path.getAttribute('class'), path.getAttribute('d')]))"
    )
    assert paths.keys() == {"under", "high", "ahead", "entropy"}
    # H = 0.01, 2, 3 nats, the largest at 3 of 100; its lookahead 0, 1.5, 0.01.
    assert paths["entropy"].startswith("M0 99.68H1V35.33H2V3.00H3V")
    assert paths["ahead"].startswith("M0 100.00H1V51.50H2V99.68H3V")


def test_keys_walk_over_what_the_filter_leaves(opened):
    opened.click(*opened.run("return center(document.querySelector('[data-regime=fork]'))"))
    opened.run("document.querySelector('[data-regime=mid]').focus()")
    opened.key("Tab")
    assert opened.run("return document.activeElement === articles[0].querySelector('.tokens')")
    assert opened.run("return state(0)") == at(0, "lock")
    keys = {"ArrowRight": (1, 5), "ArrowLeft": (1,), "End": (7,), "Home": (1,)}
    for key, index in [(key, index) for key, indices in keys.items() for index in indices]:
        opened.key(key)
        assert opened.run("return state(0)") == at(index, "fork")
    opened.key("Escape")
    assert opened.run("return state(0)") == NOTHING
    opened.key("ArrowRight")
    assert opened.run("return state(0)") == at(5, "fork")  # goes on where it was
    opened.key("Tab")
    assert opened.run("return state(0)") == [[], None, "lock, token 1 of 600"]


def test_phone(opened):
    opened.resize(390, 800, mobile=True)
    opened.open(Path(opened.run("return decodeURI(location.pathname)")), HELPERS)
    assert opened.run("return document.documentElement.scrollWidth") == 390  # nothing sticks out
    opened.run("tokens(0)[5].scrollIntoView({block: 'center'})")
    opened.settle()
    opened.tap(*opened.run("return center(tokens(0)[5])"))
    opened.settle()
    assert opened.run("return state(0)") == at(5, "fork")  # and stays when the finger leaves
    box = opened.run("return tip.getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= 390


def test_hostile_text_odd_numbers_and_nothing(browser, tmp_path):
    nan, inf = float("nan"), float("inf")
    tokens = [EVIL, " a", "\n\n", "\t", "", "\x00\u202e\ud800\xa0", "é漢"]
    odd = rollout(tokens, entropy=[nan, inf, 1.0, 0.0, nan, 2.0, -inf], gate=[nan] * 7, prompt=EVIL, title=EVIL)
    nothing = rollout([])
    page = write_token_report(tmp_path / "page.html", [odd, nothing, rollout(["one"], entropy=[nan])], title=EVIL)
    browser.resize(1200, 900)
    browser.open(page, HELPERS)
    spelled = EVIL.replace(" ", "·")
    assert browser.run("return tokens(0).map(token => token.textContent)") == [
        *(spelled, "·a", "↵↵", "⇥", "∅", "U+0000U+202EU+D800U+00A0", "é漢"),
    ]
    assert browser.run("return articles[0].querySelectorAll('.tokens br').length") == 2
    assert browser.run("return [document.title, document.images.length]") == [EVIL, 0]
    browser.move(*browser.run("return center(tokens(0)[1])"))
    assert browser.run("return numbers().map(row => row[1])") == ["inf", "0.5000", "nan", "0.5000", "0.5000", "0.5000"]
    paths = browser.run(
        "return [...document.querySelectorAll('.curves path')].map(path => path.getAttribute('d')).join()"
    )
    assert "NaN" not in paths and "Infinity" not in paths and "undefined" not in paths
    assert browser.run("return built()") == [7, 0, 1]
    assert browser.run("return articles[1].querySelector('.tokens').textContent") == "No token."
    browser.run("articles[1].querySelector('.tokens').focus()")
    for key in ("ArrowRight", "End", "Home", "Tab"):  # from a response without tokens to the next
        browser.key(key)
    assert browser.run("return state(2)") == at(0, "mid", of=1)


def test_markup_that_got_in_runs_and_loads_nothing(opened):
    """Were a text ever to become markup, the page's policy stops what it asks for."""
    blocked = opened.run("""
        const found = [];
        addEventListener("securitypolicyviolation", event => found.push(event.effectiveDirective));
        const pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
        document.body.insertAdjacentHTML("beforeend", `<p onclick="document.title = 'owned'" style="color: red">x</p>
          <img src="${pixel}"><iframe srcdoc="x" src="data:text/html,x"></iframe>`);
        document.body.lastElementChild.previousElementSibling.previousElementSibling.click();
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);
        await fetch("data:,x").catch(() => 0);
        await new Promise(done => setTimeout(done, 100));
        return found.sort();
    """)
    assert {"connect-src", "img-src", "script-src-attr", "script-src-elem", "style-src-attr"} <= set(blocked)
    assert opened.run("return document.title") == "Sampled rollouts"


def test_many_long_rollouts(browser, tmp_path):
    """200 rollouts of 1,000 tokens: a page of bounded size, made and opened in bounded time."""
    words = [f" w{index}" for index in range(1000)]
    values = [0.123456789 * (index % 37) for index in range(1000)]
    numbers = ("entropy", "lookahead_entropy", "gate", "magnitude", "log_ratio", "token_advantage")
    long = rollout(words, **dict.fromkeys(numbers, values), student_logp=values, teacher_logp=values)
    file = tmp_path / "rollouts.jsonl"
    append_rollouts(file, [long])
    file.write_bytes(file.read_bytes() * 200)
    start = time.process_time()
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert time.process_time() - start < 30  # 3 s
    page = tmp_path / "rollouts.html"
    assert page.stat().st_size < 20e6

    browser.resize(1200, 900)
    start = time.perf_counter()
    browser.open(page, HELPERS)
    assert time.perf_counter() - start < 60  # 1 s where nothing else runs
    assert 1 <= sum(map(bool, browser.run("return built()"))) <= 3
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.settle()
    assert browser.run("return tokens(199).length") == 1000
    assert sum(map(bool, browser.run("return built()"))) <= 6
    # A response that is not built yet takes about the space that it will need.
    heights = browser.run("return articles.map(article => article.offsetHeight)")
    assert 0.6 < heights[100] / heights[0] < 1.6
