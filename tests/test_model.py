"""model.py: a receita do GPT-2, conferida por contas feitas de outra maneira."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import model as model_module
from model import (
    GPT,
    GPTConfig,
    KVCache,
    attention,
    choose_device,
    choose_dtype,
    load_weights,
    read_checkpoint,
    sample_token,
)

SIZES = dict(block_size=24, vocab_size=61, n_layer=3, n_head=3, n_embd=27)  # medidas tortas


def make_model(seed=0, scale=1.0, **changes):
    """Um modelo pequeno; scale > 1 aumenta os pesos, para as contas não serem quase lineares."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02).mul_(scale)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------
# A receita


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, parameters",
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_parameter_counts_of_the_published_models(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params() == parameters


def test_no_token_sees_the_future():
    model = make_model(scale=3)
    idx = random_tokens(2, 24)
    changed = idx.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 61
    before, _ = model(idx, idx)
    after, _ = model(changed, idx)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("vocab_size", [61, 4096, 50257])
def test_initial_loss_is_that_of_guessing(vocab_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=vocab_size, n_layer=4, n_head=4, n_embd=64))
    idx = torch.randint(vocab_size, (4, 33))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(vocab_size)) < 0.2


def test_residual_projections_start_smaller():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
        else:
            assert torch.equal(p, torch.ones_like(p) if "weight" in name else torch.zeros_like(p))


def test_one_batch_can_be_memorised():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    idx = random_tokens(4, 25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("T", [1, 2, 24])
def test_written_out_attention_equals_the_fast_one(T):
    q, k, v = torch.randn(3, 2, 3, T, 9, generator=torch.Generator().manual_seed(0)).mul(2)
    y, weights = attention(q, k, v)
    fast = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(y, fast, atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, T))
    assert torch.equal(weights, weights.tril())


def test_written_out_attention_of_the_newest_token_alone():
    q, k, v = torch.randn(3, 2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    y, weights = attention(q, k, v)
    newest, newest_weights = attention(q[:, :, -1:], k, v)  # como faz quem usa o cache
    assert torch.allclose(newest, y[:, :, -1:], atol=1e-6)
    assert torch.allclose(newest_weights, weights[:, :, -1:], atol=1e-6)


def test_attention_weights_on_request_change_nothing():
    model = make_model(scale=3)
    idx = random_tokens(2, 24)
    weights = []
    asked, _ = model(idx, idx, weights=weights)
    usual, _ = model(idx, idx)
    assert torch.allclose(asked, usual, atol=1e-4)
    assert [w.shape for w in weights] == [(2, 3, 24, 24)] * 3


def numpy_forward(weights, idx, n_layer, n_head):
    """O GPT-2 em NumPy, escrito à parte, com laços onde model.py tem tensores: notas (T, V)."""

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    T, C = len(idx), weights["wte.weight"].shape[1]
    hs = C // n_head
    x = np.array(
        [weights["wte.weight"][token] + weights["wpe.weight"][t] for t, token in enumerate(idx)]
    )
    for i in range(n_layer):
        qkv = linear(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        y = np.zeros((T, C))
        for head in range(n_head):
            q, k, v = (
                qkv[:, part * C + head * hs : part * C + (head + 1) * hs] for part in range(3)
            )
            for t in range(T):
                scores = np.array([q[t] @ k[s] / math.sqrt(hs) for s in range(t + 1)])
                p = np.exp(scores - scores.max())
                y[t, head * hs : (head + 1) * hs] = (p / p.sum()) @ v[: t + 1]
        x = x + linear(y, f"h.{i}.attn.c_proj")
        h = linear(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return layer_norm(x, "ln_f") @ weights["wte.weight"].T


def test_forward_equals_numpy_by_hand():
    model = make_model(scale=3)
    idx = random_tokens(1, 20)
    logits, _ = model(idx, idx)
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    expected = numpy_forward(weights, idx[0].tolist(), 3, 3)
    assert np.abs(logits[0].detach().numpy() - expected).max() < 1e-4


def test_loss_is_the_mean_cross_entropy():
    model = make_model(scale=3)
    idx, targets = random_tokens(2, 10), random_tokens(2, 10, seed=2)
    logits, loss = model(idx, targets)
    p = logits.detach().double().softmax(-1).numpy()
    expected = [-math.log(p[b, t, targets[b, t]]) for b in range(2) for t in range(10)]
    assert abs(loss.item() - np.mean(expected)) < 1e-5


def test_equals_hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    reference = GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=24, n_embd=27, n_layer=3, n_head=3)
    ).eval()
    model = make_model()
    weights = {}
    for name, p in reference.transformer.state_dict().items():
        p = p + torch.randn(p.shape) * 0.1  # também os vieses deixam de ser zero
        reference.transformer.get_parameter(name).data = p
        # a Conv1D deles guarda as matrizes na transposta
        transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name] = p.T.contiguous() if transposed else p
    reference.tie_weights()
    load_weights(model, weights, "referência")
    idx = random_tokens(2, 24)
    with torch.no_grad():
        ours, theirs = model(idx, idx)[0], reference(idx).logits
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-4


