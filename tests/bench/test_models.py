"""Attention inputs that the readers record, on small random models; pretrained ones are not downloaded for tests."""

import pytest
import torch

from bench.models import decoder, encoder, reading
from ntk_kernels import reference


@pytest.fixture(scope="module")
def small():
    transformers = reading.quiet_transformers()
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaModel(config).eval()


def test_decoder_records_what_its_attention_sees(small, monkeypatch):
    """Each chunk is recorded as if prefix and chunk had been read at once, by transformers' own plain attention."""
    monkeypatch.setattr(decoder, "CHUNK", 8)
    tokens = torch.randint(40, (44,))
    prefix, chunks = tokens[:20], tokens[20:].split(8)
    progress = []
    kept = decoder.read(small, prefix, chunks, (2, 0), lambda: progress.append(1))
    assert len(progress) == 3 + 3

    small.set_attn_implementation("eager")
    outputs = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, i=i: outputs.update({i: args[0][0]}))
        for i, layer in enumerate(small.layers)
    ]
    for i, layer in zip((2, 0), kept, strict=True):
        assert layer.prefix_key.shape == layer.prefix_value.shape == (2, 20, 8)
        assert layer.key.shape == layer.value.shape == (3, 2, 8, 8)
        out = reference.prefix_attention(
            layer.query, layer.key, layer.value, layer.prefix_key, layer.prefix_value, is_causal=True
        )
        for ours, chunk in zip(out, chunks, strict=True):
            with torch.no_grad():
                small(input_ids=torch.cat([prefix, chunk])[None])
            theirs = outputs[i][20:].unflatten(-1, (6, 8)).transpose(0, 1)
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    for hook in hooks:
        hook.remove()


def test_encoder_records_what_its_attention_sees():
    """Each chunk is read by itself, and the chunks of the prefix are in order."""
    transformers = reading.quiet_transformers()
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=3,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    chunks = list(torch.randint(40, (5, 8)))
    progress = []
    kept = encoder.read(model, chunks, 3, (2, 0), lambda: progress.append(1))
    assert len(progress) == 5
    with torch.no_grad():
        hidden = model(input_ids=torch.stack(chunks), output_hidden_states=True).hidden_states
    for i, layer in zip((2, 0), kept, strict=True):
        projections = model.encoder.layer[i].attention.self
        with torch.no_grad():
            query, key, value = (
                projection(hidden[i]).unflatten(-1, (3, 8)).transpose(1, 2)
                for projection in (projections.query, projections.key, projections.value)
            )
        expected = (*(x[:3].transpose(0, 1).flatten(1, 2) for x in (key, value)), query[3:], key[3:], value[3:])
        for ours, theirs in zip(layer, expected, strict=True):
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
        assert not projections.query._forward_hooks


class Tokenizer:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(range(3000))}

    def save_pretrained(self, folder):
        pass


def test_decoder_keeps_its_model(small, tmp_path):
    for _ in range(2):  # the second call finds the model that the first has kept
        decoder._keep(small, Tokenizer(), tmp_path / "cache" / "model")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]
    again = type(small).from_pretrained(tmp_path / "cache" / "model")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in small.state_dict().items())
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot keep the decoder in"):
        decoder._keep(small, Tokenizer(), tmp_path / "file" / "model")


def test_decoder_that_predicts(small, monkeypatch, tmp_path):
    """The cached model has no head of its own; that of the decoder is its embedding."""
    transformers = reading.quiet_transformers()
    config = transformers.LlamaConfig(**small.config.to_dict() | {"tie_word_embeddings": True})
    model = transformers.LlamaModel(config)
    model.load_state_dict(small.state_dict())
    model.save_pretrained(tmp_path / decoder.MODEL)
    monkeypatch.setenv("NTK_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(decoder, "package_folder", lambda *names: tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **source: Tokenizer())
    found, tokenizer = decoder.language_model()
    assert isinstance(tokenizer, Tokenizer) and not found.training
    tokens = torch.randint(40, (1, 9))
    with torch.no_grad():
        expected = small(input_ids=tokens).last_hidden_state @ small.embed_tokens.weight.T
        assert torch.allclose(found(input_ids=tokens).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "sizes, message",
    [((1024, 4), "the text is long enough for 952 prefix rows, not for 1024"),
     ((1537, 1), "the decoder knows 1536 prefix rows and 512 more, not 1537")],
)  # fmt: skip
def test_decoder_without_enough_to_read(small, monkeypatch, tmp_path, sizes, message):
    monkeypatch.setattr(decoder, "package_folder", lambda *names: tmp_path)
    monkeypatch.setattr(decoder, "_load", lambda folder: (small, Tokenizer()))
    with pytest.raises(ValueError, match=message):
        decoder.Reader(*sizes)


@pytest.mark.parametrize("reader", [encoder.Reader, decoder.Reader])
def test_without_the_package(monkeypatch, reader):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="coder is missing: pip install -c constraints.txt -e"):
        reader(512, 1)
