"""No field is silently ignored: each one is read somewhere outside rlhf/config.

A field counts as read when an attribute of its name is taken from something that stands for its section:
`settings.loop.steps`, `loop.steps` or `self.loop.steps`; or from a parameter or attribute whose annotation is the
section's class (`settings: PolicySettings` ... `settings.learning_rate`). A method's field must change the method's
declaration.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.algorithms import make
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS, OwnAlgorithm
from rlhf.config.data import DataSource
from rlhf.config.reward import MemberSettings, SourceSettings
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.sft import SftDataSettings, TrainingSettings
from rlhf.config.transforms import TRANSFORMS
from rlhf.reward.transforms import Scored, stateless

PACKAGE = Path(__file__).parents[2] / "rlhf"
# The plan and the console show values to people; that alone changes nothing.
SHOWING = ("config", "preflight")
SECTIONS = {name: info.annotation for name, info in Settings.model_fields.items() if name != "algorithm"}
SECTIONS["lora"] = SECTIONS["policy"].model_fields["lora"].annotation  # a section inside a section
SECTIONS |= {
    "sft_data": SftDataSettings,
    "data_source": DataSource,
    "training": TrainingSettings,
}  # of `rlhf sft`, and of lists of sources; its others are those of `rlhf train`
SECTIONS |= {
    f"reward_training_{name}": info.annotation
    for name, info in RewardTrainingSettings.model_fields.items()
    if name != "cluster"
}  # names that no variable has: its sections are called like others
MEMBER = set(MemberSettings.model_fields) - set(SourceSettings.model_fields)  # the others are those of `reward`
FIELDS = {f"{name}.{field}" for name, section in SECTIONS.items() for field in section.model_fields} | {
    f"members.{field}" for field in MEMBER
}


def section_names(tree: ast.AST) -> dict[str, str]:
    """Names in a file that stand for a section: annotated with its class, or assigned from `... .section`."""
    classes = {
        kind.__name__: name
        for name, section in SECTIONS.items()
        for kind in section.__mro__
        if kind.__name__ != "Section"
    }
    classes["MemberSettings"] = "members"
    names = {name: name for name in SECTIONS}
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            target = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            section = classes.get(last_name(node.annotation))
            if section and target:
                names[target] = section
        if isinstance(node, ast.Assign):
            for target, value in assigned(node):
                section = last_name(value)
                if section in SECTIONS and isinstance(value, ast.Attribute) and last_name(target):
                    names[last_name(target)] = section
    return names


def assigned(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def fields_read(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = section_names(tree)
    return {
        f"{names[last_name(node.value)]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and last_name(node.value) in names
    }


def test_every_field_is_read() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in SHOWING]
    ignored = sorted(FIELDS - {field for path in files for field in fields_read(path)})
    assert not ignored, "fields that change nothing; read them or remove them: " + ", ".join(ignored)


def test_every_field_is_described() -> None:
    others = [("own", OwnAlgorithm), ("members", MemberSettings)]
    for name, section in [*SECTIONS.items(), *METHODS.items(), *TRANSFORMS.items(), *others]:
        for field, info in section.model_fields.items():
            assert info.description and info.description.endswith("."), f"{name}.{field}"


# Values, of which one is not the default, and what else must be set so that they count.
OTHER: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "samples_per_prompt": ((3,), {}),
    "labels": (("sampled",), {}),
    "label_temperature": ((2.0,), {"labels": "sampled"}),
    "reference": (("ema",), {}),
    "reference_every": ((2,), {"reference": "previous"}),
    "reference_decay": ((0.5,), {"reference": "ema"}),
    "reference_alpha": ((0.5,), {"reference": "extrapolated"}),
    "pairing": (("all",), {}),
    "logp_reduce": (("mean",), {}),
    "beta": ((0.5,), {}),
    "loss": (("robust",), {"label_smoothing": 0.1}),
    "label_smoothing": ((0.1,), {}),
    "pairs": (("dataset",), {}),
    "tau": ((0.5,), {}),
    "mixture": ((0.5,), {}),
    "alpha": ((0.5,), {}),
    "bonus_scale": (("alpha",), {}),
    "ranked_with": (("samples",), {}),
    "fresh_samples": ((3,), {"ranked_with": "samples"}),
    "generation": (("sampled",), {}),
    "delta": ((0.5,), {}),
    "likelihood_weight": ((0.5,), {}),
    "kl_placement": (("none", "reward"), {}),
    "kl_estimator": (("k2", "k1"), {"kl_placement": "none"}),
    "kl_coef": ((0.5,), {"kl_placement": "reward", "kl_estimator": "k1"}),
    "kl_target": ((6.0,), {"kl_placement": "reward", "kl_estimator": "k1"}),
    "kl_horizon": ((99,), {"kl_placement": "reward", "kl_estimator": "k1", "kl_target": 6.0}),
    "kl_before_baseline": ((True, False), {}),
    "clip_low": ((0.1,), {}),
    "clip_high": ((0.1,), {}),
    "dual_clip": ((3.0,), {}),
    "ratio": (("sequence",), {}),
    "entropy_coef": ((0.1,), {}),
    "aggregation": (("seq_mean_token_sum",), {}),
    "correction": (("icepop",), {}),
    "correction_low": ((0.1,), {}),
    "correction_high": ((9.0,), {}),
    "reward_clip": ((1.0,), {}),
    "whiten": ((True, False), {}),
    "lam": ((0.5,), {}),
    "mask_truncated": ((True,), {}),
    "length_coef": ((0.5,), {}),
    "gamma": ((0.9,), {}),
    "critic_model": (("some/folder",), {}),
    "critic_learning_rate": ((0.1,), {}),
    "critic_warmup_steps": ((3,), {}),
    "value_clip": ((0.5,), {}),
    "opponent_decay": ((0.5,), {}),
    "kl_weight": ((0.5,), {}),
}


# Two values of each field of a transform, and what else must be set.
TRANSFORMED: dict[str, dict[str, tuple[Any, Any, dict[str, Any]]]] = {
    "clip": {"low": (None, 3.0, {}), "high": (None, 1.0, {})},
    "length_penalty": {"per_token": (0.1, 0.2, {})},
    "missing_eos": {"penalty": (1.0, 2.0, {})},
    "overlong": {"buffer": (4, 8, {}), "penalty": (1.0, 2.0, {"buffer": 4})},
    "normalise": {},
    "log_sigmoid": {"quantile": (0.5, 0.9, {})},
    "calibrate": {"phi": ("identity", "best_of_n", {}), "strength": (10.0, 5.0, {"phi": "worst_of_n"})},
}


def test_every_field_of_a_transform_changes_what_it_does() -> None:
    response, references = Scored(2.0, n_tokens=5, cut=True, limit=6), [0.0, 1.0, 5.0]
    for name, kind in TRANSFORMS.items():
        assert set(TRANSFORMED[name]) == set(kind.model_fields) - {"name"}
        for field, (one, other, context) in TRANSFORMED[name].items():
            results = [stateless(kind(name=name, **context, **{field: v}), response, references) for v in (one, other)]
            assert results[0] != results[1], f"{name}.{field}"


def declaration(method: str, **fields: Any) -> str:
    """The algorithm as text: two are the same if every choice in them is."""
    sections = {"data": {"prompts": "p"}, "policy": {"model": "m"}, "reward": {"path": "r"}}
    return repr(make(Settings.model_validate(sections | {"algorithm": {"name": method, **fields}})))


@pytest.mark.parametrize("method", METHODS)
def test_every_field_of_a_method_changes_its_declaration(method: str) -> None:
    assert declaration(method) == declaration(method), "the text must not hold addresses of fresh objects"
    ignored = []
    for field, info in METHODS[method].model_fields.items():
        if field == "name":
            continue
        others, context = OTHER[field]
        other = next(value for value in others if value != info.default)
        if declaration(method, **context) == declaration(method, **context, **{field: other}):
            ignored.append(field)
    assert not ignored, f"fields of {method} that change nothing: {', '.join(ignored)}"
