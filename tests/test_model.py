"""model.py: a receita do GPT-2, conferida por contas feitas de outra maneira."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

from model import (
    GPT, GPTConfig, attention, choose_device, choose_dtype, read_checkpoint, sample_token)

SIZES = dict(block_size=24, vocab_size=61, n_layer=3, n_head=3, n_embd=27)  # medidas tortas


def make_model(scale=1.0, **changes):
    """Um modelo pequeno; scale > 1 aumenta os pesos, para as contas não serem quase lineares."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02).mul_(scale)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def test_on_a_mac_the_attention_gets_a_contiguous_query(monkeypatch):
    mac, seen = type("Mac", (torch.Tensor,), {"device": torch.device("mps")}), []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **_: seen.append(q.is_contiguous()) or q)
    make_model().h[0].attn(torch.randn(2, 5, 27).as_subclass(mac))
    assert seen == [True]


# A receita
@pytest.mark.parametrize("shape, parameters", [
    ((12, 12, 768), 124_439_808), ((24, 16, 1024), 354_823_168), ((36, 20, 1280), 774_030_080),
    ((48, 25, 1600), 1_557_611_200), ((12, 12, 768, 0, False), 124_337_664)])  # um sem viés
def test_parameter_counts_of_the_published_models(shape, parameters, monkeypatch):
    monkeypatch.setattr(GPT, "initial_weights", GPT.state_dict)  # só as formas, sem sortear
    assert GPT(GPTConfig(1024, 50257, *shape)).num_params() == parameters


def test_no_token_sees_the_future():
    model, idx = make_model(scale=3), random_tokens(2, 24)
    changed = idx.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 61
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("vocab_size", [61, 4096, 50257])
def test_initial_loss_is_that_of_guessing(vocab_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=vocab_size, n_layer=4, n_head=4, n_embd=64))
    idx = torch.randint(vocab_size, (4, 33))
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() - math.log(vocab_size)) < 0.2


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
        else:
            assert torch.equal(p, torch.ones_like(p) if "weight" in name else torch.zeros_like(p))
        assert p.requires_grad, name


@pytest.mark.parametrize("T", [1, 2, 24])
def test_written_out_attention_equals_the_fast_one(T):
    q, k, v = torch.randn(3, 2, 3, T, 9, generator=torch.Generator().manual_seed(0)).mul(2)
    y, weights = attention(q, k, v)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, T))
    assert torch.equal(weights, weights.tril())
    model, idx, seen = make_model(scale=3), random_tokens(2, T), []  # pedir os pesos não muda nada
    assert torch.allclose(model(idx, idx, weights=seen)[0], model(idx, idx)[0], atol=1e-4)
    assert [weights.shape for weights in seen] == [(2, 3, T, T)] * 3


def numpy_forward(weights, idx, n_layer, n_head):
    """O GPT-2 em NumPy, escrito à parte, com laços onde model.py tem tensores: notas (T, V)."""

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    T, C = len(idx), weights["wte.weight"].shape[1]
    hs = C // n_head
    x = weights["wte.weight"][idx] + weights["wpe.weight"][:T]
    for i in range(n_layer):
        qkv = linear(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        y = np.zeros((T, C))
        for start in range(0, C, hs):  # cada cabeça
            q, k, v = (qkv[:, part * C + start : part * C + start + hs] for part in range(3))
            for t in range(T):
                scores = np.array([q[t] @ k[s] / math.sqrt(hs) for s in range(t + 1)])
                p = np.exp(scores - scores.max())
                y[t, start : start + hs] = (p / p.sum()) @ v[: t + 1]
        x = x + linear(y, f"h.{i}.attn.c_proj")
        h = linear(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ weights["wte.weight"].T


def test_forward_equals_numpy_by_hand():
    model, idx = make_model(scale=3), random_tokens(1, 20)
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    expected = torch.from_numpy(numpy_forward(weights, idx[0].tolist(), 3, 3))
    assert (model(idx, idx)[0][0] - expected).abs().max() < 1e-4
    assert (model(idx)[0][0] - expected[-1:]).abs().max() < 1e-4  # sem targets, só a última posição
    assert (model.train()(idx, idx)[0][0] - expected).abs().max() < 1e-4


def test_loss_is_the_mean_cross_entropy_of_what_counts():
    model, idx, targets = make_model(scale=3), random_tokens(2, 10), random_tokens(2, 10, seed=2)
    p = model(idx, targets)[0].detach().double().softmax(-1)
    expected = [-math.log(p[b, t, targets[b, t]]) for b in range(2) for t in range(10)]
    assert abs(model(idx, targets)[1].item() - np.mean(expected)) < 1e-5
    targets[1, 4:] = -100
    assert abs(model(idx, targets)[1].item() - np.mean(expected[:14])) < 1e-5


def test_dropout_only_while_training():
    model, idx = make_model(dropout=0.5), random_tokens(2, 24)
    assert torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    model.train()
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    for part in model.modules():
        part.p = 0.0  # as nn.Dropout; fica só a da atenção
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])