def test_without_bias_there_is_none():
    model = make_model(bias=False)
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    assert model(random_tokens(1, 5))[0].shape == (1, 1, 61)


def test_dropout_only_while_training():
    model = make_model(dropout=0.5)
    idx = random_tokens(2, 24)
    assert torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    model.train()
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])


def test_bfloat16_autocast_gives_nearly_the_same_loss_and_gradient():
    model = make_model().train()
    idx = random_tokens(2, 24)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, loss = model(idx, idx)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


def test_n_embd_must_be_divisible_by_n_head():
    with pytest.raises(SystemExit, match="n_embd = 27 .* n_head = 4"):
        make_model(n_head=4)


# ------------------------------------------------------------------------------------------------
# A geração


@pytest.mark.parametrize("block_size", [24, 7, 2, 1])
def test_cache_gives_the_same_text_also_past_block_size(block_size):
    model = make_model(scale=3, block_size=block_size)
    idx = random_tokens(2, 5)
    fast, slow = (
        torch.stack(
            list(
                model.generate(
                    idx,
                    60,
                    use_cache=use_cache,
                    generator=torch.Generator().manual_seed(2),
                )
            )
        )
        for use_cache in (True, False)
    )
    assert torch.equal(fast, slow)
    assert len(set(fast[:, 0].tolist())) > 3  # não é um token repetido


def test_cache_gives_the_same_logits():
    model = make_model(scale=3)
    idx = random_tokens(2, 24)
    expected, _ = model(idx, idx)
    cache = [KVCache(24) for _ in range(3)]
    first, _ = model(idx[:, :10], cache=cache)
    steps = [first] + [model(idx[:, t : t + 1], cache=cache)[0] for t in range(10, 24)]
    assert (torch.cat(steps, dim=1) - expected[:, 9:]).abs().max() < 1e-4


def test_window_drops_its_older_half(monkeypatch):
    model = make_model()
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda idx, **kw: seen.append(idx.size(1)) or forward(idx, **kw)
    )
    list(model.generate(random_tokens(1, 30), 20, use_cache=False))
    assert seen == [24, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 13, 14, 15, 16, 17, 18, 19]
    seen.clear()
    list(model.generate(random_tokens(1, 3), 5))
    assert seen == [3, 1, 1, 1, 1]  # com o cache: o começo de uma vez, depois um token por vez


def test_too_many_tokens_is_an_error():
    with pytest.raises(ValueError, match="25 .* block_size = 24"):
        make_model()(random_tokens(1, 25))


def test_generation_stops_at_the_stop_token():
    model = make_model(scale=3)
    idx = random_tokens(4, 3)
    free = torch.stack(list(model.generate(idx, 40, temperature=0)), dim=1).tolist()
    stop = free[0][10]
    stopped = torch.stack(
        list(model.generate(idx, 40, temperature=0, stop_token=stop)), dim=1
    ).tolist()
    for row, stopped_row in zip(free, stopped):
        end = row.index(stop) if stop in row else len(row)
        assert stopped_row[:end] == row[: len(stopped_row)][:end]
        assert set(stopped_row[end:]) <= {stop}
    alone = [token.item() for token in model.generate(idx[:1], 40, temperature=0, stop_token=stop)]
    assert alone == free[0][: free[0].index(stop)]  # o token do fim não é entregue


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k, kept in (
        (1.0, 0, [0, 1, 2, 3]),
        (0.5, 0, [0, 1, 2, 3]),
        (1.0, 2, [2, 3]),
    ):
        tokens = sample_token(logits, temperature, top_k, generator)
        expected = torch.zeros(4)
        expected[kept] = (logits[0, kept] / temperature).softmax(-1)
        frequencies = tokens.bincount(minlength=4) / len(tokens)
        assert (frequencies - expected).abs().max() < 0.02
    assert set(sample_token(logits, 0).tolist()) == {3}
    assert set(sample_token(logits, 1.0, 1, generator).tolist()) == {3}


