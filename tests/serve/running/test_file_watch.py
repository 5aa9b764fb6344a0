"""The watch that starts a reload."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from penstock.serve.running.file_watch import FileWatch


def test_changed_new_and_deleted_files_are_returned_and_hidden_folders_are_not(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / ".venv").mkdir()
    changed, deleted, new = tmp_path / "app.py", tmp_path / "inner" / "old.py", tmp_path / "inner" / "new.py"
    changed.write_text("a = 1\n")
    deleted.write_text("")
    watch = FileWatch([tmp_path])
    changed.write_text("a = 100\n")
    deleted.unlink()
    new.write_text("")
    (tmp_path / ".venv" / "library.py").write_text("")
    (tmp_path / "data.bin").write_bytes(b"1")
    assert watch.wait(Event()) == sorted(map(str, (changed, deleted, new)))


def test_a_watch_that_is_stopped_returns_nothing(tmp_path: Path) -> None:
    stop = Event()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(FileWatch([tmp_path]).wait, stop)
        stop.set()
        assert waiting.result(timeout=60) == []
