"""Mede a velocidade ao lado de outro programa, na mesma rodada: entre máquinas, só a razão vale.

python tests/bench.py
"""

import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from prepare import PATTERN, train_bpe  # noqa: E402


def compare(name, ours, peer, peer_name, rounds=5):
    """Roda os dois alternadamente e mostra a razão entre as medianas dos tempos."""
    seconds = {ours: [], peer: []}
    for _ in range(rounds):
        for function, times in seconds.items():
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    mine, other = (statistics.median(times) for times in seconds.values())
    print(f"{name}: {mine:.2f} s; {peer_name}: {other:.2f} s; razão {mine / other:.2f}")


def bpe():
    """Aprender 4.096 tokens com 2 MB de texto, contra a biblioteca tokenizers (em Rust)."""
    text = (ROOT / "data" / "contos.txt").read_text(encoding="utf-8")
    text = (text + text.swapcase())[:2_000_000]  # maiúsculas trocadas: mais palavras diferentes
    documents = text.split("<|endoftext|>")

    def rust():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(
            documents,
            trainers.BpeTrainer(
                vocab_size=4095,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        assert tokenizer.get_vocab_size() == 4095

    def ours():
        counts = Counter()
        for document in documents:
            counts.update(regex.findall(PATTERN, document))
        assert len(train_bpe(counts, 4095)) == 4095

    compare("BPE de 4.096 tokens em 2 MB", ours, rust, "tokenizers")


if __name__ == "__main__":
    bpe()
