"""The demonstration: a scene that goes wrong is seen, is counted, and does not stop the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from vfiotool.lab.inside.scenes import Scene, SceneFailed, Stage, differences, play, possible


def test_a_command_is_shown_with_its_output_and_its_code_is_checked(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stage = Stage(colour=False)
    assert stage.run("sh -c 'echo seen; exit 4'", expect=4) == "seen\n"
    assert capfd.readouterr().out == "$ sh -c 'echo seen; exit 4'\nseen\n(exit code 4)\n"
    with pytest.raises(SceneFailed, match="ended with 1, not 0"):
        stage.run("false")
    with pytest.raises(SceneFailed, match="ended with 0, not 4"):
        stage.run("true", expect=4)


def test_a_scene_that_fails_is_named_and_the_others_are_played() -> None:
    played: list[str] = []

    def good(stage: Stage) -> None:
        stage.check("true", True)
        played.append("good")

    def wrong(stage: Stage) -> None:
        stage.check("false", False)

    def broken(_stage: Stage) -> None:
        raise OSError("no such thing")

    scenes = (Scene("a", wrong), Scene("b", broken), Scene("c", good))
    assert play(scenes, Stage(colour=False)) == ["a", "b"]
    assert played == ["good"]


def test_a_scene_that_this_guest_cannot_show_is_named_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(stage: Stage) -> None:
        stage.check("true", True)

    scenes = (Scene("a", good), Scene("b", good, tmp_path / "absent"), Scene("c", good, tmp_path))
    assert [scene.title for scene in possible(scenes, Stage(colour=False))] == ["a", "c"]
    said = capsys.readouterr().out
    assert said == f"left out, since this kernel has no {tmp_path / 'absent'}: b\n"


def test_every_difference_of_two_states_is_named() -> None:
    before = {"functions": {"a": {"driver": "nvme", "vfs": "0"}}, "mdevs": []}
    after = {"functions": {"a": {"driver": None, "vfs": "0"}, "b": {}}, "mdevs": ["x"]}
    assert differences(before, before) == []
    found = differences(before, after)
    assert len(found) == 3
    assert "functions a driver: nvme is now None" in found
