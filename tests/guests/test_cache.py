"""The lab's cache: what is run from it is what was put there, and nobody else could change it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiotool.errors import KernelError, Refused
from vfiotool.lab import needs
from vfiotool.lab.kernels import cache, packages, stored

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
NOBODY = 65534


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    def forget() -> None:
        cache._trusted_root.cache_clear()
        cache.verified.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place


def filled(target: Path) -> Path:
    with cache.filled(target) as partial:
        (partial / "usr/bin").mkdir(parents=True)
        (partial / "usr/bin/tool").write_text("right")
        (partial / "usr/bin/link").symlink_to("tool")
    return target


def test_the_cache_is_made_for_this_user_alone_to_write(base: Path) -> None:
    assert cache.cache_root() == base / "vfiotool"
    assert not (base / "vfiotool").stat().st_mode & 0o022


@needs_root
@pytest.mark.parametrize("part", ["", "vfiotool"])
def test_a_cache_of_another_user_is_refused(base: Path, part: str) -> None:
    (base / "vfiotool").mkdir(parents=True)
    os.chown(base / part, NOBODY, NOBODY)
    with pytest.raises(Refused, match=f"{base / part} belongs to user {NOBODY}") as caught:
        cache.cache_root()
    assert "XDG_CACHE_HOME" in str(caught.value.hint)


@pytest.mark.parametrize("part", ["", "vfiotool"])
def test_a_cache_that_others_can_write_to_is_refused(base: Path, part: str) -> None:
    (base / "vfiotool").mkdir(parents=True)
    (base / part).chmod(0o777)
    with pytest.raises(Refused, match=r"can be written to by others \(mode 777\)"):
        cache.cache_root()


def test_a_folder_on_the_way_that_others_can_write_to_is_refused(base: Path) -> None:
    (base / "vfiotool").mkdir(parents=True)
    base.parent.chmod(0o777)
    try:
        with pytest.raises(Refused, match=f"{base.parent} can be written to"):
            cache.cache_root()
    finally:
        base.parent.chmod(0o700)


def test_a_link_into_a_folder_that_others_can_write_to_is_refused(
    base: Path, tmp_path: Path
) -> None:
    open_place = tmp_path / "open"
    (open_place / "vfiotool").mkdir(parents=True)
    open_place.chmod(0o777)
    base.symlink_to(open_place)
    with pytest.raises(Refused, match=f"{open_place} can be written to"):
        cache.cache_root()


def test_a_sticky_folder_on_the_way_is_no_fault(base: Path) -> None:
    base.mkdir()
    base.chmod(0o1777)
    assert cache.cache_root().is_dir()


@needs_root
def test_a_layer_that_another_user_put_there_is_refused(base: Path) -> None:
    folder = filled(cache.cache_root() / "layer")
    os.chown(folder / "usr/bin/tool", NOBODY, NOBODY)
    with pytest.raises(Refused, match="usr/bin/tool belongs to user"):
        cache.verified(folder)


def test_what_was_put_there_is_found_as_it_was(base: Path) -> None:
    folder = filled(cache.cache_root() / "layer")
    assert cache.verified(folder) == folder


@pytest.mark.parametrize("harm", ["changed", "removed", "added", "link"])
def test_a_change_is_noticed_and_the_file_named(base: Path, harm: str) -> None:
    folder = filled(cache.cache_root() / "layer")
    tool = folder / "usr/bin/tool"
    if harm == "changed":
        before = tool.stat()
        tool.write_text("wrong")
        os.utime(tool, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif harm == "removed":
        tool.unlink()
    elif harm == "added":
        tool = folder / "usr/bin/more"
        tool.write_text("x")
    else:
        tool = folder / "usr/bin/link"
        tool.unlink()
        tool.symlink_to("/bin/sh")
    with pytest.raises(KernelError, match=f"{tool} is not what the lab put there") as caught:
        cache.verified(folder)
    assert f"rm -r {folder}" in str(caught.value.hint)


def test_what_this_machine_runs_is_read_each_time(base: Path) -> None:
    """The digest, not the marks of being touched: those could be put back."""
    with cache.filled(cache.cache_root() / "kernel") as partial:
        (partial / "image").write_text("right")
    folder = cache.cache_root() / "kernel"
    known = json.loads((folder / cache.SEAL).read_text())
    (folder / "image").write_text("wrong")
    facts = (folder / "image").stat()
    known["image"][1] = f"{facts.st_size} {facts.st_ino} {facts.st_ctime_ns}"
    (folder / cache.SEAL).write_text(json.dumps(known))
    with pytest.raises(KernelError, match="image is not what"):
        cache.verified(folder)


def test_a_copied_cache_is_read_once_and_sealed_again(base: Path) -> None:
    folder = filled(cache.cache_root() / "layer")
    tool = folder / "usr/bin/tool"
    text = tool.read_text()
    tool.unlink()
    tool.write_text(text)
    before = (folder / cache.SEAL).read_text()
    cache.verified(folder)
    assert (folder / cache.SEAL).read_text() != before


def test_a_folder_that_was_not_sealed_is_sealed_as_it_is(base: Path) -> None:
    place = stored.folder("6.12")
    place.mkdir(parents=True)
    (place / "image").write_text("x")
    cache.verified(place)
    assert "image" in json.loads((place / cache.SEAL).read_text())


def test_a_layer_is_due_again_when_what_it_relied_on_has_gone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = needs.Need("guest", "tar", "program:tar", "a test")
    gone = needs.Need("guest", "gone", "program:no-program-of-this-name", "a test")
    monkeypatch.setattr(needs, "needs", lambda: (here, gone))
    layer = packages.layer_folder()
    assert not packages._is_complete(layer)
    layer.mkdir(parents=True)
    (layer / "packages.json").write_text("{}")
    (layer / packages.RELIED_ON).write_text('["tar"]')
    assert packages._is_complete(layer)
    (layer / packages.RELIED_ON).write_text('["tar", "gone"]')
    assert not packages._is_complete(layer)
