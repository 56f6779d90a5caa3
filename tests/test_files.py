"""files: whole or not there, whatever ends the writing; what a killed process left is swept; damage is named."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlab import files, ledger
from quantlab.files import new_folder, read_json, settle, write_json, write_whole

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("content", ["größer", b"\0\1", lambda path: path.write_text("written")])
def test_a_file_is_written_whole_and_alone(tmp_path, content):
    path = tmp_path / "x.[1]*"  # letters that a pattern would take for its own
    for _ in range(2):
        assert write_whole(path, content) == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no"), OSError(28, "No space left on device")])
def test_whatever_ends_the_writing_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    write_whole(path, "old")

    def fail(part):
        part.write_text("ne")
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        write_whole(path, fail)
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (28, str(path))
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


@pytest.mark.parametrize("content", ["new", lambda path: path.write_text("new")])
def test_a_file_is_looked_at_before_it_takes_its_place(tmp_path, content):
    path, seen = tmp_path / "x", []
    write_whole(path, "old")

    def refuse(part):
        seen.append((part.read_text(), path.read_text()))
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        write_whole(path, content, refuse)
    assert seen == [("new", "old")]
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    assert write_whole(path, content, lambda part: None) == 3
    assert path.read_text() == "new"


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_whole(tmp_path / "typo" / "x", "text")
    with pytest.raises(FileNotFoundError, match="no folder"):
        ledger.append(ledger.read(ROOT / "data/ledger.csv")[0], tmp_path / "typo" / "deep" / "ledger.csv")
    assert list(tmp_path.iterdir()) == []


def killed(code: str, folder: Path) -> None:
    """Run code that stops at "ready" until it is killed."""
    script = (
        f"import sys, time\nfrom pathlib import Path\nfrom quantlab.files import *\nfolder = Path(sys.argv[1])\n{code}"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)


SLOW = "print('ready', flush=True); time.sleep(600)"


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    write_whole(tmp_path / "x", "old")
    killed(f"def slow(part):\n    part.write_text('ne')\n    {SLOW}\nwrite_whole(folder / 'x', slow)", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "x").read_text() == "old"
    write_whole(tmp_path / "y", "another file's leftovers are not touched")
    assert len(list(tmp_path.iterdir())) == 3
    write_whole(tmp_path / "x", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_living_process_keeps_its_part(tmp_path):
    other = tmp_path / f"x.{files._HOST}-{os.getpid()}-7.part"
    other.write_text("mine")
    write_whole(tmp_path / "x", "text")
    assert other.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_that_is_interrupted_between_its_renames_is_the_old_one(tmp_path, monkeypatch, error, number):
    fill(tmp_path / "m", "old")
    rename, calls = Path.rename, []

    def failing(self, to):
        calls.append(to)
        if len(calls) == number:
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        fill(tmp_path / "m", "new")
    assert (tmp_path / "m" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def fill(folder: Path, text: str) -> None:
    with new_folder(folder) as new:
        (new / "x").write_text(text)


def test_a_folder_whose_writer_was_killed_comes_back(tmp_path):
    """Killed before the first rename, and between the two."""
    fill(tmp_path / "m", "old")
    killed(f"with new_folder(folder / 'm') as new:\n    {SLOW}", tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    settle(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    between = "import quantlab.files\nreal = Path.rename\ndef rename(self, to):\n    if self.suffix == '.new':\n"
    between += f"        {SLOW}\n    return real(self, to)\nPath.rename = rename\n"
    killed(between + "with new_folder(folder / 'm') as new:\n    (new / 'x').write_text('new')", tmp_path)
    assert not (tmp_path / "m").exists()
    settle(tmp_path / "m")
    assert (tmp_path / "m" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_json_there_and_back_and_damaged(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"steps": 3, "log": [1.5]})
    assert read_json(path, {"steps": int, "log": list}) == {"steps": 3, "log": [1.5]}
    with pytest.raises(ValueError, match=r"x\.json is damaged: 'seed' is 'missing'"):
        read_json(path, {"seed": int})
    with pytest.raises(ValueError, match=r"x\.json is damaged: 'steps' is 3"):
        read_json(path, {"steps": str})
    for text in ("[1]", '{"steps": ', "\udcff"):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            read_json(path, {"steps": int})
    with pytest.raises(FileNotFoundError, match="no file"):
        read_json(tmp_path / "nothing")


def test_tensors_that_the_disk_does_not_take_are_an_oserror_with_the_name(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from quantlab import storage

    def full(*_arguments):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(OSError, match=r"x\.safetensors could not be written"):
        storage.save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []
