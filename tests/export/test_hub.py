"""What transformers loads of an exported folder is the model: padding, beams and the cache included (A2, A3)."""

import shutil
from pathlib import Path

import pytest
import torch

from meristem.checkpoint import store
from meristem.cli import run
from meristem.config import dump_yaml
from meristem.data.tokenizer import Tokenizer, byte_tokenizer, library_file, tokenizer_from_bytes
from meristem.errors import CapabilityError, CheckpointMismatch, RunError, ShapeError, WrongValue
from meristem.events import silent
from meristem.models.build import build
from meristem.models.config import ModelConfig
from meristem.models.load import load
from meristem.nn.config import MemoryConfig
from zoo import ZOO

pytestmark = pytest.mark.extras
PLAIN = ModelConfig(mixer="attention", dim=24, n_layers=2, n_heads=2, mlp_dim=40, sliding_window=5)
WITH_MEMORY = ModelConfig(dim=24, n_layers=2, n_heads=2, mlp_dim=40, sliding_window=5)
MEMORY = MemoryConfig(head_dim=12, chunk=4)


def saved(place: Path, model: ModelConfig, memory: MemoryConfig) -> Path:
    """A checkpoint of a model with first weights, whose gates and branches do something."""
    made = build(model, memory, 256, random_seed=3)
    settings = {"model": model.model_dump(mode="json"), "memory": memory.model_dump(mode="json")}
    files = {"config.yaml": dump_yaml(settings).encode(), "tokenizer.json": byte_tokenizer().to_bytes()}
    header = {"tokens": 1234, "metrics": {"val/bits_per_byte": 2.5}}
    store.save(place / "checkpoints", step=7, trees={"model": made.state_dict()}, values={}, files=files, header=header)
    return place


def folder(place: Path, model: ModelConfig, memory: MemoryConfig = MEMORY, form: str = "meristem") -> Path:
    """An exported folder, and beside it the run that it was made of."""
    from meristem.export.hf import export

    export(saved(place / "run", model, memory), place / "hf", form=form, emit=silent)
    return place / "hf"


def opened(place: Path):
    from transformers import AutoModelForCausalLM

    import meristem.export.hub  # noqa: F401 - registers the model

    return AutoModelForCausalLM.from_pretrained(place).eval()


def ids(n_rows: int, n_time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n_rows, n_time), generator=torch.Generator().manual_seed(seed))


KINDS = "preset-charrnn preset-charformer preset-hope lm-mac-4-each preset-lmm-titans_mlp lm-hybrid-attention".split()


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_has_its_logits_to_the_bit(tmp_path, name):
    model, memory = ZOO[name]
    place = folder(tmp_path, model, memory)
    ours = load(tmp_path / "run").model
    assert torch.equal(opened(place)(input_ids=ids(2, 13)).logits, ours(ids(2, 13))[0])


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("form", ["plain", "meristem"])
def test_a2_tied_weights_survive_every_way(tmp_path, form, is_tied):
    """Exported, loaded, saved by transformers and taken back, it has the same logits to the bit; one table if tied."""
    from safetensors import safe_open

    from meristem.export.convert import to_checkpoint

    place = folder(tmp_path, PLAIN.model_copy(update={"tied": is_tied}), form=form)
    first = opened(place)
    assert first.config.model_type == ("mistral" if form == "plain" else "meristem")
    first.save_pretrained(tmp_path / "again")
    shutil.copy(place / "tokenizer.json", tmp_path / "again")
    for made in (place, tmp_path / "again"):
        with safe_open(made / "model.safetensors", "pt") as file:
            assert sum(file.get_slice(name).get_shape() == [256, 24] for name in file.keys()) == (1 if is_tied else 2)
    second = opened(tmp_path / "again")
    assert torch.equal(first(input_ids=ids(2, 13)).logits, second(input_ids=ids(2, 13)).logits)
    to_checkpoint(tmp_path / "again", tmp_path / "back")
    ours, back = load(tmp_path / "run"), load(tmp_path / "back")
    assert torch.equal(ours.model(ids(2, 13))[0], back.model(ids(2, 13))[0])
    assert back.tokenizer.fingerprint == ours.tokenizer.fingerprint
    optimizer = torch.optim.SGD(second.parameters(), lr=0.5)
    second(input_ids=ids(2, 13), labels=ids(2, 13)).loss.backward()
    optimizer.step()
    head = second.get_output_embeddings()
    table = second.get_input_embeddings().weight
    assert (head is None or head.weight is table) == is_tied
    assert (not torch.equal(table, first.get_input_embeddings().weight)) and second.num_parameters() == sum(
        each.numel() for each in ours.model.parameters()
    )


def test_a_plain_transformer_needs_nothing_of_ours(tmp_path):
    """Full attention is a Llama; its logits are ours within rounding, and no token ends the text."""
    place = folder(tmp_path, PLAIN.model_copy(update={"sliding_window": None}), form="auto")
    theirs, ours = opened(place), load(tmp_path / "run").model
    assert type(theirs).__name__ == "LlamaForCausalLM" and not (place / "modeling_meristem.py").exists()
    torch.testing.assert_close(theirs(input_ids=ids(2, 13)).logits, ours(ids(2, 13))[0], rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id is None and theirs.generation_config.pad_token_id is None


@pytest.mark.parametrize("model", [WITH_MEMORY, ZOO["preset-hope"][0]], ids=["mag", "hope"])
def test_a3_beam_search_is_that_of_forked_sessions(tmp_path, model):
    """``num_beams=3`` writes what a beam search over states, each forked by hand, writes."""
    memory = MEMORY if model is WITH_MEMORY else ZOO["preset-hope"][1]
    theirs, ours = opened(folder(tmp_path, model, memory)), load(tmp_path / "run").model
    prompt = ids(1, 6, seed=2)
    found = theirs.generate(prompt, num_beams=3, max_new_tokens=5, do_sample=False)
    assert found[0, 6:].tolist() == beams(ours, prompt, 3, 5)


@torch.no_grad()
def beams(model, prompt, n_beams: int, n_new: int) -> list[int]:
    """The likeliest text found by a plain beam search; every beam has a state of its own."""
    logits, state = model(prompt)
    alive = [(0.0, [], logits[0, -1], state)]
    for _ in range(n_new):
        options = [
            (score + float(gain), [*text, token], state)
            for score, text, logits, state in alive
            for token, gain in enumerate(logits.log_softmax(-1).tolist())
        ]
        best = sorted(options, key=lambda option: -option[0])[:n_beams]
        alive = []
        for score, text, state in best:
            logits, after = model(torch.tensor([[text[-1]]]), state)
            alive.append((score, text, logits[0, -1], after))
    return alive[0][1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[5], [3, 7, 1, 5]], ids=["one", "four"])
def test_a3_padding_changes_nothing(tmp_path, side, lengths):
    """Rows that are padded on either side read and write as they do alone; a batch of one is no exception."""
    model = opened(folder(tmp_path, WITH_MEMORY))
    rows, width = ids(len(lengths), 7), 9
    padded, mask = torch.full((len(lengths), width), 77), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        part = slice(width - length, width) if side == "left" else slice(0, length)
        padded[row, part], mask[row, part] = rows[row, :length], 1
    read = model(input_ids=padded, attention_mask=mask)
    written = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for row, length in enumerate(lengths):
        alone = model(input_ids=rows[row : row + 1, :length])
        torch.testing.assert_close(read.logits[row][mask[row] == 1], alone.logits[0], rtol=0, atol=1e-5)
        text = model.generate(rows[row : row + 1, :length], max_new_tokens=4, do_sample=False)
        assert written[row, width:].tolist() == text[0, length:].tolist()
    # What was read goes on from the cache, also in rows that read nothing at first.
    start = model(input_ids=padded[:, :3], attention_mask=mask[:, :3])
    rest = model(input_ids=padded[:, 3:], attention_mask=mask, cache=start.cache)
    torch.testing.assert_close(rest.logits[:, -1], read.logits[:, -1], rtol=0, atol=1e-5)


