"""One small checkpoint with something of everything, told apart by a number."""

import torch

from meristem.checkpoint.store import Checkpoint, save


def save_sample(root, step, number=0, **header):
    """Save a checkpoint whose every part carries ``number``."""
    return save(
        root,
        step=step,
        trees={"model": model_tree(number), "memory": {}},
        values={"cursor": {"position": number, "key": "9007199254740993"}, "progress": [number, 0.1, None, "é"]},
        files={"config.yaml": f"number: {number}\n".encode(), "tokenizer.json": b"{}"},
        header={"run": "r", **header},
    )


def model_tree(number):
    """Tensors of several dtypes and layouts, none of them square."""
    base = torch.arange(15, dtype=torch.float32).reshape(3, 5) + number
    return {
        "embed.weight": base.t(),
        "scale": torch.tensor(number, dtype=torch.float64),
        "half": base.bfloat16()[:, 1:4],
        "mask": base > 7,
        "steps": torch.tensor([2**62 + number]),
        "none": torch.zeros(0, 7),
    }


def number_of(checkpoint: Checkpoint) -> int:
    """The number a sample carries, after checking that every part agrees on it."""
    number = checkpoint.value("cursor")["position"]
    assert checkpoint.value("progress")[0] == number
    assert checkpoint.file("config.yaml") == f"number: {number}\n".encode()
    tree = checkpoint.tree("model")
    for name, tensor in model_tree(number).items():
        assert torch.equal(tree[name], tensor), name
        assert tree[name].dtype == tensor.dtype, name
    return int(number)
