"""bench finetune and bench prompt on a tiny decoder with random weights; the pretrained one is not downloaded."""

import argparse
import json

import pytest
import torch
from rich.console import Console

from bench.__main__ import main
from bench.lib.progress import Steps
from bench.models import decoder, reading
from bench.quality import finetune, finetune_methods, prompt
from bench.upkeep import report
from ntk_kernels import prefix_to_state

# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LENGTH, PNG = 12, b"\x89PNG\r\n\x1a\n"
SMALL = ["--device", "cpu", "--steps", "3", "--batch", "2", "--length", str(LENGTH), "--held-out", "3", "--seeds", "2"]


class Tokenizer:
    """Returns the same 40 sequences for any text."""

    def __call__(self, text, add_special_tokens):
        generator = torch.Generator().manual_seed(1)
        return {"input_ids": torch.randint(40, (40 * LENGTH + 5,), generator=generator).tolist()}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Replaces the decoder by one with two layers, 4 query and 2 key/value heads and D = 8."""
    transformers = reading.quiet_transformers()
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(decoder, "language_model", lambda: (model, Tokenizer()))
    monkeypatch.setenv("COLUMNS", "200")
    return model


def comparison(model, **options):
    settings = {"steps": 3, "batch": 2, "seeds": 2, "device": "cpu", "budget": 640, "ablation": False} | options
    parts = finetune.split(torch.tensor(Tokenizer()("", False)["input_ids"]), LENGTH, 3)
    return finetune.Comparison(model, parts, argparse.Namespace(**settings))


def loss_of(model, sequences):
    """Returns the mean loss per token, computed from the logits of one sequence at a time."""
    model.eval()
    with torch.no_grad():
        log_p = torch.cat([model(input_ids=sequence[None]).logits for sequence in sequences]).log_softmax(-1)
    return -log_p[:, :-1].gather(2, sequences[:, 1:, None]).mean().item()


def test_every_method(tiny, tmp_path, capsys):
    """The record agrees with a direct evaluation; parameters are equal; the given model is not changed."""
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    main(["finetune", *SMALL, "--budget", "640", "--out", str(tmp_path)])
    assert tiny.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    figures = json.loads((tmp_path / "finetune.json").read_text())
    assert figures["left_out"] == {}
    results = {result["method"]: result for result in figures["results"]}
    assert list(results) == [method.name for method in finetune.METHODS.values()]
    sizes = {name: (result["size"], result["parameters"]) for name, result in results.items()}
    # In 2 layers: 2 heads·D·2 a virtual token; 32 + 32 and 32 + 16 a rank of LoRA; 2 heads·17 a row.
    assert sizes["prefix tuning (PEFT)"] == sizes["prefix tuning (PEFT), from text"] == (10, 640)
    assert sizes["LoRA (PEFT), query and value"] == (3, 672)
    assert sizes["NTK, rows"] == sizes["NTK, rows, from text"] == sizes["NTK, rows, fitted to text"] == (9, 612)
    assert sizes["NTK, elu"] == ("whole", 2 * 2 * (8 * 8 + 8))  # no Z is larger
    assert sizes["NTK, taylor1"] == ("whole", 2 * 2 * (9 * 8 + 9))
    assert sizes["the whole model"] == ("whole", sum(parameter.numel() for parameter in tiny.parameters()))

    same = comparison(tiny)
    assert figures["base"]["test_loss"] == pytest.approx(loss_of(tiny, same.parts.test), rel=1e-5)
    for name in ("ntk-taylor1-text", "prefix-text", "lora", "full"):
        method = finetune.METHODS[name]
        result = results[method.name]
        assert result["rate"] == result["rates"][result["validation_losses"].index(min(result["validation_losses"]))]
        for seed in (0, 1):
            model, curve = same.train(method, result["size"], result["rate"], seed, lambda: None)
            assert result["test_losses"][seed] == pytest.approx(loss_of(model, same.parts.test), rel=1e-4)
            assert result["curves"][seed] == pytest.approx(curve, rel=1e-4)
        assert result["step_ms"] > 0 and result["peak_bytes"] > 8 * result["parameters"]  # Adam's two of each
    assert results["the whole model"]["test_losses_before"] == pytest.approx([figures["base"]["test_loss"]] * 2)

    printed = capsys.readouterr().out
    assert "virtual tokens 10" in printed and "105.0%" in printed
    (table,) = finetune.tables_of(figures)
    assert "the best of 3 for each method" in table.title
    assert table.row_count == 1 + len(results)
    assert "640 trainable parameters" in report.tables(tmp_path / "finetune.json")
    assert (tmp_path / "finetune.png").read_bytes()[:8] == PNG
    assert len((tmp_path / "finetune.csv").read_text().splitlines()) == 1 + 2 * len(results)


def test_sizes_are_the_nearest(tiny):
    """No other integer size is closer to the budget; Z is full where that is closer or not larger."""
    for budget in (100, 300, 1000, 5000):
        same = comparison(tiny, budget=budget)
        for method in finetune.METHODS.values():
            if method.size is None and not (method.counts == "rank" and method.ours):
                size = same.size_of(method)
                counts = [
                    finetune.num_trained(same.build(method, near, None)) for near in (max(1, size - 1), size, size + 1)
                ]
                assert abs(counts[1] - budget) == min(abs(count - budget) for count in counts)
    elu = finetune.METHODS["ntk-elu"]
    assert comparison(tiny, budget=32 + 2 * 64).size_of(elu) == 2  # 2 layers of 2 heads: 8 for k, 16 for each rank
    assert comparison(tiny, budget=32 + 3 * 64 + 30).size_of(elu) == 3
    assert comparison(tiny, budget=32 + 4 * 64).size_of(elu) == "whole"


def test_starts_from_text(tiny):
    """Both kinds of prefix, started from text, predict what the model predicts after that text."""
    same = comparison(tiny)
    sequences = same.parts.test
    # With one token besides the row, the expansion around the mean key is exact.
    for name, size, rows in (("ntk-rows-text", 5, 5), ("prefix-text", 5, 5), ("ntk-taylor1-text", 1, 2)):
        text = same.parts.train.roll(-finetune._order(len(same.parts.train), 1)[0], dims=0).flatten()[:rows]
        with torch.no_grad():
            longer = torch.cat([text.expand(len(sequences), -1), sequences], dim=1)
            log_p = tiny(input_ids=longer).logits[:, rows:-1].log_softmax(-1)
        expected = -log_p.gather(2, sequences[:, 1:, None]).mean().item()
        assert expected != pytest.approx(loss_of(tiny, sequences), rel=1e-3)
        assert loss_of(same.build(finetune.METHODS[name], size, 1), sequences) == pytest.approx(expected, rel=1e-5)


def test_rows_fitted_to_text(tiny):
    """A few rows predict what the model predicts with four sequences before its input."""
    same = comparison(tiny)
    sequences = same.parts.test
    text = same.parts.train.roll(-finetune._order(len(same.parts.train), 1)[0], dims=0)[:4].flatten()
    with torch.no_grad():
        both = torch.cat([text.expand(len(sequences), -1), sequences], dim=1)
        exact = tiny(input_ids=both).logits[:, len(text) :]
        fitted = same.build(finetune.METHODS["ntk-rows-fitted"], 24, 1).eval()(input_ids=sequences).logits
        without = tiny(input_ids=sequences).logits
    assert tiny.config._attn_implementation == "sdpa"
    assert (fitted - exact).norm() < 0.2 * (without - exact).norm()


def test_factored():
    state = prefix_to_state(torch.randn(2, 4, 8), torch.randn(2, 4, 8), "taylor1")
    factored = finetune_methods._factored(state, 4)
    assert torch.allclose(factored.z_a @ factored.z_b, state.z, atol=1e-5) and torch.equal(factored.k, state.k)


def test_starts_as_the_model(tiny):
    same = comparison(tiny)
    sequences = same.parts.test
    started = same.build(finetune.METHODS["ntk-elu"], 2, 1)
    assert loss_of(started, sequences) == pytest.approx(loss_of(tiny, sequences), rel=1e-2)


def test_all_methods_see_the_same(tiny):
    """Batches depend only on the seed, each sequence comes once per epoch, and the parts do not overlap."""
    same = comparison(tiny)
    assert [len(part) for part in same.parts] == [34, 3, 3]
    tokens = torch.tensor(Tokenizer()("", False)["input_ids"])
    assert torch.equal(torch.cat(list(same.parts)).flatten(), tokens[: 40 * LENGTH])
    first, again, other = (torch.stack([batch for batch, _ in zip(same.batches(seed), range(34), strict=False)])
                           for seed in (0, 0, 1))  # fmt: skip
    assert torch.equal(first, again) and not torch.equal(first, other)
    for epoch in first.split(17):
        assert sorted(epoch.flatten(0, 1).tolist()) == sorted(same.parts.train.tolist())
    assert comparison(tiny, steps=20).schedule(1.0)[:2] == [0.5, 1.0]
    assert comparison(tiny, steps=20).schedule(1.0)[-1] == pytest.approx(1 / 19)


def test_text_has_each_paragraph_once():
    paragraphs = reading.text_without_repeats().split("\n\n")
    assert len(paragraphs) > 1000
    assert len({" ".join(paragraph.split()) for paragraph in paragraphs}) == len(paragraphs)


def test_ablation(tmp_path, capsys):
    main(["finetune", *SMALL, "--seeds", "1", "--ablation", "--ranks", "2", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "finetune-ablation.json").read_text())
    sizes = {result["method"]: result["parameters"] for result in figures["results"]}
    of, beside = {"elu": 8, "taylor1": 9, "taylor2": 9 + 36}, 8 + 1 + 17  # centre, log_scale, a row
    assert sizes == {
        f"{name}, r = {r}, {rank}": 4 * (r + products + (0 if name == "elu" else beside))
        for name, r in of.items()
        for rank, products in {"s = 2": 2 * (r + 8), "Z in full": 8 * r}.items()
    }
    assert "NTK-Attention by feature map and rank of Z" in capsys.readouterr().out
    assert (tmp_path / "finetune-ablation.png").read_bytes()[:8] == PNG


def test_what_fails_is_left_out(monkeypatch, tmp_path, capsys):
    def fails(model, size, start):
        raise KeyError("no such cache")

    monkeypatch.setitem(finetune.METHODS, "prefix", finetune.Method("prefix tuning (PEFT)", fails, (0.1,), "tokens"))
    command = ["finetune", *SMALL, "--budget", "640", "--methods", "prefix", "lora", "lora", "--out", str(tmp_path)]
    main(command)
    figures = json.loads((tmp_path / "finetune.json").read_text())
    assert figures["left_out"] == {"prefix tuning (PEFT)": "KeyError: 'no such cache'"}
    assert [result["method"] for result in figures["results"]] == ["LoRA (PEFT), query and value"]
    assert "left out: prefix tuning (PEFT): KeyError: 'no such cache'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no method could be run\nleft out: prefix tuning"):
        main(["finetune", *SMALL, "--methods", "prefix", "--out", str(tmp_path)])
    ours = finetune.Method("ours", fails, (0.1,), "tokens", ours=True)
    monkeypatch.setitem(finetune.METHODS, "prefix", ours)
    with pytest.raises(KeyError, match="no such cache"):
        main(command)


def test_losses_that_are_no_numbers(tiny, monkeypatch, tmp_path):
    """A learning rate that gives NaN is not chosen; if all do, the table and the record say so."""
    lora = finetune.METHODS["lora"]
    with Steps(Console(quiet=True)) as progress:
        one = finetune.Method("one", lora.build, (1e37, 1e-3), "rank", size=1)
        none = finetune.Method("none", lora.build, (1e37,), "rank", size=1)
        figures = comparison(tiny).measure([one, none], progress)
    one, none = figures["results"]
    assert one["validation_losses"][0] is None and one["rate"] == 1e-3
    assert none["test_losses"] == [None, None] and None not in none["test_losses_before"]
    json.dumps(figures, allow_nan=False)
    (table,) = finetune.tables_of(figures)
    cells = dict(
        zip((column.header for column in table.columns), (list(c.cells)[-1] for c in table.columns), strict=True)
    )
    assert cells["after"] == cells["perplexity"] == "NaN"
    assert "one: the largest learning rate was the best (loss on validation, 1e+37: NaN, 0.001: " in "\n".join(
        finetune.notes_of(figures)
    )
    finetune.plot(tmp_path / "plot.png", figures)
    assert (tmp_path / "plot.png").read_bytes()[:8] == PNG


@pytest.mark.parametrize(
    "arguments, message",
    [(["--length", "1"], "--length must be at least 2, a token and the one it predicts, got 1"),
     (["--length", "65", "--held-out", "2"], "--length must be at most 64, which the decoder reads, got 65"),
     (["--held-out", "20"], "--held-out must be less than half of the 40 sequences of 12 tokens .*, got 20"),
     (["--batch", "35"], "--batch must be at most 34, the sequences of 12 tokens .*, got 35"),
     (["--ablation", "--methods", "lora"], "--methods must not come with --ablation, got lora"),
     (["--ranks", "4"], r"--ranks must come with --ablation, got \[4\] without it")],
)  # fmt: skip
def test_refuses(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["finetune", *SMALL, *arguments, "--out", str(tmp_path)])


def test_refuses_other_methods(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--methods", "adapters"])
    assert "argument --methods: invalid choice: 'adapters'" in capsys.readouterr().err


def test_without_the_decoder(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="finetune: the decoder is missing: pip install"):
        main(["finetune", "--device", "cpu"])


def test_prompt(tiny, monkeypatch, tmp_path, capsys):
    """Losses with the prompt are those of the model on prompt and chunk at once; states come close, trained ones
    closer."""
    monkeypatch.setattr(prompt, "CHUNK", LENGTH)
    monkeypatch.setattr(decoder, "CHUNK", LENGTH)
    main(["prompt", "--device", "cpu", "--prompt", "30", "--rows", "2", "16", "--calibration", "20", "--test", "3",
          "--train", "30", "--out", str(tmp_path)])  # fmt: skip
    figures = json.loads((tmp_path / "prompt.json").read_text())
    results = {result["in_place"]: result for result in figures["results"]}
    assert list(results) == ["no prompt", "the prompt", "2 rows", "2 rows, trained", "16 rows", "16 rows, trained"]
    tokens = torch.tensor(Tokenizer()("", False)["input_ids"])
    chunks = tokens[30 : 30 + 3 * LENGTH].view(3, LENGTH)
    for chunk, loss in zip(chunks, results["no prompt"]["losses"], strict=True):
        assert loss == pytest.approx(loss_of(tiny, chunk[None]), rel=1e-4)
    for chunk, loss in zip(chunks, results["the prompt"]["losses"], strict=True):
        with torch.no_grad():
            log_p = tiny(input_ids=torch.cat([tokens[:30], chunk])[None]).logits[0, 30:-1].log_softmax(-1)
        assert loss == pytest.approx(-log_p.gather(1, chunk[1:, None]).mean().item(), rel=1e-4)

    def distance(name):
        both = zip(results[name]["losses"], results["the prompt"]["losses"], strict=True)
        return sum(abs(loss - exact) for loss, exact in both)

    assert distance("16 rows") < 0.3 * distance("no prompt")
    total = {name: sum(result["losses"]) for name, result in results.items()}
    assert total["the prompt"] < total["2 rows, trained"] < 0.8 * total["2 rows"] + 0.2 * total["the prompt"]
    assert results["the prompt"]["bytes"] == 2 * 2 * 2 * 30 * 8 * 4  # layers, keys and values, heads
    assert results["16 rows"]["bytes"] == results["16 rows, trained"]["bytes"] == 2 * 2 * 16 * 17 * 4
    assert tiny.config._attn_implementation == "sdpa"
    printed = capsys.readouterr().out
    assert "of the gain" in printed and "for 30 steps of a chunk" in " ".join(printed.split())
    assert "a prompt of 30 tokens" in report.tables(tmp_path / "prompt.json")
    assert (tmp_path / "prompt.png").read_bytes()[:8] == PNG
    assert len((tmp_path / "prompt.csv").read_text().splitlines()) == 1 + 6 * 3


@pytest.mark.parametrize(
    "arguments, message",
    [(["--rows", "30"], "--rows must be less than the 30 tokens, got 30"),
     (["--prompt", "60"], "--prompt must be at most 52, got 60"),
     (["--test", "40"], "--test and --calibration must be at most the 37 chunks .*, got 40 and 20")],
)  # fmt: skip
def test_prompt_refuses(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(prompt, "CHUNK", LENGTH)
    command = ["prompt", "--device", "cpu", "--prompt", "30", "--rows", "2", "--calibration", "20", "--test", "3"]
    with pytest.raises(SystemExit, match=message):
        main([*command, *arguments, "--out", str(tmp_path)])
