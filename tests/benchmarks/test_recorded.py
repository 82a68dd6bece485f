"""benchmarks/recorded.py and what benchmarks/attention.py says of a row's picks."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks import attention, recorded
from benchmarks.recorded import record_layers
from data.tokenizer import load_tokenizer
from launch.export import save_tokenizer
from moba.documents import Documents
from moba.kinds import Full, Sliding
from moba.reference import reference_selection

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="exact in float32 and in Triton's interpreter only")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 258, "initializer_range": 0.3}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A Llama of 4 layers with random weights, beside a text of three documents, two of at least 64 tokens."""
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "model")
    save_tokenizer(load_tokenizer("bytes"), tmp_path / "model")
    texts = {"a": "one document " * 9, "short": "too little", "b": "and another, " * 7}
    rows = [json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()]
    (tmp_path / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    return tmp_path / "model", tmp_path / "text.jsonl", texts


@torch.no_grad()
def test_recorded_layers_are_those_of_transformers(model):
    """Catches q and k before RoPE, another layer's, heads in another order, MoBA in the layers before, positions that
    run on through the pack, and documents that see each other: transformers reads each document alone."""
    folder, path, texts = model
    config = json.loads((folder / "config.json").read_text())
    sparse = config | {"moba": {"plan": [["moba", 8, 2]] * 4}}
    (folder / "config.json").write_text(json.dumps(sparse))
    found = record_layers(str(folder), str(path), pack_tokens=150)
    assert (found.model, sorted(found.ids), found.length, list(found.qkv)) == ("model", ["a", "b"], 64, [0, 2, 3])
    assert list(record_layers(str(folder), str(path), "32", "1,3", pack_tokens=64).qkv) == [1, 3]
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for place, name in enumerate(found.ids):
        ids = torch.tensor(load_tokenizer("bytes").document(texts[name])[:64].astype(int))[None]
        hidden = theirs(ids, output_hidden_states=True).hidden_states
        cos_sin = theirs.model.rotary_emb(hidden[0], torch.arange(64)[None])
        for layer, qkv in found.qkv.items():
            own = theirs.model.layers[layer]
            x = own.input_layernorm(hidden[layer])
            parts = (own.self_attn.q_proj, own.self_attn.k_proj, own.self_attn.v_proj)
            q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
            for ours, expected in zip(qkv, (*apply_rotary_pos_emb(q, k, *cos_sin), v)):
                part = ours[place * 64 : (place + 1) * 64]
                torch.testing.assert_close(part, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_recorded_is_one_message(model, tmp_path, capsys, monkeypatch):
    """Catches tracebacks, a pack that is not full, and another layer than was asked for."""
    folder, path, _ = (str(one) for one in model)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')

    def said(*arguments, **options):
        with pytest.raises(SystemExit) as ended:
            record_layers(*arguments, **options)
        text = capsys.readouterr().err
        assert ended.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
        return text

    assert "no such directory" in said("nowhere", path)
    assert "--model: gpt cannot be used: model_type=gpt2" in said(str(tmp_path / "gpt"), path)
    assert "--text 'nowhere.txt': no such file" in said(folder, "nowhere.txt")
    assert "Set --length lower, or give --text longer documents" in said(folder, path, "1K")
    assert f"--text {path}: 2 documents have more than 64 tokens, the pack needs 3" in said(
        folder, path, pack_tokens=192
    )
    assert "--length long: " in said(folder, path, "long")
    assert "--layers=0,4: layer 4 of " in said(folder, path, None, "0,4")
    assert "--layers=last: whole numbers" in said(folder, path, None, "last")
    trained = recorded.load_trained(folder, "cpu")
    windows = replace(trained, stage=replace(trained.stage, attention=(Sliding(8), *[Full()] * 3)))
    monkeypatch.setattr(recorded, "load_trained", lambda source: windows)
    assert "layer 0 of" in (text := said(folder, path)) and "choose layers with full attention" in text

    monkeypatch.setattr("sys.argv", ["attention.py", "--layers", "0"])
    with pytest.raises(SystemExit):
        attention.main()
    assert "--model and --text go together" in capsys.readouterr().err


def test_rows_of_a_model(model):
    """Catches rows of another shape than the model's, and a recorded layer under another's name."""
    found = record_layers(str(model[0]), str(model[1]), pack_tokens=150)
    rows = {row.name: row for row in attention.rows_of(found)}
    assert list(rows)[:4] == [f"2 x 64 128x8 {name}" for name in ("random", "layer 0", "layer 2", "layer 3")]
    for row in rows.values():
        shape = (row.num_tokens, row.heads, row.head_dim, row.lengths, row.implementations)
        assert shape == (128, (4, 2), 8, (64, 64), ["varlen", "triton"])
    assert rows["2 x 64 512x3 layer 2"].recorded is found.qkv[2] and rows["2 x 64 512x3 random"].recorded is None
    assert (rows["2 x 64 64x16 layer 0"].block_size, rows["2 x 64 64x16 layer 0"].top_k) == (64, 16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes masked lanes too
def test_picks_are_counted_as_one_by_one(monkeypatch):
    """Catches blocks that are counted once a head or across documents, places of the layout without a block in the
    mean, and missing picks that count: against sets and counters over the definition's selection."""
    lengths, block_size, top_k, heads = (70, 45), 16, 3, (4, 2)
    monkeypatch.setattr(attention, "documents", lambda row: Documents.from_lengths(row.lengths))
    q, k = (torch.randn(sum(lengths), h, 16, generator=torch.Generator().manual_seed(h)) for h in heads)
    k[:16] += q.mean((0, 1)) * 9  # many pick the first block
    row = attention.Row("", sum(lengths), block_size, top_k, heads=heads, head_dim=16, lengths=lengths)
    found = attention.picks(row, q, k)

    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    selection = reference_selection(q, k, block_size=block_size, top_k=top_k, cu_seqlens=bounds)
    lists, of_group, distinct = Counter(), [], []
    for token in range(sum(lengths)):
        for group in range(2):
            both = [b for head in (2 * group, 2 * group + 1) for b in selection[head, token].tolist() if b >= 0]
            lists.update((group, token >= lengths[0], block) for block in both)
            of_group.append(len(both))
            distinct.append(len(set(both)))
    longest = max(lists.values())
    assert len(lists) == 2 * (5 + 3) and sum(distinct) < sum(of_group)
    assert found == {
        "picks of the most popular block": pytest.approx(longest / (115 * 2)),
        "longest list over the mean": pytest.approx(longest / (sum(lists.values()) / len(lists))),
        "picks of a group": pytest.approx(sum(of_group) / len(of_group)),
        "distinct blocks of a group": pytest.approx(sum(distinct) / len(distinct)),
    }
