"""A session file comes back as it was written, or says what is wrong with it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meristem.checkpoint import migrate
from meristem.errors import CheckpointCorrupt, CheckpointTooNew, NoCheckpoint, RunError
from meristem.serve import store


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "ada.session"
    tensors = {"state.layer.matrix_bhkv": torch.randn(1, 2, 3, 5), "state.tail_btd": torch.randn(1, 2, 7).bfloat16()}
    store.write(path, tensors, {"name": "Ada \N{SNOWMAN}", "n_tokens": 13, "integers": {"layer.position": 13}})
    return path, tensors


def test_what_was_written_comes_back(file):
    """Tensors to the bit, header to the value."""
    path, tensors = file
    found = store.read(path)
    assert found.header == {"name": "Ada \N{SNOWMAN}", "n_tokens": 13, "integers": {"layer.position": 13}}
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_every_flipped_byte_is_found(file):
    """Whichever byte is altered, header and hash included, the file is refused."""
    path, _ = file
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x04
        path.write_bytes(flipped)
        with pytest.raises(CheckpointCorrupt, match="not an intact session file"):
            store.read(path)


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_found(tmp_path_factory, share):
    """However much of its end is missing."""
    path = tmp_path_factory.mktemp("torn") / "a.session"
    store.write(path, {"a": torch.arange(17.0)}, {"n_tokens": 3})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointCorrupt, match="not an intact session file"):
        store.read(path)


def test_a_newer_schema_is_refused(file, monkeypatch):
    """A file of a later version, of its header or of its state, is intact and still not read."""
    path, tensors = file
    for section, readable in ((store.HEADER, 2), (store.STATE, 2)):
        monkeypatch.setitem(migrate.SECTIONS, section, (lambda content, _: content,) * 98)
        store.write(path, tensors, {})
        monkeypatch.undo()
        with pytest.raises(CheckpointTooNew, match=f"'{section}' is of version 99; .* reads up to {readable}. Update"):
            store.read(path)


def test_a_missing_file_is_named(tmp_path):
    """The message names the path and what could stand there."""
    with pytest.raises(NoCheckpoint, match=r"absent\.session.*No such file"):
        store.read(tmp_path / "absent.session")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """A directory under a plain file: an error of ours, and nothing half-written."""
    (tmp_path / "plain").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        store.write(tmp_path / "plain" / "a.session", {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
