"""Files are replaced as a whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from ppcl_rt import files


@pytest.mark.parametrize("many_writers", [False, True])
def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path, many_writers):
    path = tmp_path / "new" / "file"
    for content in ("old", "new"):
        with files.replacing(path, many_writers=many_writers) as temporary:
            temporary.write_text(content)
            assert not path.exists() if content == "old" else path.read_text() == "old"
        assert path.read_text() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_an_error_inside_keeps_the_file(tmp_path):
    files.write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(KeyError), files.replacing(tmp_path / "file") as temporary:
        temporary.write_text("cut")
        raise KeyError
    assert (tmp_path / "file").read_text() == '{\n "a": 1\n}\n' and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with files.replacing(tmp_path / "file") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        with files.replacing_folder(tmp_path / "folder", lambda _: True) as partial:
            save_file({"x": torch.zeros(1)}, partial / "file")
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    found = {(tmp_path / name).stat().st_mode for name in ("file", "folder/file", "plain")}
    assert len(found) == 1 and found.pop() & 0o777 == 0o666 & ~mask


def test_the_next_write_removes_what_a_kill_left(tmp_path):
    left = tmp_path / ".file.partial"
    left.mkdir()
    (left / "file").write_text("cut")
    files.write_json(tmp_path / "file", {})
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_in_one_line():
    assert files.one_line(ValueError("one\n  two\t three ")) == "one two three"
