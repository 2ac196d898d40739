"""``meristem checkpoint`` works on the files alone and names what is wrong with them."""

import shutil

import pytest

from meristem.cli import run


@pytest.fixture
def copy(finished, tmp_path):
    """A run of our own."""
    shutil.copytree(finished, tmp_path / "ada")
    return tmp_path / "ada"


def steps(found):
    return [row["step"] for row in found]


def test_ls_lists_what_is_whole(copy, answered):
    """By step, with metrics; a run and its checkpoints directory are the same place."""
    code, rows = answered("checkpoint", "ls", copy)
    assert (code, steps(rows)) == (0, [10, 20])
    assert rows[0]["metrics"] == {"val/bits_per_byte": 3.0}
    assert answered("checkpoint", "ls", copy / "checkpoints")[1] == rows


def test_verify_names_each_truncated_file(copy, answered):
    """CX-7.8: Every file in turn, the manifest included."""
    place = copy / "checkpoints" / "step-00000010"
    assert answered("checkpoint", "verify", place)[1]["intact"]
    for path in sorted(place.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        code, report = answered("checkpoint", "verify", place)
        assert (code, report["intact"], len(report["faults"])) == (1, False, 1)
        assert path.name in report["faults"][0]
        path.write_bytes(content)


def test_show_prints_the_manifest(copy, capsys):
    """The newest one of a run."""
    assert run(["checkpoint", "show", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "meristem.checkpoint/2" in out and "metrics.val/bits_per_byte" in out


def test_diff_says_what_differs(copy, answered):
    """CX-7.8: Two checkpoints of other weights differ in them, one and itself in nothing."""
    first, second = (copy / "checkpoints" / f"step-000000{step}" for step in (10, 20))
    code, difference = answered("checkpoint", "diff", first, second)
    assert (code, difference["manifest"]["step"]) == (1, [10, 20])
    assert any(name.startswith("model/blocks.0") for name in difference["tensors"])
    code, difference = answered("checkpoint", "diff", first, first)
    assert (code, any(difference.values())) == (0, False)


def test_prune_keeps_what_is_pinned(copy, answered):
    """Age and rank let go of a checkpoint, a pin holds it, and taking the pin away lets it go."""
    first = copy / "checkpoints" / "step-00000010"
    assert answered("checkpoint", "pin", first)[1]["pinned"]
    prune = ("checkpoint", "prune", copy, "--last", 1, "--best", 1)
    assert answered(*prune)[1] == {"deleted": []}
    assert not answered("checkpoint", "pin", first, "--remove")[1]["pinned"]
    assert answered(*prune)[1] == {"deleted": [str(first)]}
    assert steps(answered("checkpoint", "ls", copy)[1]) == [20]


def test_an_empty_place_is_named(tmp_path, capsys):
    """No checkpoint is an error of the data kind."""
    assert run(["checkpoint", "show", str(tmp_path)]) == 4
    assert f"no checkpoint in {tmp_path}" in capsys.readouterr().err
