"""Rows of a batch are filled up where the export was told, and with what; and each is written as it is alone."""

from pathlib import Path

import orjson
import pytest
import torch

from meristem.checkpoint import store
from meristem.cli import run
from meristem.config import dump_yaml
from meristem.data.config import TokenizerConfig
from meristem.data.tokenizer import train_tokenizer
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.nn.config import MemoryConfig

pytestmark = pytest.mark.extras
MODELS = {
    "plain": ModelConfig(mixer="attention", dim=24, n_layers=2, n_heads=2, mlp_dim=40, sliding_window=None),
    "meristem": ModelConfig(dim=24, n_layers=2, n_heads=2, mlp_dim=40, sliding_window=5),
}
MEMORY = MemoryConfig(head_dim=12, chunk=4)
MARKS = ("<pad>", "</s>")
PAD, END = 256, 257


def exported(place: Path, *words: str, kind: str = "meristem", marks: tuple[str, ...] = MARKS) -> Path:
    """The folder of a model with first weights, whose tokenizer has the bytes and these special tokens."""
    config = TokenizerConfig(special_tokens=marks, eos_token="</s>" if "</s>" in marks else None)
    tokenizer = train_tokenizer(config, ())
    made = build(MODELS[kind], MEMORY, tokenizer.vocab_size, random_seed=3)
    settings = {"model": MODELS[kind].model_dump(mode="json"), "memory": MEMORY.model_dump(mode="json")}
    files = {"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": tokenizer.to_bytes()}
    store.save(place / "run", step=7, trees={"model": made.state_dict()}, values={}, files=files, header={})
    assert run(["export", "hf", str(place / "run"), "--to", str(place / "hf"), *words]) == 0
    return place / "hf"


@pytest.mark.parametrize("words, side", [((), "left"), (("--padding-side", "right"), "right")], ids=["unset", "right"])
def test_cx_1_3_padding_sides_truncation_and_lengths_are_those_that_are_asked_for(tmp_path, words, side):
    """Ids by hand: to the longest, to a length, cut to a length."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported(tmp_path, *words))
    assert (theirs.padding_side, theirs.pad_token_id, theirs.eos_token_id) == (side, PAD, END)
    texts = {"abc": [97, 98, 99], "d": [100]}

    def filled(length):
        rows, mask = [], []
        for ids in texts.values():
            ids, fill = ids[:length], [PAD] * (length - len(ids))
            rows.append([*fill, *ids] if side == "left" else [*ids, *fill])
            mask.append([int(each != PAD) for each in rows[-1]])
        return {"input_ids": rows, "attention_mask": mask}

    assert dict(theirs(list(texts))) == {"input_ids": [*texts.values()], "attention_mask": [[1, 1, 1], [1]]}
    assert dict(theirs(list(texts), padding=True)) == filled(3)
    assert dict(theirs(list(texts), padding="max_length", max_length=5)) == filled(5)
    assert dict(theirs(list(texts), padding=True, truncation=True, max_length=2)) == filled(2)


@pytest.mark.parametrize("kind", ["plain", "meristem"])
def test_a3_a_padded_batch_is_written_as_its_rows_are_alone(tmp_path, kind):
    """From texts to texts, with what the folder says alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import meristem.export.hub  # noqa: F401 - registers the model

    place = exported(tmp_path, kind=kind)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    texts = ["Ada lives in", "Eva", "A longer text than both"]
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    assert (padded["attention_mask"] == 0).any()
    written = model.generate(**padded, max_new_tokens=5, do_sample=False)[:, padded["input_ids"].shape[1] :]
    for row, text in enumerate(texts):
        alone = tokenizer(text, return_tensors="pt")
        expected = model.generate(**alone, max_new_tokens=5, do_sample=False)[0, alone["input_ids"].shape[1] :].tolist()
        assert written[row].tolist() == expected + [PAD] * (5 - len(expected))


def test_a3_generate_ends_where_the_tokenizer_ends_a_text(tmp_path):
    from transformers import AutoModelForCausalLM

    import meristem.export.hub  # noqa: F401 - registers the model

    model = AutoModelForCausalLM.from_pretrained(exported(tmp_path)).eval()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (END, PAD)
    scores = lambda ids, logits: torch.full_like(logits, -9.0).index_fill(1, torch.tensor([END]), 9.0)  # noqa: E731
    written = model.generate(torch.tensor([[97, 98]]), max_new_tokens=5, do_sample=False, logits_processor=[scores])
    assert written.tolist() == [[97, 98, END]]


@pytest.mark.parametrize(
    "marks, words, name",
    [
        (("</s>",), (), None),
        (("</s>",), ("--pad-token", "</s>"), "</s>"),
        (MARKS, ("--pad-token", "</s>"), "</s>"),
        ((), (), None),
    ],
)
def test_a_token_for_padding_is_the_named_one_or_one_called_so_or_none(tmp_path, marks, words, name):
    """A tokenizer of bytes alone has none: each of its ids is a text."""
    from transformers import AutoTokenizer

    place = exported(tmp_path, *words, marks=marks)
    theirs = AutoTokenizer.from_pretrained(place)
    assert theirs.pad_token == name and (place / "generation_config.json").exists() == bool(marks)
    if name is None:
        theirs.pad_token_id = 0  # as the card of the folder says
        found = theirs(["abc", "\u0100"], padding=True)
        assert found["input_ids"] == [[97, 98, 99], [0, 196, 128]]
        assert found["attention_mask"] == [[1, 1, 1], [0, 1, 1]]


def test_cx_1_3_a_token_that_is_none_is_refused_before_anything_is_made(tmp_path, capsys):
    exported(tmp_path)
    assert run(["export", "hf", str(tmp_path / "run"), "--to", str(tmp_path / "new"), "--pad-token", "[PAD]"]) == 2
    assert "no special token of that name: it has '<pad>', '</s>'" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "new").exists()
    described = orjson.loads((tmp_path / "hf" / "tokenizer_config.json").read_bytes())
    assert (described["padding_side"], described["pad_token"]) == ("left", "<pad>")
