"""Folding lines on a terminal."""

from __future__ import annotations

import pytest

from vfiotool.cli.fold import cut, fold


def texts(runs: list[tuple[str, str]], width: int | None) -> list[str]:
    return ["".join(text for text, _ in line) for line in fold(runs, width)]


LINE = [("  mounted", "red"), ("  nvme1n1 is mounted on /run/data (ext4)", "")]


def test_a_line_that_fits_stays() -> None:
    assert fold(LINE, 80) == [LINE] and fold(LINE, None) == [LINE]


def test_a_long_line_is_folded_between_words_and_indented() -> None:
    assert texts(LINE, 30) == ["  mounted  nvme1n1 is mounted", "      on /run/data (ext4)"]


@pytest.mark.parametrize("width", range(1, 60))
def test_no_word_is_lost_or_torn_at_any_width(width: int) -> None:
    found = texts(LINE, width)
    assert " ".join(" ".join(found).split()) == "mounted nvme1n1 is mounted on /run/data (ext4)"
    assert all(len(line) <= width or len(line.split()) == 1 for line in found)


def test_styles_stay_with_their_words() -> None:
    runs = [("a", "bold"), ("b", "red"), (" ccc ddd", "dim")]
    first, second = fold(runs, 6)
    assert first == [("a", "bold"), ("b", "red"), (" ", ""), ("ccc", "dim")]
    assert second == [("ddd", "dim")]
    assert fold([("aa bb cc", "dim")], 5) == [[("aa bb", "dim")], [("cc", "dim")]]


def test_a_line_to_type_is_left_whole() -> None:
    line = [("  vfiotool bind --whole-group 0000:05:02.0", "cyan")]
    assert fold(line, 20) == [line]
    line = [("    fix: ", ""), ("echo 1024 > /sys/a/long/path", "cyan")]
    assert fold(line, 20) == [line]


def test_a_line_with_a_word_in_that_style_is_folded() -> None:
    assert texts([("0000:00:1f.2  ", ""), ("available", "cyan"), ("  a controller", "")], 30) == [
        "0000:00:1f.2  available  a",
        "    controller",
    ]


@pytest.mark.parametrize(
    ("most", "wanted"),
    [
        (80, [12, 9, 10, 30]),
        (60, [12, 9, 10, 23]),
        (43, [12, 9, 10, 6]),
        (42, [12, 9, 10]),
        (34, [12, 9, 9]),
        (24, [12, 9]),
        (1, [12]),
    ],
)
def test_columns_that_do_not_fit_are_cut_or_left_out_from_the_last(
    most: int, wanted: list[int]
) -> None:
    assert cut([12, 9, 10, 30], most) == wanted


def test_a_narrow_column_is_shown_whole() -> None:
    assert cut([12, 1, 2], 19) == [12, 1, 2]
    assert cut([12, 1, 2], 18) == [12, 1]
