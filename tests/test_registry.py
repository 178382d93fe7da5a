"""Parts by name: duplicates are refused, misses list the choices, installed packages can add their own."""

from importlib.metadata import EntryPoint

import pytest

from prune_tell import registry as registry_module
from prune_tell.errors import UserError
from prune_tell.registry import Registry, load_plugins, nearest


@pytest.fixture
def parts() -> Registry[object]:
    registry: Registry[object] = Registry("backbone")
    registry.register("vit")(dict)
    registry.register("convnext")(list)
    return registry


def test_a_name_finds_its_builder(parts):
    assert parts["vit"] is dict
    assert list(parts) == ["convnext", "vit"]


def test_register_returns_the_builder_unchanged(parts):
    @parts.register("mine")
    def mine() -> int:
        """Kept."""
        return 3

    assert mine() == 3
    assert mine.__doc__ == "Kept."


def test_a_duplicate_is_a_programming_error(parts):
    with pytest.raises(ValueError, match="backbone 'vit' is registered twice") as caught:
        parts.register("vit")
    assert not isinstance(caught.value, UserError)
    assert parts["vit"] is dict


def test_a_miss_lists_the_choices_and_the_nearest(parts):
    with pytest.raises(UserError) as caught:
        parts["vitt"]
    assert str(caught.value) == "backbone=vitt is unknown (one of: convnext, vit); did you mean 'vit'?"


def test_a_far_miss_suggests_nothing(parts):
    with pytest.raises(UserError, match=r"one of: convnext, vit\)$"):
        parts["zebra"]


def test_nearest_is_empty_without_choices():
    assert nearest("vit", []) == ""


def test_plugins_are_imported_once_and_before_a_miss_is_told(tmp_path, monkeypatch, parts):
    (tmp_path / "my_plugin_part.py").write_text(
        "import prune_tell.registry as r\nr.IMPORTED.append(1)\nr.PARTS.register('mine')(set)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry_module, "IMPORTED", [], raising=False)
    monkeypatch.setattr(registry_module, "PARTS", parts, raising=False)
    asked = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("mine", "my_plugin_part", group)]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    load_plugins.cache_clear()
    try:
        assert parts["mine"] is set
        assert list(parts) == ["convnext", "mine", "vit"]
        assert registry_module.IMPORTED == [1]
        assert asked == ["prune_tell.plugins"]
    finally:
        load_plugins.cache_clear()
