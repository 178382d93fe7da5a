"""From the command line to checked keyword arguments, with mistakes told in one sentence.

Hydra composes the YAML groups; `arguments` then holds every node against the signature of the builder it is meant for,
so a part's keys, types and defaults are written once, in its signature, and no config object enters a module.
"""

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from prune_tell.errors import UserError
from prune_tell.registry import nearest

PACKAGE = Path(__file__).resolve().parent


def config_dir() -> Path:
    """Where the YAML files are: inside an installed package, or beside `src/` in a checkout."""
    for folder in (PACKAGE / "configs", PACKAGE.parent.parent / "configs"):
        if (folder / "train.yaml").exists():
            return folder
    raise FileNotFoundError(f"{PACKAGE}: the configs folder is missing from this installation")


def convert(hint: Any, value: Any, key: str) -> Any:
    """Convert a config value to a type hint, or say what was expected.

    Raises:
        UserError: naming the key, the value and what is allowed.
    """
    plain = inspect.isclass(hint) and hint.__module__ == "builtins"
    settings = None if plain else ConfigDict(arbitrary_types_allowed=True)
    adapter = TypeAdapter(hint, config=settings) if not plain else TypeAdapter(hint)
    shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
    choices = {hint, *get_args(hint)}
    if isinstance(value, bool) and choices & {int, float} and bool not in choices:  # for Python, true is 1
        raise UserError(f"{key}={shown} is not valid: a number is expected")
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        wants = [expected(detail) for detail in error.errors()] + (["null"] if type(None) in choices else [])
        raise UserError(f"{key}={shown} is not valid: {' or '.join(dict.fromkeys(wants))} is expected") from None


def expected(detail: ErrorDetails) -> str:
    """What pydantic expected, without how it failed ("a valid integer, unable to parse ...")."""
    if detail["type"] == "missing":
        return "one more item"
    if detail["type"] == "too_long":
        return f"at most {detail['ctx']['max_length']} items"
    return re.sub(r"^Input should be |, (unable|got) .*", "", detail["msg"])


def arguments(
    builder: Callable[..., Any], node: Mapping[str, Any], *, key: str, given: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Check a config node against the keyword-only parameters of `builder` and return them as plain values.

    Args:
        builder: a function, class or dataclass.
        node: plain values, e.g. of one YAML group.
        key: the node's place in the config, for messages.
        given: parameters that the caller supplies and the config may not.

    Raises:
        UserError: for an unknown or missing key, or a value of the wrong type.
    """
    target = builder.__init__ if inspect.isclass(builder) else builder  # type: ignore[misc]
    hints = get_type_hints(target)
    parameters = {n: p for n, p in inspect.signature(builder).parameters.items() if n not in given}
    prefix = f"{key}." if key else ""
    for name in node:
        if name not in parameters:
            names = sorted(parameters)
            raise UserError(
                f"{prefix}{name} is an unknown key (allowed: {', '.join(names)}){nearest(str(name), names)}"
            )
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    missing = [n for n in needed if node.get(n) in (None, "???")]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is not set: give it as {prefix}{missing[0]}=...")
    return {name: convert(hints[name], value, f"{prefix}{name}") for name, value in node.items()}


def plain(node: Any) -> Any:
    """Resolve a config node to dicts, lists and scalars."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def sentence(error: Exception, config_name: str = "train") -> str:
    """Turn an exception of Hydra or OmegaConf into one sentence.

    Args:
        error: what composing a config raised.
        config_name: the verb, whose keys are suggested.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override} can't be read: {' '.join(text.split())}"
    if error.__cause__ is not None and isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}\n{error.__cause__}"
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        return f"{unknown[1]} is an unknown key{nearest(unknown[1], known_keys(config_name))} (all keys: add --cfg job)"
    option = re.search(r"Could not find '([\w/]+)/([^'/]+)'.*?Available options in '[^']+':\s*(.*)", text, re.S)
    if option:
        names = re.findall(r"\S+", option[3].split("\nConfig search")[0])
        more = "; for any other timm model: backbone=timm backbone.name=NAME" if option[1] == "backbone" else ""
        return f"{option[1]}={option[2]} is unknown (one of: {', '.join(names)}){nearest(option[2], names)}{more}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)


def known_keys(config_name: str) -> list[str]:
    """All dotted keys of the composed default config, for near-miss suggestions."""
    keys: list[str] = []

    def walk(node: Mapping[str, Any], prefix: str) -> None:
        for name, value in node.items():
            keys.append(f"{prefix}{name}")
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}.")

    walk(OmegaConf.to_container(compose(config_name)), "")  # type: ignore[arg-type]
    return keys


def compose(config_name: str = "train", overrides: list[str] | None = None) -> DictConfig:
    """Compose a config outside the command line (notebooks, tests, Optuna): `compose("train", ["backbone=vit"])`."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            return hydra.compose(config_name, overrides=overrides or [])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence(error, config_name)) from error


def run_verb(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run a verb: parse the command line with Hydra, call `task`, and tell a user's mistake without a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing and exiting: we do the telling
    logging.captureWarnings(True)

    def told(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.RUN:  # here, because Hydra would add a line of its own
                sys.exit(f"prune_tell: {error}")
            print(f"prune_tell: {error}", file=sys.stderr)  # at once; the other jobs of a multirun go on
            raise

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config_name)(told)()
    except UserError as error:
        sys.exit(f"prune_tell: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            sys.exit(f"prune_tell: {error.__cause__}")
        sys.exit(f"prune_tell: {sentence(error, config_name)}")
    except KeyboardInterrupt:
        sys.exit("prune_tell: interrupted")


def run_dir(cfg: DictConfig) -> Path:
    """The folder of this run: Hydra's (which numbers the jobs of a multirun), or `run_dir` outside of Hydra."""
    if HydraConfig.initialized():
        return Path(HydraConfig.get().runtime.output_dir)
    return Path(cfg.run_dir)
