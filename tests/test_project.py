"""What stands beside the code: the list of needs, the lock file, what is packed, make's help."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vfiotool.lab import needs

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("build", "lab", "kernel", "test")


def bash(script: str, *arguments: str) -> str:
    done = subprocess.run(
        ["bash", "-c", script, "bash", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def from_bootstrap(name: str) -> str:
    """The text of one of bootstrap's functions."""
    text = (ROOT / "bootstrap").read_text()
    found = re.search(rf"^{name}\(\) \{{.*?^\}}", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(0)


def test_bootstrap_and_the_lab_see_the_same_things_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has nothing: both name all that the list has, in its order."""
    monkeypatch.setattr(needs.Need, "is_here", lambda need: False)
    expected = list(dict.fromkeys(n.package for n in needs.missing(*INSTALLED)))
    script = f"is_here() {{ false; }}\n{from_bootstrap('look')}\nmissing=() wanting=()\nlook\n"
    said = bash(script + 'printf "%s\\n" "${missing[@]}"').split()
    # Where these are not, nothing can be installed anyway.
    assert said == [name for name in expected if name not in ("apt", "dpkg")]


@pytest.mark.parametrize("need", needs.needs(), ids=lambda need: f"{need.use}-{need.package}")
def test_bootstrap_and_the_lab_look_in_the_same_way(need: needs.Need) -> None:
    kind = need.seen_by.partition(":")[0]
    if kind in ("python", "header"):
        # bootstrap asks the interpreter that it found, in one go.
        assert need.use == "build"
        return
    script = (
        f"python=x\n{from_bootstrap('is_here')}\nis_here '{need.seen_by}' && echo yes || echo no"
    )
    assert bash(script).strip() == ("yes" if need.is_here() else "no")


def test_the_docs_list_what_the_list_has() -> None:
    text = (ROOT / "docs/lab.md").read_text()
    table = text.partition("## What it needs")[2].partition("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| `")]
    documented = {(cells[0].strip("`"), use) for cells in rows for use in cells[1].split(", ")}
    assert documented == {(need.package, need.use) for need in needs.needs()}


def test_every_requirement_is_locked_with_digests_of_its_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
    ]
    names = {re.match(r"[\w.-]+", text).group(0) for text in wanted}  # type: ignore[union-attr]
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^([\w.-]+)==\S+.*?((?:\n    --hash=sha256:[0-9a-f]{64}.*)+)", lock, re.M)
    assert names <= {name for name, _ in entries}
    assert len(entries) == len(re.findall(r"^[\w.-]+==", lock, re.M)), "one without a digest"
    assert "://" not in lock, "a lock file names no registry"


def test_what_runs_is_locked_in_the_versions_that_are_tested() -> None:
    def entries(name: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==\S+", (ROOT / name).read_text(), re.M))

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.match(r"[\w.-]+", text).group(0) for text in project["dependencies"]}  # type: ignore[union-attr]
    run = entries("requirements-run.lock")
    assert run <= entries("requirements.lock")
    assert wanted <= {entry.partition("==")[0] for entry in run}


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert targets is not None
    said = bash("make -s help")
    missing = [t for t in targets.group(1).split() if t != "help" and f"make {t} " not in said]
    assert not missing


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md")), ids=lambda path: path.stem
)
def test_issue_templates_ask_for_a_snapshot_without_names(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("---\nname: ") and "\nabout: " in text
    assert "vfiotool snapshot --anonymize host.gz" in text


@pytest.mark.slow
def test_the_source_archive_holds_the_whole_tree(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a clone, to know what the tree is")
    tree = tmp_path / "tree"
    tracked = bash("git ls-files").splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    script = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, check=True)
    [archive] = (tree / "dist").iterdir()
    names = bash('tar -tzf "$1"', str(archive)).splitlines()
    packed = {name.partition("/")[2] for name in names}
    assert {name for name in tracked if (ROOT / name).is_file()} <= packed
