"""Mede a velocidade ao lado de outro programa, na mesma rodada: entre máquinas, só a razão vale.

python tests/bench.py            tudo, em uns quatro minutos, sem mais nada rodando
python tests/bench.py bpe        só uma parte: bpe, training, sampling, flat, batch, start, memory
python tests/bench.py agreement out/tiny     a concordância de um modelo treinado, em frases

Ao lado de cada velocidade vai a fração que ela é do limite da máquina, medido na mesma rodada:
multiplicar matrizes, no treino; ler os pesos uma vez por token, na geração.
"""

import csv
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import regex

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig, choose_dtype  # noqa: E402  (antes do torch)
from prepare import PATTERN, build_encoding, train_bpe  # noqa: E402
from sample import load_model, sampling_dtype  # noqa: E402
from train import Config, make_optimizers  # noqa: E402

import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

CPU = torch.device("cpu")
DTYPE = choose_dtype(CPU)  # o bfloat16, só onde o chip ganha com ele
LIMITS = {}  # os da máquina, que machine() mede
SHAPES = {  # block_size, vocab_size, n_layer, n_head, n_embd
    "tiny": (192, 4096, 4, 4, 128), "6 × 256": (128, 4096, 6, 8, 256),
    "124M": (1024, 50257, 12, 12, 768)}


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def medians(*functions, rounds=5):
    """Os tempos medianos, em segundos, de funções que se revezam (depois de uma volta a mais)."""
    times = [[seconds(function) for function in functions] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*times)]


def machine():
    """Os limites: as operações por segundo de um produto de matrizes e a leitura da memória."""
    for dtype in dict.fromkeys((torch.float32, DTYPE)):
        a = torch.randn(2048, 2048).to(dtype)
        (time_,) = medians(lambda: a @ a)
        LIMITS[dtype] = 2 * 2048**3 / time_
        print(f"matmul {str(dtype)[6:]}: {LIMITS[dtype] / 1e9:.0f} GFLOP/s")
    if DTYPE == torch.float32:
        print("este chip não ganha com o bfloat16, e as medidas dele ficam de fora")
    data, vector = torch.ones(2**14, 2**13), torch.ones(2**13)  # 512 MB, mais que qualquer cache
    (time_,) = medians(lambda: data @ vector)
    LIMITS["memory"] = data.nbytes / time_
    print(f"leitura da memória: {LIMITS['memory'] / 1e9:.1f} GB/s")


def bpe():
    """Aprender 4.096 tokens com 2 MB de texto, contra a biblioteca tokenizers (em Rust)."""
    text = (ROOT / "data" / "contos.txt").read_text(encoding="utf-8")
    text = (text + text.swapcase())[:2_000_000]  # maiúsculas trocadas: mais palavras diferentes
    documents, alphabet = text.split("<|endoftext|>"), pre_tokenizers.ByteLevel.alphabet()

    def rust():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
            vocab_size=4095, initial_alphabet=alphabet, show_progress=False))
        assert tokenizer.get_vocab_size() == 4095

    def ours():
        counts = Counter()
        for document in documents:
            counts.update(regex.findall(PATTERN, document))
        assert len(train_bpe(counts, 4095)) == 4095

    mine, other = medians(ours, rust)
    print(f"BPE de 4.096 em 2 MB: {mine:.2f} s; tokenizers {other:.2f} s; razão {mine / other:.2f}")


def their_model(shape):
    """O modelo da transformers, com as medidas do nosso GPT(GPTConfig(*shape))."""
    block_size, vocab_size, n_layer, n_head, n_embd = shape
    return GPT2LMHeadModel(GPT2Config(
        n_positions=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
        n_embd=n_embd, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        eos_token_id=None, bos_token_id=None))


def training():
    """Um passo com AdamW, na precisão desta máquina, contra a transformers em float32."""
    shape = SHAPES["6 × 256"]
    ours, theirs = GPT(GPTConfig(*shape)), their_model(shape)
    x = torch.randint(shape[1], (16, 128))
    adamw, muon = (
        make_optimizers(ours, Config(optimizer=name), DTYPE) for name in ("adamw", "muon"))
    optimizer = torch.optim.AdamW(theirs.parameters(), fused=True)

    def step(optimizers):
        with torch.autocast("cpu", DTYPE, enabled=DTYPE != torch.float32):
            _, loss = ours(x, x)
        loss.backward()
        for each in optimizers:
            each.step()
        ours.zero_grad(set_to_none=True)

    def their_step():
        theirs(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # por token, 6 operações por parâmetro, e as da atenção: q·kᵀ e pesos·v, ida e volta
    block_size, _, n_layer, _, n_embd = shape
    work = x.numel() * (6 * ours.num_params() + 12 * n_layer * n_embd * block_size)
    mine, with_muon, other = medians(lambda: step(adamw), lambda: step(muon), their_step, rounds=9)
    for name, time_ in (("AdamW", mine), ("Muon", with_muon)):
        print(f"treino 6 × 256, {name}, {str(DTYPE)[6:]}: {x.numel() / time_:.0f} tokens/s; "
              f"transformers {x.numel() / other:.0f}; razão {other / time_:.2f}; "
              f"{work / time_ / LIMITS[DTYPE]:.0%} do limite")


def sampling():
    """Uma sequência, na precisão desta máquina, contra generate da transformers em float32."""
    for name, shape in SHAPES.items():
        ours, theirs = GPT(GPTConfig(*shape)), their_model(shape)
        ours.to(sampling_dtype(ours, CPU)).eval()
        idx = torch.zeros(1, 8, dtype=torch.long)
        mine, other = medians(
            lambda: list(ours.generate(idx, 100, 0.8, 20)),
            lambda: theirs.eval().generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=100, do_sample=True,
                temperature=0.8, top_k=20, pad_token_id=0))
        weights = sum(p.nbytes for p in ours.parameters())
        print(f"geração {name}, {str(ours.wte.weight.dtype)[6:]}: {100 / mine:.0f} tokens/s; "
              f"transformers {100 / other:.0f}; razão {other / mine:.2f}; "
              f"{weights * 100 / mine / LIMITS['memory']:.0%} do limite")


