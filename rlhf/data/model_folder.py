"""A model before its weights: its folder, found by path, asset or hub name; its configuration and its tokenizer, read or refused in words.

Owns: where a name leads, and what must hold of config.json, the generation settings and the tokenizer's files. Does not know what the model
is for (`training.trainable` and `reward.folders` do), nor its tensors (`weight_files`).
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

from rlhf.data.assets import PREFIX, resolve
from rlhf.data.errors import DataError, in_a_line
from rlhf.data.weight_files import INDEX, PICKLED, SINGLE

CONFIG, GENERATION = "config.json", "generation_config.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Files of a hub's model that say how it is built and how it reads."""
WEIGHTS = ("model*.safetensors", "reward_head.safetensors")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
LARGEST = 2**31 - 1
"""Of any size in a configuration; a larger one is no size but a mistake."""
MOST_LAYERS = 1000
TRIAL = "What is two plus two?"


class FolderError(DataError):
    """A model folder cannot be used; the message names the field, the folder, the file and the remedy."""


def find_model(name: str, where: str, weights: bool = True) -> str:
    """The folder of a model that is named by its path, as `asset:NAME`, or as a hub does: `OWNER/NAME`, or `OWNER/NAME@REVISION`.

    A hub's model is looked for in this machine's cache (transformers' own) and fetched if it is not there. A folder wins over a hub's name.

    Args:
        where: what the model was given for, at the head of every message: "`policy.model`".
        weights: False fetches the small files only; then the folder may lack weights.

    Raises:
        FolderError: there is no such folder, and no such model of a hub, or it cannot be fetched.
        AssetError: see `resolve`.
    """
    if name.startswith(PREFIX):
        return resolve(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise FolderError(f"{where}: `{name}` is a file. Give the folder of a model in Hugging Face format")
    repository, _, revision = name.partition("@")
    if not HUB_NAME.fullmatch(repository) or name.endswith("@"):
        raise FolderError(
            f"{where}: there is no folder `{name}`. Give a model folder, a hub's name (`OWNER/NAME`, or `OWNER/NAME@REVISION`) or an "
            "`asset:`"
        )
    return snapshot(repository, revision or None, where, weights)


@functools.cache  # within one process a hub's name means one model, whatever is uploaded meanwhile
def snapshot(repository: str, revision: str | None, where: str, weights: bool) -> str:
    """The local folder of a hub's model, fetched if it is not there; arguments and errors as `find_model`."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = repository if revision is None else f"{repository}@{revision}"
    taken = f"{where}: there is no folder `{name}`, so it is taken for the name of a model on {constants.ENDPOINT}"

    def fetched(*patterns: str) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
        except GatedRepoError as error:
            raise FolderError(
                f"{taken}, whose owner gives it to those only who have asked for it. Ask on its page, and set HF_TOKEN to your token"
            ) from error
        except RevisionNotFoundError as error:
            raise FolderError(
                f"{taken}, which has no revision `{revision}`. Name a branch, a tag or a commit of it"
            ) from error
        except RepositoryNotFoundError as error:
            raise FolderError(
                f"{taken}, and there is none of that name (or it is private, and HF_TOKEN is not that of one who may read it). Correct "
                "the folder or the name"
            ) from error
        except Exception as error:  # the hub's client raises what it likes; all of it means that it cannot be fetched
            raise FolderError(f"{taken}. {_unreachable(name, error)}") from error

    folder = fetched(*SMALL)
    if not (folder / CONFIG).is_file():
        raise FolderError(f"{taken}; what was found ({folder}) is no model in Hugging Face format: it has no {CONFIG}")
    if weights:
        fetched(*SMALL, *WEIGHTS)
        if not any(folder.glob(WEIGHTS[0])):
            fetched(*SMALL, "pytorch_model*.bin")
        if lacks_weights(folder):
            raise FolderError(f"{taken}, and only a part of it is in this machine's cache. {_unreachable(name, None)}")
    return str(folder)


def _unreachable(name: str, error: Exception | None) -> str:
    from huggingface_hub import constants

    fetch = name.replace("@", " --revision ")
    if constants.HF_HUB_OFFLINE:
        return (
            f"Nothing is fetched, because HF_HUB_OFFLINE is set, and it is not in this machine's cache ({constants.HF_HUB_CACHE}). Unset "
            f"HF_HUB_OFFLINE, or fetch it beforehand with `hf download {fetch}`; or correct the folder"
        )
    said = "" if error is None else f": {in_a_line(error)}"
    return (
        f"It cannot be fetched{said}. Correct the folder or the name; with no network here, fetch it elsewhere with `hf download {fetch}` "
        "and copy the folder"
    )


def commit_of(folder: Path) -> str | None:
    """Of a folder in the hub's cache, the commit that it holds; None of any other."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if cached else None


def lacks_weights(folder: Path) -> bool:
    """Whether it is a hub's model of which not all weights have been fetched."""
    if commit_of(folder) is None or (folder / SINGLE).is_file() or (folder / PICKLED[0]).is_file():
        return False
    for name in (INDEX, PICKLED[1]):
        if (folder / name).is_file():
            try:
                files = set(json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"].values())
                return not all((folder / file).is_file() for file in files)
            except (ValueError, LookupError, TypeError, AttributeError):  # who reads the weights says what is wrong
                return False
    return True


def read_config(path: str | Path, where: str) -> Any:
    """transformers' configuration of the model in a folder.

    Raises:
        FolderError: there is none, it is not whole, its sizes are none, or only code of its own could read it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FolderError(f"{where}: the folder `{path}` {what}. Give the folder of a model in Hugging Face format")
    _check_entries(folder, where)
    file = folder / CONFIG
    if not file.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise FolderError(
            f"{where}: there is no model in `{path}` (no {CONFIG}; it holds {found}). Give the folder of a model in Hugging Face format"
        )
    raw = read_object(file, where)
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise FolderError(f"{where}: {file} has no `model_type`, so it describes no model. Copy the model again")
    if kind not in CONFIG_MAPPING:
        own = ""
        if "auto_map" in raw:
            own = ". It brings code of its own (`auto_map`), which is not run"
        raise FolderError(
            f"{where}: {file} says that the model is of the type `{kind}`, which transformers does not know{own}. Give a model of an "
            "architecture that transformers has itself"
        )
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        raise FolderError(
            f"{where}: {file} says `architectures: {named}`, but it must be a list of class names. Correct it"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config._attn_implementation = None  # who builds a model chooses
        text = config.get_text_config()
        if not isinstance(text, PretrainedConfig):
            raise TypeError(f"`text_config: {text}` is no configuration")
    except Exception as error:  # transformers raises what it likes for a configuration from which no model can be built
        raise FolderError(
            f"{where}: {file} does not describe a model: {in_a_line(error)}. Correct it, or copy the model again"
        ) from error
    if isinstance(config.dtype, int | float | list):
        raise FolderError(
            f"{where}: {file} says `dtype: {config.dtype}`, but it must be a type such as `bfloat16`. Correct it"
        )
    for name in SIZES:
        _check_size(name, size_of(text, name), file, where)
    return config


def size_of(config: Any, name: str) -> Any:
    """A size in the configuration of a text model; where its layers differ (Gemma 3n, Gemma 4) the largest. None: it says none."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers, when one number is asked for that each layer has of its own
        value = [getattr(layer, name) for layer in config.per_layer_config]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return max(value)
    return value


def _check_entries(folder: Path, where: str) -> None:
    """Raises FolderError for a link to nowhere, or a folder in a file's place: most readers take both for a file that is not there."""
    for pattern in (*SMALL, "*.safetensors", "*.bin"):
        for entry in sorted(folder.glob(pattern)):
            if not entry.is_file():
                what = f"a link to {os.readlink(entry)}, which is not there" if entry.is_symlink() else "a folder"
                raise FolderError(f"{where}: {entry} is {what}, not a file. Copy or download the model again")


def _check_size(name: str, value: Any, file: Path, where: str) -> None:
    most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
    if value is not None and not (type(value) is int and 1 <= value <= most):
        allowed = f"from 1 to {most}" if most < LARGEST or (type(value) is int and value > most) else "at least 1"
        raise FolderError(
            f"{where}: {file} says `{name}: {value}`, but it must be a whole number {allowed}. Correct it, or copy the model again"
        )


def read_object(file: Path, where: str) -> dict[str, Any]:
    """A JSON object. Raises FolderError for anything else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        pointer = " It is a pointer of Git LFS: fetch the file with `git lfs pull`." if _is_pointer(file) else ""
        raise FolderError(f"{where}: {file} is no JSON ({in_a_line(error)}).{pointer} Copy the model again") from None
    if not isinstance(found, dict):
        raise FolderError(f"{where}: {file} holds {json.dumps(found)[:40]}, no JSON object. Copy the model again")
    return found


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(8) == b"version "


def check_stops(folder: Path, config: Any, where: str) -> None:
    """Whether the tokens that end a response, by the generation settings (else by the configuration), are tokens of the model.

    Raises:
        FolderError: they are not, or the settings cannot be read; a response would then never end, without any message.
    """
    file = folder / GENERATION
    if file.is_file():
        named = read_object(file, where).get("eos_token_id")
    else:
        file, named = folder / CONFIG, config.get_text_config().eos_token_id
    rows = config.get_text_config().vocab_size
    for token in named if isinstance(named, list) else [] if named is None else [named]:
        if type(token) is not int or not 0 <= token < rows:
            raise FolderError(
                f"{where}: {file} says `eos_token_id: {named}`, but the model's tokens are numbered from 0 to {rows - 1} (`vocab_size`). "
                "Correct it, or copy the model again"
            )


def read_tokenizer(path: str | Path, where: str) -> Any:
    """The tokenizer in a model folder.

    Raises:
        FolderError: there is none, or one that makes no tokens of a text.
    """
    from transformers import AutoTokenizer

    failed = f"{where}: no tokenizer can be loaded from {str(path)!r}"
    remedy = "Copy the model again with all of its tokenizer's files (tokenizer.json, tokenizer_config.json, ...)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        ids = list(tokenizer(TRIAL, add_special_tokens=False).input_ids)
    except Exception as error:  # the tokenizers' libraries raise bare exceptions, among others
        raise FolderError(f"{failed}: {in_a_line(error)}. {remedy}") from error
    if not ids:
        raise FolderError(f"{failed}: it makes no tokens of a text, so its vocabulary is lost. {remedy}")
    return tokenizer
