"""Installing by a manifest: whole files, no strangers touched, everything taken away again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vfiotool.boot import files as boot_files
from vfiotool.boot.files import (
    MANIFEST,
    BootFile,
    InstallRoot,
    changed_files,
    install,
    read_manifest,
    remove_installed,
)
from vfiotool.errors import KernelError, Refused

UNIT = BootFile("etc/systemd/system/vfiotool-boot.service", "[Unit]\n")
HOOK = BootFile("etc/initramfs-tools/hooks/vfiotool", "#!/bin/sh\n", 0o755)
WANT = BootFile(
    "etc/systemd/system/multi-user.target.wants/vfiotool-boot.service",
    link="../vfiotool-boot.service",
)


def listing(root: Path) -> dict[str, str]:
    """Every file, link and folder below `root`, with mode and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = f"{path.stat().st_mode & 0o777:o} {path.read_text()}"
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    (tmp_path / "etc/keep").write_text("mine")
    return tmp_path


def test_what_is_installed_is_removed_to_the_last_folder(root: Path) -> None:
    before = listing(root)
    install(str(root), [UNIT, HOOK, WANT], {"early": True})
    assert (root / HOOK.path).stat().st_mode & 0o777 == 0o755
    assert os.readlink(root / WANT.path) == "../vfiotool-boot.service"
    assert changed_files(str(root), read_manifest(str(root)) or pytest.fail("none")) == {}
    removed, kept = remove_installed(str(root))
    assert not kept and UNIT.path in removed
    assert listing(root) == before


def test_a_second_installation_replaces_the_first(root: Path) -> None:
    before = listing(root)
    install(str(root), [UNIT, HOOK], {})
    newer = BootFile(UNIT.path, "[Unit]\nDescription=x\n")
    install(str(root), [newer], {})
    assert (root / UNIT.path).read_text() == newer.content
    assert not (root / HOOK.path).exists()
    remove_installed(str(root))
    assert listing(root) == before


def test_a_strangers_file_of_the_same_name_is_refused_before_anything_is_written(
    root: Path,
) -> None:
    (root / UNIT.path).write_text("somebody else's")
    before = listing(root)
    with pytest.raises(Refused, match="not what vfiotool installed"):
        install(str(root), [HOOK, UNIT], {})
    assert listing(root) == before


def test_a_file_that_somebody_changed_is_kept_and_named(root: Path) -> None:
    install(str(root), [UNIT, HOOK], {})
    (root / UNIT.path).write_text("[Unit]\n# mine now\n")
    assert changed_files(str(root), read_manifest(str(root)) or pytest.fail("none")) == {
        UNIT.path: "changed"
    }
    removed, kept = remove_installed(str(root))
    assert kept == [UNIT.path] and HOOK.path in removed
    assert (root / UNIT.path).read_text() == "[Unit]\n# mine now\n"
    remove_installed(str(root), changed_too=True)
    assert not (root / UNIT.path).exists() and not (root / MANIFEST).exists()


@pytest.mark.parametrize("place", ["etc/vfiotool", "etc/vfiotool/boot", "etc/initramfs-tools"])
def test_a_link_planted_for_a_folder_is_refused_and_not_followed(root: Path, place: str) -> None:
    outside = root.parent / f"{root.name}-outside"
    outside.mkdir()
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).symlink_to(outside)
    with pytest.raises(Refused, match="link"):
        install(str(root), [HOOK], {})
    assert list(outside.iterdir()) == []


def test_a_link_planted_for_a_file_is_refused_and_not_followed(root: Path) -> None:
    target = root / "etc/shadow"
    target.write_text("secret")
    (root / UNIT.path).symlink_to(target)
    with pytest.raises(Refused):
        install(str(root), [UNIT], {})
    (root / UNIT.path).unlink()
    (root / "etc/vfiotool/boot").mkdir(parents=True)
    (root / MANIFEST).symlink_to(target)
    with pytest.raises(Refused, match="symbolic link"):
        install(str(root), [UNIT], {})
    assert target.read_text() == "secret"


def test_a_folder_that_others_may_write_to_is_refused(root: Path) -> None:
    (root / "etc/vfiotool").mkdir()
    (root / "etc/vfiotool").chmod(0o777)
    with pytest.raises(Refused, match="others"):
        install(str(root), [UNIT], {})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "files": [], "folders": [], "settings": {}}',
        '{"version": 1, "files": [{"path": "../x", "sha256": "0"}], "folders": [], "settings": {}}',
        '{"version": 1, "files": [{"path": "/x", "sha256": "0"}], "folders": [], "settings": {}}',
        '{"version": 1, "files": [], "folders": ["etc/../.."], "settings": {}}',
        '{"version": 1, "files": [{"path": "etc/passwd", "sha256": "0"}], "folders": [], '
        '"settings": {}}',
        '{"version": 1, "files": [], "folders": ["etc/ssh"], "settings": {}}',
        '{"version": 1, "files": [], "folders": [], "settings": {"command": 5}}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_could_lead_elsewhere_is_refused(root: Path, text: str) -> None:
    (root / "etc/vfiotool/boot").mkdir(parents=True)
    (root / MANIFEST).write_text(text)
    with pytest.raises(KernelError, match="not a manifest"):
        remove_installed(str(root))


class Crash(Exception):
    pass


@pytest.mark.parametrize("at", range(30))
def test_a_crash_at_any_rename_or_unlink_leaves_what_disable_can_remove(
    root: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Old, new or nothing at each path; and after `remove_installed` the tree is as at first."""
    before = listing(root)
    count = 0

    def counted(real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            if count == at + 1:
                raise Crash
            return real(*args, **kwargs)

        return call

    newer = BootFile(UNIT.path, "[Unit]\nDescription=x\n")
    with monkeypatch.context() as patch:
        for name in ("rename", "fsync", "mkdir"):
            patch.setattr(boot_files.os, name, counted(getattr(os, name)))
        try:
            install(str(root), [UNIT, HOOK], {})
            install(str(root), [newer, WANT], {})
        except Crash:
            pass
    for file in (UNIT, HOOK):
        path = root / file.path
        assert not path.exists() or path.read_text() in (file.content, newer.content)
    remove_installed(str(root))
    leftovers = {path: text for path, text in listing(root).items() if path not in before}
    # A crash while the very first folders are made comes before the manifest that names them.
    assert all(text == "folder" for text in leftovers.values()), leftovers
    assert at < 7 or not leftovers


def test_a_torn_scratch_file_is_taken_away_by_the_next_installation(root: Path) -> None:
    (root / "etc/systemd/system/.vfiotool-boot.service.vfiotool-new").write_text("half")
    install(str(root), [UNIT], {})
    remove_installed(str(root))
    assert list((root / "etc/systemd/system").iterdir()) == []


def test_the_manifest_is_readable_json(root: Path) -> None:
    install(str(root), [UNIT], {"early": False})
    value = json.loads((root / MANIFEST).read_text())
    assert value["files"] == [{"path": UNIT.path, "sha256": UNIT.digest}]
    assert InstallRoot(str(root)).read("etc/nothing") is None