def test_same_seed_same_text():
    model = make_model()
    texts = [
        torch.cat(
            list(
                model.generate(
                    random_tokens(1, 3), 30, generator=torch.Generator().manual_seed(seed)
                )
            )
        )
        for seed in (5, 5, 6)
    ]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


# ------------------------------------------------------------------------------------------------
# A máquina


@pytest.mark.parametrize(
    "device, native, dtype",
    [
        ("cuda", True, torch.bfloat16),
        ("cuda", False, torch.float16),
        ("mps", False, torch.float32),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
    ],
)
def test_dtype_follows_the_chip(device, native, dtype):
    assert choose_dtype(torch.device(device), native_bf16=native) == dtype


@pytest.mark.parametrize("seconds, faster", [({4: 1.0, 2: 0.5}, True), ({4: 1.0, 2: 0.9}, False)])
def test_bfloat16_on_a_cpu_must_win_the_race(monkeypatch, seconds, faster):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(
        model_module.timeit, "repeat", lambda f, **_: [seconds[f().element_size()], 9]
    )
    assert model_module.has_native_bf16(torch.device("cpu")) == faster


def test_bfloat16_on_a_cpu_needs_the_instructions(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(model_module.timeit, "repeat", lambda *_, **__: 1 / 0)  # nem se corre
    assert not model_module.has_native_bf16(torch.device("cpu"))


def test_dtype_by_name():
    assert choose_dtype(torch.device("cpu"), "float16") == torch.float16
    with pytest.raises(SystemExit, match="'float61' não existe"):
        choose_dtype(torch.device("cpu"), "float61")


def fake_machine(monkeypatch, working):
    """Finge uma máquina em que só certos dispositivos fazem contas."""

    def ones(*shape, device):
        if device.type not in working:
            raise RuntimeError(f"no kernel image for {device.type}\nmais detalhes")
        return torch.zeros(*shape)

    monkeypatch.setattr(model_module.torch, "ones", ones)


@pytest.mark.parametrize(
    "working, chosen", [({"cuda", "mps", "cpu"}, "cuda"), ({"mps", "cpu"}, "mps"), ({"cpu"}, "cpu")]
)
def test_device_is_the_first_that_works(monkeypatch, working, chosen):
    fake_machine(monkeypatch, working)
    assert choose_device().type == chosen
    assert choose_device("cpu").type == "cpu"


def test_a_card_that_does_not_work_is_mentioned(monkeypatch, capsys):
    fake_machine(monkeypatch, {"cpu"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cpu"
    assert "no kernel image" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--device=cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "meta"])
def test_unknown_device(name):
    with pytest.raises(SystemExit, match="não funciona aqui"):
        choose_device(name)


# ------------------------------------------------------------------------------------------------
# O checkpoint


def test_checkpoint_problems_name_the_file(tmp_path):
    with pytest.raises(SystemExit, match="não_existe.pt.*train.py"):
        read_checkpoint(tmp_path / "não_existe.pt")
    torch.save({"outra": 1}, tmp_path / "outro.pt")
    (tmp_path / "texto.pt").write_text("não sou um checkpoint")
    (tmp_path / "vazio.pt").write_bytes(b"")
    for name in ("outro.pt", "texto.pt", "vazio.pt"):
        with pytest.raises(SystemExit, match=name):
            read_checkpoint(tmp_path / name)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": make_model().state_dict(), "model_config": SIZES}, path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(SystemExit, match="danificado"):
        read_checkpoint(path)


def test_load_weights_names_the_wrong_tensor():
    model = make_model()
    good = make_model(seed=3).state_dict()
    name = "h.1.mlp.c_fc.weight"
    for weights, problem in [
        ({key: value for key, value in good.items() if key != name}, "falta"),
        (good | {"h.9.extra": torch.zeros(1)}, "h.9.extra não pertence"),
        (good | {name: torch.zeros(2, 2)}, r"formato \(2, 2\)"),
        (good | {name: good[name] * math.nan}, "não são números"),
    ]:
        with pytest.raises(SystemExit, match=problem):
            load_weights(model, weights, "a.pt")
    load_weights(model, good, "a.pt")
    assert all(torch.equal(p, good[name]) for name, p in model.state_dict().items())


# ------------------------------------------------------------------------------------------------
# O ambiente


@pytest.mark.parametrize("script", ["model", "train", "sample"])
def test_the_environment_is_set_before_torch_is_loaded(script):
    watch = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT'))\n"
        f"sys.meta_path.insert(0, Watch)\nimport {script}"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    output = subprocess.run(
        [sys.executable, "-c", watch],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.splitlines()[0] == "20000"
