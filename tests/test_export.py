"""aymen-gpt export: other programs compute from the file what we compute from the checkpoint."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from test_checkpoint import save

from aymen_gpt.commands import export, options
from aymen_gpt.data import tokenizer
from aymen_gpt.errors import CannotWrite, DataError, UsageError
from aymen_gpt.evaluation import gguf_check
from aymen_gpt.files import sha256
from aymen_gpt.model import gguf_file
from aymen_gpt.model.gpt import GPT, PRESETS, GPTConfig
from aymen_gpt.training import optim

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
        for name in ("gguf", "transformers", "accelerate")
    ),
]
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="cyllama is not installed"
)


@pytest.fixture(scope="module")
def model():
    model = GPT(PRESETS["tiny"], torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "wpe.weight":
                p.mul_(8 if p.dim() == 2 else 1).add_(0.1 * torch.randn(p.shape, generator=torch.manual_seed(1)))
        model.wte.weight[model.config.vocab_size :] = 0
    return model


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "runs/x"
    optimizer = optim.adamw(model, lr=0.0, betas=(0.9, 0.9), weight_decay=0.0)
    optim.start_moments(model, optimizer)
    save(folder, 3, (model, optimizer))
    return folder


def exported(*words):
    export.main(options.export().parse_args(["--to", "gguf", *map(str, words)]))


def write(path, model, type="f32"):
    tokens, merges = tokenizer.written()
    gguf_file.write_gguf(path, model, type, name="x", tokens=tokens, merges=merges)
    return path


@needs_llama_cpp
@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_two_readers_certify_the_file(run, tmp_path, type, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_text("another file, which transformers would find first by its bare name")
    out = tmp_path / "a.gguf"
    exported("-m", run, "--type", type, "--out", out)
    found = json.loads((tmp_path / "a.gguf.json").read_text())
    weights = run / "checkpoints/step-000000003/model.safetensors"
    assert (found["sha256"], found["step"]) == (sha256(out), 3)
    assert found["weights"] == {"model.safetensors": sha256(weights)}
    transformers, llama_cpp = found["readers"]["transformers"], found["readers"]["llama.cpp"]
    assert transformers["top1_agreement"] > (0.99 if type == "f32" else 0.85)
    assert llama_cpp["tokens_equal"]
    if type == "f32":
        assert transformers["largest_logit_difference"] < 1e-4
        assert 0 < llama_cpp["largest_logit_difference"] < 0.02
        assert llama_cpp["greedy_tokens_equal"] == llama_cpp["greedy_tokens"] == 32
    else:
        assert 0.001 < transformers["largest_logit_difference"] < transformers["limit"]
        assert out.stat().st_size < 0.5 * weights.stat().st_size + 2_000_000  # and the vocabulary
    assert (tmp_path / "Modelfile").read_text().startswith('FROM ./a.gguf\nTEMPLATE "{{ .Prompt }}"\n')
    assert f"{tmp_path}/a.gguf.json" in capsys.readouterr().out


def test_the_keys_and_names_are_those_of_llama_cpps_converter(model, tmp_path):
    import gguf

    reader = gguf.GGUFReader(write(tmp_path / "a.gguf", model, "q8_0"))
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected = {"context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 128}
    assert {key: values[f"gpt2.{key}"] for key in expected} == expected
    assert values["gpt2.attention.head_count"] == 2
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    vocabulary = json.loads(tokenizer._vocabulary_file("encoder.json").read_bytes())
    assert {token: i for i, token in enumerate(values["tokenizer.ggml.tokens"])} == vocabulary
    assert {values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "seperator")} == {tokenizer.EOT}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert len(kinds) == 2 + 2 + 2 * 12
    assert (kinds["token_embd.weight"], kinds["position_embd.weight"]) == ("Q8_0", "F32")
    assert kinds["blk.1.attn_qkv.weight"] == kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert (write(tmp_path / "b.gguf", model, "q8_0")).read_bytes() == (tmp_path / "a.gguf").read_bytes()


def spoil_value(path):
    """A block of one matrix becomes another number, as no checksum of the format would notice."""
    import gguf

    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    with path.open("r+b") as f:
        f.seek(int(tensor.data_offset))
        f.write(np.full(32, 5.0, np.float32).tobytes())


def cut(path):
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("spoil", "reader", "why"),
    [
        pytest.param(cut, "llama.cpp", "llama.cpp cannot read it", marks=needs_llama_cpp),
        (spoil_value, "transformers", "a logit that transformers computes from it is .*, the limit of f32 is"),
    ],
)
def test_a_spoilt_file_is_an_error_and_goes(run, tmp_path, monkeypatch, capsys, spoil, reader, why):
    write = gguf_file.write_gguf
    monkeypatch.setattr(
        gguf_file, "write_gguf", lambda path, *words, **more: (write(path, *words, **more), spoil(path))
    )
    if reader == "transformers":
        monkeypatch.setattr(gguf_check, "find_spec", lambda name: None)
    (tmp_path / "a.gguf").write_text("of an earlier export")
    with pytest.raises(DataError, match=f"a.gguf was not written, .*: {why}") as error:
        exported("-m", run, "--type", "f32", "--out", tmp_path / "a.gguf")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_text() == "of an earlier export"
    assert ("llama.cpp was not asked: pip install cyllama" in capsys.readouterr().out) == (reader != "llama.cpp")


def test_a_full_disk_is_one_line(run, disk):
    folder = disk("3M")
    with pytest.raises(CannotWrite, match="cannot write .*a.gguf: .*make room"):
        exported("-m", run, "--out", folder / "a.gguf")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx"], "--to onnx: expected gguf"),
        (["--type", "q8"], "--type q8: expected f32, f16, q8_0; did you mean q8_0?"),
        (["--out", "model.bin"], "--out model.bin: expected a name that ends with .gguf"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UsageError) as error:
        exported("-m", "runs/x", *words)
    assert str(error.value).startswith(message)


def test_rows_that_q8_0_cannot_pack_are_refused():
    with pytest.raises(UsageError, match="n_embd is 20: use f16"):
        gguf_file.check(GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=20)), "q8_0")