def test_the_cache_goes_on_where_it_was(tmp_path):
    model = opened(folder(tmp_path, WITH_MEMORY))
    whole = model(input_ids=ids(2, 13)).logits
    first = model(input_ids=ids(2, 13)[:, :6])
    second = model(input_ids=ids(2, 13)[:, 6:], cache=first.cache)
    torch.testing.assert_close(second.logits, whole[:, 6:], rtol=0, atol=1e-5)
    text = model.generate(ids(1, 6), max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(text, model.generate(ids(1, 6), max_new_tokens=3, do_sample=False))


def test_a3_what_is_not_supported_raises(tmp_path):
    model = opened(folder(tmp_path, WITH_MEMORY))
    with pytest.raises(CapabilityError, match="inputs_embeds given; a model of meristem reads input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 24))
    with pytest.raises(CapabilityError, match="cache_implementation is 'static'"):
        model.generate(ids(1, 3), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids(1, 3), max_new_tokens=2, assistant_model=model)
    with pytest.raises(ShapeError, match="attention_mask has the shape .1, 9."):
        model(input_ids=ids(1, 3), attention_mask=torch.ones(1, 9))
    with pytest.raises(ShapeError, match="the cache holds 2 rows, and input_ids has 1"):
        model(input_ids=ids(1, 3), cache=model(input_ids=ids(2, 3)).cache)
    with pytest.raises(CapabilityError, match="cannot be cut back"):
        model(input_ids=ids(2, 3)).cache.crop(1)
    with pytest.raises(CapabilityError, match="the vocabulary of this model cannot be changed"):
        model.resize_token_embeddings(300)


def test_the_folder_brings_its_code(tmp_path):
    """Without our import, transformers takes the small file of the folder, once it is allowed to."""
    import subprocess
    import sys

    place = folder(tmp_path, WITH_MEMORY)
    program = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(place)!r}, trust_remote_code=True); print(type(m).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "MeristemForCausalLM"


TEXT = "A caf\u00e9,\n\tsaid 12 people.  \U0001f600"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_tokenizer_of_a_folder_gives_the_same_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    ours = made_tokenizer(kind)
    place = folder(tmp_path, WITH_MEMORY)
    (place / "tokenizer.json").write_bytes(library_file(ours))
    theirs = AutoTokenizer.from_pretrained(place)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT and theirs.pad_token is None


def made_tokenizer(kind: str) -> Tokenizer:
    from meristem.data.vocabulary import learn

    return (
        byte_tokenizer() if kind == "byte" else tokenizer_from_bytes(learn("bpe", 300, ["people said people say"] * 9))
    )


def test_the_card_says_data_figures_and_limits(tmp_path):
    text = (folder(tmp_path, WITH_MEMORY) / "README.md").read_text()
    for words in ("| tokens read | 1,234 |", "| val/bits_per_byte | 2.5000 |", "## Limits", 'from_pretrained("hf")'):
        assert words in text


def test_a_folder_that_would_lie_is_not_written(tmp_path, monkeypatch):
    """Nothing is left where the loaded logits differ; and nothing that exists is replaced."""
    from meristem.export import hf

    monkeypatch.setattr(hf.plain, "ROTATION_BASE", 500.0)
    with pytest.raises(CheckpointMismatch, match="loaded by transformers, its logits differ by"):
        folder(tmp_path, PLAIN, form="plain")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run"]
    with pytest.raises(RunError, match="exists already"):
        hf.export(tmp_path / "run", tmp_path / "run", form="auto", emit=silent)
    with pytest.raises(WrongValue, match="is no plain transformer: model.mixer is mag"):
        folder(tmp_path / "other", WITH_MEMORY, form="plain")


def test_weights_of_another_shape_are_listed(tmp_path):
    from safetensors.torch import load_file, save_file

    from meristem.export.convert import to_checkpoint

    place = folder(tmp_path, WITH_MEMORY)
    weights = load_file(place / "model.safetensors")
    weights["lm.extra"] = weights.pop("lm.norm.gain_d").clone()
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match="extra: found .24,., expected nothing; norm.gain_d: found nothing"):
        to_checkpoint(place, tmp_path / "back")


def test_the_verbs(tmp_path, capsys):
    saved(tmp_path / "run", PLAIN, MemoryConfig())
    assert run(["export", "hf", str(tmp_path / "run"), "--to", str(tmp_path / "hf")]) == 0
    assert "plain" in capsys.readouterr().out
    assert run(["checkpoint", "convert", str(tmp_path / "hf"), "--to", str(tmp_path / "back")]) == 0
    assert "step-00000000" in capsys.readouterr().out
    assert torch.equal(load(tmp_path / "back").model(ids(1, 5))[0], load(tmp_path / "run").model(ids(1, 5))[0])


def test_a_transformer_that_is_none_of_ours_is_not_taken(tmp_path):
    """Shared key heads, another rotation, biases: all that differs is named."""
    from meristem.export.plain import settings_of

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    assert settings_of({"model_type": "llama", **sizes})["sliding_window"] is None
    other = {"model_type": "llama", **sizes, "num_key_value_heads": 1, "rope_theta": 5e5, "attention_bias": True}
    with pytest.raises(WrongValue, match="num_key_value_heads is 1, not 2; rope_theta is 500000.*attention_bias"):
        settings_of(other)
