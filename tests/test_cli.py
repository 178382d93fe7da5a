"""The console script `prune-tell <verb>`."""

import sys
from importlib import import_module
from importlib.metadata import entry_points

import pytest

from prune_tell.cli import VERBS, main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prune-tell", *arguments])
    main()


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_lists_every_verb(arguments, monkeypatch, capsys):
    run(monkeypatch, *arguments)
    told = capsys.readouterr().out
    assert told.startswith("usage: prune-tell <verb> key=value")
    for verb in VERBS:
        assert f"\n  {verb} " in told


def test_every_verb_is_a_module_with_a_main():
    for verb in VERBS:
        assert callable(import_module(f"prune_tell.{verb}").main)


def test_an_unknown_verb_is_told_with_the_nearest(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "trian", "backbone=vit")
    assert str(caught.value).startswith("prune_tell: trian is an unknown verb (one of: train, evaluate, caption")
    assert str(caught.value).endswith("; did you mean 'train'?")


@pytest.mark.parametrize("verb", list(VERBS))
def test_the_rest_of_the_line_goes_to_the_verb(verb, monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(f"prune_tell.{verb}.main", lambda: seen.append(sys.argv))
    run(monkeypatch, verb, "a=1", "-m")
    assert seen == [["prune-tell", "a=1", "-m"]]


def test_the_console_script_is_installed():
    scripts = [entry for entry in entry_points(group="console_scripts") if entry.name == "prune-tell"]
    assert [entry.value for entry in scripts] == ["prune_tell.cli:main"]