def flat():
    """O token 1.000 contra o token 100, no modelo de 124M: com o cache, quase o mesmo."""
    ours = GPT(GPTConfig(*SHAPES["124M"]))
    ours.to(sampling_dtype(ours, CPU)).eval()

    def tokens_after(length):  # o tempo de 20 tokens, sem o da leitura do começo
        tokens = ours.generate(torch.zeros(1, length, dtype=torch.long), 21, 0.8, 20)
        next(tokens)
        return seconds(lambda: list(tokens))

    times = [(tokens_after(90), tokens_after(990)) for _ in range(5)]
    early, late = (statistics.median(column) for column in zip(*times))
    print(f"token 1.000 contra token 100, 124M: {late / early:.2f} vezes o tempo")


def batch():
    """Oito textos de uma vez contra um só, em tokens por segundo."""
    ours = GPT(GPTConfig(*SHAPES["tiny"]))
    ours.to(sampling_dtype(ours, CPU)).eval()
    one, eight = (torch.zeros(size, 8, dtype=torch.long) for size in (1, 8))
    alone, together = medians(lambda: list(ours.generate(one, 100, 0.8, 20)),
                              lambda: list(ours.generate(eight, 100, 0.8, 20)))
    print(f"8 textos de uma vez: {8 * alone / together:.2f} vezes os tokens/s de um")


def start():
    """Começar: prepare.py nas histórias e um token de sample.py, contra importar as bibliotecas."""
    with tempfile.TemporaryDirectory() as folder:

        def call(*command):
            subprocess.run([sys.executable, *map(str, command)], cwd=folder, check=True,
                           capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

        prepare, train, sample = (ROOT / f"{name}.py" for name in ("prepare", "train", "sample"))
        call(prepare)
        call(train, ROOT / "config/tiny.py", "--max_iters=1", "--eval_iters=1")
        imports, prepared, sampled = medians(
            lambda: call("-c", "import torch, tiktoken"), lambda: call(prepare),
            lambda: call(sample, "--max_new_tokens", "1"))
    print(f"prepare.py: {prepared:.2f} s, {prepared / imports:.2f} vezes o import de torch")
    print(f"sample.py, um token: {sampled:.2f} s, {sampled / imports:.2f} vezes")


def peak(which):
    """Treina o de 124M com 4 × 256 tokens por passo, e mostra o pico de memória deste processo."""
    dtype, x = getattr(torch, which, torch.float32), torch.randint(50257, (4, 256))
    shape = (256, 50257, 12, 12, 768)
    model = their_model(shape) if which == "transformers" else GPT(GPTConfig(*shape))
    optimizers = ([torch.optim.AdamW(model.parameters())] if which == "transformers"
                  else make_optimizers(model, Config(), dtype))
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(x, labels=x).loss if which == "transformers" else model(x, x)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory():
    """O pico de memória de treinar o de 124M, cada vez noutro processo."""
    peaks = {}
    for which in dict.fromkeys(("transformers", "float32", str(DTYPE)[6:])):
        command = [sys.executable, __file__, "peak", which]
        output = subprocess.run(command, check=True, capture_output=True).stdout
        peaks[which] = int(output) / 2**20  # o Linux conta em KiB
        ratio = peaks[which] / peaks["transformers"]
        print(f"memória do treino, 124M, {which}: {peaks[which]:.2f} GB; razão {ratio:.2f}")


def agreement(out_dir="out/tiny"):
    """Em quantas frases de concordancia.csv o modelo dá mais probabilidade à forma certa."""
    model, tokenizer = load_model(f"{out_dir}/best.pt")
    encoding, right = build_encoding(tokenizer), defaultdict(list)

    def log_probability(start, end):
        ids = [encoding.eot_token, *encoding.encode_ordinary(start)]
        tail = encoding.encode_ordinary(end)
        idx = torch.tensor([ids + tail])
        logits, _ = model(idx, idx)
        chances = logits[0, len(ids) - 1 : -1].log_softmax(-1)  # (T, V), só as do fim da frase
        return chances.gather(1, idx[0, len(ids) :, None]).sum()

    with open(Path(__file__).with_name("concordancia.csv"), encoding="utf-8") as file:
        for row in csv.DictReader(file):
            good, bad = (log_probability(row["começo"], row[key]) for key in ("certo", "errado"))
            right[row["tipo"]].append((good > bad).item())
    for kind, answers in (right | {"ao todo": sum(right.values(), [])}).items():
        print(f"concordância, {kind}: {sum(answers)} de {len(answers)}")


if __name__ == "__main__":
    parts = [bpe, training, sampling, flat, batch, start, memory]
    if sys.argv[1:2] in (["agreement"], ["peak"]):
        parts = [lambda: globals()[sys.argv[1]](*sys.argv[2:])]
    elif sys.argv[1:]:
        parts = [part for part in parts if part.__name__ in sys.argv[1:]]
    if training in parts or sampling in parts:
        machine()
    for part in parts:
        part()