def test_bfloat16_autocast_gives_nearly_the_same_gradient():
    model, idx, gradients = make_model().train(), random_tokens(2, 24), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, loss = model(idx, idx)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 0 < (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


# A geração
@pytest.mark.parametrize("block_size", [24, 7, 2, 1])
def test_the_cache_changes_nothing_also_past_block_size(block_size):
    model, idx = make_model(scale=3, block_size=block_size), random_tokens(2, 5)
    fast = list(model.generate(idx, 60, 1.3, 40, generator=torch.Generator().manual_seed(2)))
    generator, slow = torch.Generator().manual_seed(2), []
    idx = idx[:, -block_size:]
    for _ in range(60):  # sem o cache: o texto todo, de novo, a cada token
        if idx.size(1) > block_size:
            idx = idx[:, idx.size(1) // 2 :]
        slow.append(sample_token(model(idx)[0][:, -1], 1.3, 40, generator))
        idx = torch.cat((idx, slow[-1][:, None]), 1)
    assert torch.equal(torch.stack(fast), torch.stack(slow))
    assert len(set(torch.stack(fast)[:, 0].tolist())) > 3  # não é um token repetido


def test_each_token_is_read_once_and_the_window_drops_its_older_half():
    model, read = make_model(), []
    model.wte.register_forward_hook(lambda module, inputs, output: read.append(output.size(1)))
    list(model.generate(random_tokens(1, 30), 15))
    assert read == [24, 13, *[1] * 11, 13, 1]


def test_generation_stops_at_the_stop_token():
    model, idx = make_model(scale=3), random_tokens(4, 3)
    free = torch.stack(list(model.generate(idx, 40, temperature=0)), dim=1).tolist()
    stop = free[0][10]
    ends = [row.index(stop) if stop in row else 40 for row in free]
    for B in (1, 4):  # o último a acabar não entrega o token do fim; os outros o repetem
        stopped = torch.stack(list(model.generate(idx[:B], 40, 0, stop_token=stop)), dim=1)
        expected = [(row[:end] + 40 * [stop])[: max(ends[:B])] for row, end in zip(free, ends)]
        assert stopped.tolist() == expected[:B]


@pytest.mark.parametrize("temperature, top_k, kept", [
    (1.0, 0, [0, 1, 2, 3]), (0.5, 0, [0, 1, 2, 3]), (1.0, 2, [2, 3]), (1.0, 9, [0, 1, 2, 3]),
    (0, 0, [3]), (1e-46, 0, [3]), (1e-7, 2, [3]), (1.0, 1, [3])])
def test_sampling_follows_the_probabilities(temperature, top_k, kept):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20_000, 1)
    tokens = sample_token(logits, temperature, top_k, torch.Generator().manual_seed(0))
    expected = torch.zeros(4)
    expected[kept] = (logits[0, kept] / max(temperature, 0.01)).softmax(-1)
    assert (tokens.bincount(minlength=4) / len(tokens) - expected).abs().max() < 0.02
    assert set(tokens.tolist()) == set(kept)


# A máquina
@pytest.mark.parametrize("device, name, native, seconds, dtype", [
    ("cuda", "auto", True, 1, torch.bfloat16), ("cuda", "auto", False, 1, torch.float16),
    ("mps", "auto", True, 1, torch.float32), ("cpu", "auto", True, 0.5, torch.bfloat16),
    ("cpu", "auto", False, 0.5, torch.float32), ("cpu", "float16", True, 0.5, torch.float16),
    ("cpu", "auto", True, 0.9, torch.float32)])  # tem as instruções, e não ganha com elas
def test_dtype_follows_the_chip(device, name, native, seconds, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: native or including_emulation)
    for instructions in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, instructions, lambda: native)
    monkeypatch.setattr("timeit.repeat", lambda f, **_: [seconds if f().itemsize == 2 else 1, 9])
    assert choose_dtype(torch.device(device), name) == dtype


