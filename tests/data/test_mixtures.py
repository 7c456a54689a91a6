"""Several sources as one: mixed by size or by weight, each with its columns, through to the ledger, the plan and a resumed run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import ConfigError, load
from rlhf.config.data import DataSettings
from rlhf.config.loader import UserError
from rlhf.config.sft import SftDataSettings
from rlhf.config.sft_checks import load_sft
from rlhf.data.conversations import read_conversations
from rlhf.data.errors import DataError
from rlhf.data.ledger import Ledger
from rlhf.data.order import Share
from rlhf.data.prompts import PromptSet, load_prompts
from rlhf.data.tiny import tiny_tokenizer
from rlhf.preflight.plan import describe
from rlhf.preflight.sft import describe_sft
from rlhf.training.resume import run_contents
from rlhf.training.sft import Conversations
from rlhf.types import Prompt

TOKENIZER = tiny_tokenizer()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write(tmp_path / "chats.jsonl", [{"prompt": f"chat {n}"} for n in range(8)])


@pytest.fixture
def sums(tmp_path: Path) -> str:
    return write(tmp_path / "sums.jsonl", [{"question": f"sum {n}", "result": n} for n in range(4)])


SUMS = {"prompt": "question", "answer": "result"}


def read(*sources: Any, **settings: Any) -> PromptSet:
    data = DataSettings(prompts=list(sources), **settings)
    return load_prompts(data.prompts, TOKENIZER, data)


def test_sources_without_weights_are_one_set_mixed_by_size(chats: str, sums: str) -> None:
    prompts = read(chats, {"path": sums, "columns": SUMS})
    assert len(prompts) == 12 and prompts.shares == ()
    for begin in range(0, 12, 3):
        assert sum(prompt.text.startswith("sum") for prompt in prompts[begin : begin + 3]) == 1
    assert [prompt.payload for prompt in prompts if "sum" in prompt.text] == [{"answer": n} for n in range(4)]


def test_columns_are_for_all_sources_that_have_none_of_their_own(chats: str, sums: str) -> None:
    assert [prompt.text for prompt in read(sums, columns=SUMS)] == [f"sum {n}" for n in range(4)]
    mixed = read({"path": chats, "columns": {}}, sums, columns=SUMS)
    assert mixed == read(chats, {"path": sums, "columns": SUMS})
    with pytest.raises(
        DataError, match=r"chats\.jsonl:1: there is no column `question`, which `columns` reads as `prompt`"
    ):
        read(chats, sums, columns=SUMS)


def test_a_prompt_in_two_sources_is_of_the_first(chats: str, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", [{"prompt": "chat 0"}, {"prompt": "new"}])
    prompts = read({"path": chats, "weight": 1}, {"path": more, "weight": 1})
    assert prompts.shares == (Share(8, 1.0), Share(1, 1.0))
    with pytest.raises(DataError, match=r"chats\.jsonl: no prompt is left to use \(\{'duplicate': 8\}\)"):
        read(chats, chats)


def prompts_of(*sizes: int) -> list[Prompt]:
    return [Prompt(f"{source}/{n}", (n,), "") for source, size in enumerate(sizes) for n in range(size)]


@given(
    weights=st.lists(st.floats(0.1, 9), min_size=2, max_size=4),
    sizes=st.lists(st.integers(4, 9), min_size=4, max_size=4),
    counts=st.lists(st.integers(1, 4), max_size=12),
    cut=st.integers(0, 12),
)
def test_a_resumed_mixture_draws_what_the_uninterrupted_one_does(
    weights: list[float], sizes: list[int], counts: list[int], cut: int
) -> None:
    mixture = [Share(size, weight) for size, weight in zip(sizes, weights, strict=False)]
    prompts = prompts_of(*(share.size for share in mixture))

    def draw(ledger: Ledger, steps: list[int]) -> list[list[str]]:
        drawn = []
        for count in steps:
            drawn.append([prompt.id for prompt in ledger.lease(count)])
            for one in drawn[-1]:
                ledger.settle(one, "trained")
        return drawn

    whole, first, second = (Ledger(prompts, 5, True, mixture) for _ in range(3))
    expected = draw(whole, counts)
    got = draw(first, counts[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    assert got + draw(second, counts[cut:]) == expected
    assert second.state() == whole.state()
    assert all(len(set(step)) == len(step) for step in expected)


def test_the_ledger_draws_by_weight() -> None:
    ledger = Ledger(prompts_of(100, 10), 0, True, [Share(100, 3.0), Share(10, 1.0)])
    seen: Counter[str] = Counter()
    for _ in range(20):
        for prompt in (leased := ledger.lease(4)):
            ledger.settle(prompt.id, "trained")
        assert Counter(prompt.id[0] for prompt in leased) == {"0": 3, "1": 1}
        seen.update(prompt.id for prompt in leased)
    assert {seen[f"1/{n}"] for n in range(10)} == {2}, "two passes over the small source"
    assert sum(count for name, count in seen.items() if name[0] == "0") == 60 and max(seen.values()) == 2
    assert ledger.settled["repeated"] == 0


def test_other_weights_are_another_run(chats: str, sums: str, tiny_model: Path) -> None:
    def contents(*weights: float | None) -> dict[str, Any]:
        one, other = ({"path": path, "weight": w} for path, w in zip((chats, sums), weights, strict=True))
        return run_contents(str(tiny_model), read(one, other | {"columns": SUMS}))

    assert contents(1, 2) == contents(1, 2)
    assert len({contents(*weights)["data.prompts"] for weights in ((1, 2), (1, 3), (None, None))}) == 3
    assert len({contents(*weights)["policy.model"] for weights in ((1, 2), (1, 3))}) == 1


# Examples


def test_examples_of_a_mixture_are_drawn_by_weight(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{size}.jsonl", [{"prompt": "q", "response": f"{size}-{n}"} for n in range(size)])
        for size in (6, 2)
    ]

    def units(*weights: float | None) -> tuple[list[Counter[str]], str]:
        sources = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]
        data = SftDataSettings(examples=sources)
        read = read_conversations(data.examples, "data.examples", TOKENIZER, data)
        texts = [TOKENIZER.decode(one.token_ids[one.learned]).removesuffix("<|end|>") for one in read.conversations]
        epochs = [Conversations(read, 0).units(epoch) for epoch in (0, 1)]
        assert all(len(epoch) == 8 for epoch in epochs)
        return [Counter(texts[unit][0] for unit in epoch) for epoch in epochs], read.fingerprint()

    plain, one = units(None, None)
    even, other = units(1, 1)
    assert plain == [{"6": 6, "2": 2}] * 2 and even == [{"6": 4, "2": 4}] * 2
    assert one != other != units(1, 2)[1]


# Configuration and plan


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.prompts=[]", "`data.prompts` must be a list that is not empty"),
        ("data.prompts=3", "`data.prompts` must be text"),
        ("data.prompts=[3]", r"`data\.prompts\[0\]` must be"),
        ("data.prompts=[{path: a, weigth: 1}]", r"`data\.prompts\[0\]\.weigth` is not a known field"),
        ("data.prompts=[{weight: 1}]", r"`data\.prompts\[0\]\.path` is missing"),
        (
            "data.prompts=[{path: a, weight: 0}]",
            r"`data\.prompts\[0\]\.weight` must be greater than or equal to 0.000001",
        ),
        ("data.prompts=[{path: a, weight: 1}, b]", r"`data\.prompts\[1\]\.weight` is missing, but other sources"),
        ("data.prompts={path: a}", "`data.prompts` must be a list"),
        ("data.eval_prompts=[{path: a, weight: 1}]", r"`data\.eval_prompts`: held-out rows .* Remove `weight`"),
        (
            "data.columns={prompt: 3}",
            "`data.columns` reads `prompt` from 3. Give the name of a column as text, or null",
        ),
        ("data.prompts=[{path: a, columns: {prompt: ''}}]", r"`data\.prompts\[0\]\.columns` reads `prompt` from ''"),
        ("data.prompts=[{path: ''}]", r"`data\.prompts\[0\]\.path` is empty text"),
        ("data.columns=[a]", "`data.columns` must be a mapping"),
    ],
)
def test_wrong_lists_of_sources_are_named(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load("configs/tiny.yaml", [override])


def test_examples_are_checked_alike() -> None:
    required = ["policy.model=asset:tiny-llama", "data.examples=[{path: a, weight: 1}, b]"]
    with pytest.raises(ConfigError, match=r"`data\.examples\[1\]\.weight` is missing"):
        load_sft("configs/movie_reviews/sft.yaml", required)


def test_the_plan_says_what_a_mixture_draws(chats: str, sums: str) -> None:
    parts = (
        f"[{{path: {chats}, weight: 3}}, {{path: {sums}, weight: 1, columns: {{prompt: question, answer: result}}}}]"
    )
    settings = load("configs/tiny.yaml", [f"data.prompts={parts}", "loop.prompts_per_step=8", "loop.steps=4"])
    plan = describe(settings)
    assert f"prompts: 12 prompts of up to 9 tokens from {chats}, {sums}" in plan
    assert f"75.0% of the draws from {chats}: 8 rows, gone through 3 times in the run" in plan
    assert f"25.0% of the draws from {sums}: 4 rows, gone through 2 times in the run" in plan


def test_a_share_that_a_source_cannot_fill_is_refused(chats: str, sums: str) -> None:
    parts = f"[{{path: {chats}, weight: 1, columns: {{}}}}, {{path: {sums}, weight: 3, columns: {{prompt: question}}}}]"
    settings = load("configs/tiny.yaml", [f"data.prompts={parts}", "loop.prompts_per_step=8"])
    with pytest.raises(
        UserError, match=r"`data\.prompts\[1\]\.weight`: its share of a step is 6 of 8 prompts .* has 4"
    ):
        describe(settings)


def test_a_mixture_of_examples_is_planned(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", [{"prompt": "q", "response": "a"}] * n) for n in (6, 2)]
    examples = f"data.examples=[{{path: {paths[0]}, weight: 1}}, {{path: {paths[1]}, weight: 1}}]"
    plain = [
        "data.response_field=response",
        "data.eval_examples=null",
        "training.eval_every=0",
        "policy.warmup_steps=0",
        "policy.model=asset:tiny-llama",
    ]
    plan = describe_sft(load_sft("configs/movie_reviews/sft.yaml", [examples, *plain, "training.batch_size=4"]))
    assert f"50.0% of the draws from {paths[1]}: 2 rows, gone through 2 times in the run" in plan
