"""What `megatron_versions` says of the installed megatron-core, held against that megatron-core itself."""

import inspect
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing, package_info

from megatron_ext.errors import UserError
from megatron_ext.runtime import megatron_versions
from megatron_ext.runtime.cpu import patch_megatron

PACKAGE = Path(megatron_versions.__file__).parents[1]


def test_the_function_that_writes_common_state_takes_state_and_folder() -> None:
    place = megatron_versions.common_writer()
    if place is None:
        assert "save_common" not in inspect.getsource(dist_checkpointing.serialization), "this megatron writes common.pt after all"
        return
    patch_megatron()  # puts ours there, which must take what megatron gives
    holder, name = place
    assert list(inspect.signature(getattr(holder, name)).parameters) == ["state", "folder"]
    assert f"{name}(state_dict, checkpoint_dir)" in inspect.getsource(dist_checkpointing.save)


def test_the_writers_queue_is_where_it_is_said_to_be() -> None:
    module, name = megatron_versions.results_queue()
    assert callable(getattr(module, name))
    assert f"{name}(" in inspect.getsource(module.FileSystemWriterAsync)


def test_an_asynchronous_save_takes_the_arguments() -> None:
    parameters = inspect.signature(dist_checkpointing.save).parameters
    assert set(megatron_versions.asynchronous_arguments()) == set(parameters) & {"async_strategy"}


@pytest.mark.parametrize("version", [(0, 15), (0, 20), (1, 0)])
def test_other_versions_are_refused(version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in zip(("MAJOR", "MINOR"), version, strict=True):
        monkeypatch.setattr(package_info, name, number)
    monkeypatch.setattr(package_info, "__version__", ".".join(map(str, version)))
    with pytest.raises(UserError, match=rf"megatron-core {version[0]}\.{version[1]} is installed: .* supports 0\.16 to 0\.19"):
        patch_megatron()


def test_nothing_else_asks_for_the_version() -> None:
    asking = [path for path in PACKAGE.rglob("*.py") if "package_info" in path.read_text(encoding="utf-8")]
    assert asking == [PACKAGE / "runtime/megatron_versions.py"]