@pytest.mark.parametrize("name, working, chosen", [
    ("auto", {"cuda", "mps", "cpu"}, "cuda"), ("auto", {"mps", "cpu"}, "mps"),
    ("auto", {"cpu"}, "cpu"), ("cpu", {"cuda", "cpu"}, "cpu")])
def test_device_is_the_first_that_works(name, working, chosen, monkeypatch, capsys):
    def ones(*shape, device):  # uma máquina em que só alguns dispositivos fazem contas
        if device.type not in working:
            raise RuntimeError(f"no kernel image for {device.type}\nmais detalhes")
        return torch.zeros(*shape)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(name).type == chosen
    assert capsys.readouterr().out.count("no kernel image for cuda") == ("cuda" not in working)


@pytest.mark.parametrize("ask, words", [
    (lambda: make_model(n_head=4), "n_embd = 27 .* n_head = 4"),
    (lambda: make_model()(random_tokens(1, 25)), "25 .* block_size = 24"),
    (lambda: choose_dtype(torch.device("cpu"), "float61"), "'float61' não existe"),
    (lambda: choose_device("gpu"), "não funciona aqui"),
    (lambda: choose_device("cuda:99"), "não funciona aqui .*--device=cpu")])
def test_impossible_requests(ask, words):
    with pytest.raises((SystemExit, ValueError), match=words):
        ask()


@pytest.mark.parametrize("script", ["model", "train", "sample"])
def test_the_environment_is_set_before_torch_is_loaded(script):
    code = f"""import os, sys
os.environ.pop("GOMP_SPINCOUNT", None)
sys.modules["torch"] = None  # importá-lo dá um erro
try:
    import {script}
except ImportError:
    print(os.environ["GOMP_SPINCOUNT"])"""
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "20000\n"


# O checkpoint
WHOLE = {"model": make_model().state_dict(), "model_config": SIZES, "tokenizer": {}, "step": 3}


def test_a_checkpoint_comes_back_as_a_model_and_a_flipped_bit_is_noticed(tmp_path):
    path, idx = tmp_path / "a.pt", random_tokens(2, 9)
    torch.save(WHOLE, path)
    found = read_checkpoint(path, "step")
    assert torch.equal(found["model"](idx)[0], make_model()(idx)[0]) and found["step"] == 3
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # no meio de um peso
    path.write_bytes(data)
    with pytest.raises(SystemExit, match="a.pt está danificado"):
        read_checkpoint(path)


@pytest.mark.parametrize("content, word", [
    (None, "train.py"), (b"", "danificado"), (b"texto", "danificado"), ([3], "não é um checkpoint"),
    ({"model": {}}, "falta model_config, step, tokenizer"),
    (WHOLE | {"model_config": SIZES | {"n_embd": 30}}, "size mismatch"),
    (WHOLE | {"model": make_model(n_layer=2).state_dict()}, "h.2"),
    (WHOLE | {"model": make_model(scale=math.nan).state_dict()}, "não são números")])
def test_what_does_not_serve_names_the_file(tmp_path, content, word):
    path = tmp_path / "ruim.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(SystemExit, match=f"ruim.pt.*{word}") as error:
        read_checkpoint(path, "step")
    assert "\n" not in str(error.value)
