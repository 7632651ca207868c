"""runtime/inputs: when what runs differs from what is configured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from llmhost.catalogue import ROOT

PROGRAM = str(ROOT / "runtime/inputs")
UNIT = "vllm.service"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / name for name in ("vllm.yaml", "vllm.env", "secret.env")]
    for path in made:
        path.write_text(f"{path.name}\n")
    return made


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


def inputs(run_directory: Path, *arguments: object) -> int:
    environment = {**os.environ, "LLMHOST_RUN": str(run_directory)}
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], env=environment, timeout=30, stdin=subprocess.DEVNULL
    ).returncode


def record(run_directory: Path, *files: Path, unit: str = UNIT) -> None:
    assert inputs(run_directory, "record", unit, *files) == 0


def stale(run_directory: Path, *files: Path, unit: str = UNIT) -> bool:
    return inputs(run_directory, "stale", unit, *files) == 0


def test_a_unit_that_never_recorded_its_start_is_stale(run_directory: Path, files: list[Path]) -> None:
    assert stale(run_directory, *files)


def test_what_was_recorded_is_not_stale(run_directory: Path, files: list[Path]) -> None:
    record(run_directory, *files)
    assert not stale(run_directory, *files)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_one_changed_file_of_several_is_enough(run_directory: Path, files: list[Path], changed: int) -> None:
    record(run_directory, *files)
    files[changed].write_text("other\n")
    assert stale(run_directory, *files)
    record(run_directory, *files)
    assert not stale(run_directory, *files)


def test_a_file_written_again_with_the_same_content_is_no_change(run_directory: Path, files: list[Path]) -> None:
    record(run_directory, *files)
    text = files[0].read_text()
    files[0].unlink()
    files[0].write_text(text)
    os.utime(files[0], (0, 0))
    assert not stale(run_directory, *files)


def test_a_change_taken_back_is_no_change(run_directory: Path, files: list[Path]) -> None:
    record(run_directory, *files)
    text = files[1].read_text()
    files[1].write_text("tried out\n")
    files[1].write_text(text)
    assert not stale(run_directory, *files)


def test_contents_that_changed_places_are_a_change(run_directory: Path, files: list[Path]) -> None:
    record(run_directory, *files)
    first, second = files[0].read_text(), files[1].read_text()
    files[0].write_text(second)
    files[1].write_text(first)
    assert stale(run_directory, *files)


def test_another_set_of_files_is_a_change(run_directory: Path, files: list[Path]) -> None:
    """A new release of llmhost may let a unit depend on one file more."""
    record(run_directory, *files[:2])
    assert stale(run_directory, *files)
    assert stale(run_directory, files[0])
    assert not stale(run_directory, *files[:2])


def test_a_file_that_goes_or_comes_is_a_change(run_directory: Path, files: list[Path]) -> None:
    record(run_directory, *files)
    files[2].unlink()
    assert stale(run_directory, *files)
    record(run_directory, *files)
    assert not stale(run_directory, *files)
    files[2].write_text("secret.env\n")
    assert stale(run_directory, *files)


def test_units_are_kept_apart(run_directory: Path, files: list[Path]) -> None:
    record(run_directory, files[0])
    assert stale(run_directory, files[0], unit="open-webui.service")
    record(run_directory, files[1], unit="open-webui.service")
    assert not stale(run_directory, files[0])


def test_looking_records_nothing(run_directory: Path, files: list[Path]) -> None:
    assert stale(run_directory, *files)
    assert not run_directory.exists()


def test_a_record_holds_no_content(run_directory: Path, files: list[Path]) -> None:
    """Any user may read it, and a secret is among the files."""
    files[2].write_text("VLLM_API_KEY=not-for-others\n")
    record(run_directory, *files)
    assert "not-for-others" not in "".join(path.read_text() for path in run_directory.iterdir())


def test_a_start_that_cannot_be_recorded_fails(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "taken").write_text("a file where a directory is wanted")
    assert inputs(tmp_path / "taken", "record", UNIT, *files) != 0


def test_an_unknown_word_is_no_answer(run_directory: Path, files: list[Path]) -> None:
    """Exit 0 would say stale."""
    assert inputs(run_directory, "state", UNIT, *files) != 0
