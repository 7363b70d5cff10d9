"""De texto a tokens: aprende um vocabulário e grava os números que o modelo vai ler.

É o passo 3 do *LLM do Zero* (dados e tokenização). Um modelo não lê letras, lê números. Este
programa junta os textos, separa uma parte que o modelo não verá no treino (a validação), aprende
com o resto quais pedaços de palavra (os tokens) merecem um número e grava tudo em data/NOME/:

    train.bin, val.bin   os números dos tokens, 2 bytes cada um (uint16, little-endian)
    vocab.tiktoken       o vocabulário: os bytes de cada token em base64 e o número dele
    meta.json            como o texto foi cortado, os tamanhos e uma soma SHA-256 de cada .bin

Como rodar:

    python prepare.py                              prepara as histórias que vêm com o projeto
    python prepare.py --input livro.txt poemas/    prepara os seus textos
    python prepare.py --dataset machado            baixa e prepara Machado de Assis
"""

import argparse
import base64
import codecs
import difflib
import gzip
import hashlib
import heapq
import io
import json
import math
import os
import sys
import time
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import regex
import requests
import tiktoken

# ------------------------------------------------------------------------------------------------
# A lição: tokenização
#
# BPE (byte pair encoding; Sennrich et al. 2016) começa com 256 tokens, um por byte. Depois repete:
# acha o par de tokens vizinhos mais frequente e faz dele um token novo (uma fusão). "qu", "ção" e
# " casa" viram um número cada, e nenhum texto fica de fora: o que não se aprendeu fica em bytes.

END_OF_TEXT = "<|endoftext|>"  # o token que fecha cada documento

# O corte do GPT-2 em "palavras", que as fusões nunca atravessam: contrações do inglês; letras,
# algarismos ou sinais, cada grupo com o espaço que vem antes; e por fim os espaços que sobram.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(word_counts, size, progress=lambda done: None):
    """Aprende até `size` tokens com as palavras e o número de vezes que cada uma aparece.

    Devolve {bytes do token: número}, na ordem em que foram aprendidos. Funde-se sempre o par mais
    frequente e, no empate, o de números menores: o mesmo texto dá o mesmo vocabulário em qualquer
    máquina. Termina antes de `size` se nenhum par aparece ao menos duas vezes.

        train_bpe({"casa": 3, "asa": 2}, 258) -> os 256 bytes, b"as": 256, b"asa": 257
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens = list(ranks)  # o caminho de volta: número -> bytes
    words = [list(word.encode()) for word in word_counts]  # cada palavra, em números de tokens
    times = list(word_counts.values())
    pair_counts = Counter()
    where = defaultdict(set)  # em que palavras cada par aparece (ou já apareceu)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += times[i]
            where[pair].add(i)
    # A fila entrega o par mais frequente sem percorrer todos. Quando uma contagem muda, a nova
    # entra na fila, e a antiga é ignorada ao sair.
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    while queue and len(tokens) < size:
        count, pair = heapq.heappop(queue)
        if -count != pair_counts[pair]:
            continue
        if -count < 2:
            break
        merged = tokens[pair[0]] + tokens[pair[1]]
        new = ranks.setdefault(merged, len(tokens))  # raro: dois pares formam os mesmos bytes
        if new == len(tokens):
            tokens.append(merged)
        # só as palavras que contêm o par são refeitas, e só as contagens delas mudam
        changes = Counter()
        for i in where.pop(pair):
            for old_pair in zip(words[i], words[i][1:]):
                changes[old_pair] -= times[i]
            words[i] = merge(words[i], pair, new)
            for new_pair in zip(words[i], words[i][1:]):
                changes[new_pair] += times[i]
                where[new_pair].add(i)
        for changed, change in changes.items():
            if change:
                pair_counts[changed] += change
                heapq.heappush(queue, (-pair_counts[changed], changed))
        progress(len(tokens))
    return ranks


def merge(ids, pair, new):
    """Troca cada ocorrência do par pelo token novo: merge([1, 2, 3, 1], (1, 2), 9) -> [9, 3, 1]."""
    result, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            result.append(new)
            i += 2
        else:
            result.append(ids[i])
            i += 1
    return result


def make_tokenizer(kind, ranks, special_tokens=None):
    """Descreve um tokenizador só com tipos simples, para viajar em meta.json e com o modelo.

    `vocab` é o texto do arquivo vocab.tiktoken; vocab_size conta também os tokens especiais. Sem
    special_tokens, há um só, o <|endoftext|>, depois dos outros.
    """
    special_tokens = special_tokens or {END_OF_TEXT: len(ranks)}
    vocab = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    return {"kind": kind, "pattern": PATTERN, "special_tokens": special_tokens,
            "vocab_size": len(ranks) + len(special_tokens), "vocab": vocab}


def build_encoding(tokenizer):
    """Monta o tiktoken.Encoding, que transforma texto em números e números em texto, depressa."""
    lines = (line.split() for line in tokenizer["vocab"].splitlines())
    return tiktoken.Encoding(
        tokenizer["kind"],
        pat_str=tokenizer["pattern"],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens=tokenizer["special_tokens"],
        explicit_n_vocab=tokenizer["vocab_size"],
    )


def make_vocabulary(sample, size):
    """Aprende um vocabulário com os textos de uma amostra; devolve o tokenizador."""
    counts = Counter()
    for text in sample:
        for word in regex.findall(PATTERN, text):
            # uma "palavra" enorme, como uma sequência de DNA, conta em pedaços: aprende-se depressa
            counts.update(word[i : i + 100] for i in range(0, len(word), 100))
    places = size - 1  # o último lugar é do <|endoftext|>
    ranks = train_bpe(counts, places, lambda n: show_progress(f"{n} de {places} tokens aprendidos"))
    if len(ranks) < places:
        print(f"O texto é pequeno: só rendeu {len(ranks) + 1} tokens, e não os {size} pedidos.")
    return make_tokenizer("bpe", ranks)


def gpt2_tokenizer():
    """O vocabulário do GPT-2 (50.257 tokens, aprendidos em inglês), baixado pelo tiktoken."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # sem rede
        raise SystemExit(
            f"Não consegui baixar o vocabulário do GPT-2 ({type(error).__name__}). Use um "
            "próprio (--tokenizer bpe), ou aponte TIKTOKEN_CACHE_DIR para uma pasta que o tenha.")
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}
    return make_tokenizer("gpt2", ranks)


def byte_letters():
    """A letra com que os arquivos do GPT-2 escrevem cada byte: os visíveis são eles mesmos."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def read_pretrained_tokenizer(folder):
    """O tokenizador de uma pasta no formato do Hugging Face: tokenizer.json ou vocab + merges.

    O tiktoken junta primeiro os pares que formam o token de número menor: só serve um vocabulário
    em que os números crescem na ordem das fusões. O que não serve encerra o programa.
    """
    path = folder / "tokenizer.json"
    try:
        eos = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
            "eos_token_id")
        if path.exists():
            contents = json.loads(path.read_text(encoding="utf-8"))
            vocab, merges = contents["model"]["vocab"], contents["model"]["merges"]
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
            vocab |= {token["content"]: token["id"] for token in contents["added_tokens"]}
            kind = contents["pre_tokenizer"]["type"]
            if kind != "ByteLevel" or contents["pre_tokenizer"].get("add_prefix_space"):
                raise ValueError(f"o corte do texto é outro: {contents['pre_tokenizer']}")
        else:
            path = folder / "vocab.json"
            vocab = json.loads(path.read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        letters = byte_letters()
        merged = ["".join(pair) for pair in merges]
        ids = [vocab[token] for token in merged]
        if any(a > b for a, b in zip(ids, ids[1:])):
            raise ValueError("os números não crescem na ordem das fusões")
        ordinary = {*letters.values(), *merged}
        byte = {letter: byte for byte, letter in letters.items()}
        ranks = {bytes(byte[letter] for letter in token): vocab[token] for token in ordinary}
        # o que não é byte nem fusão é token especial; o do fim do texto tem aqui um nome só
        special = {END_OF_TEXT if number == eos else token: number
                   for token, number in vocab.items() if token not in ordinary}
        tokenizer = make_tokenizer(
            "gpt2", dict(sorted(ranks.items(), key=lambda item: item[1])), special)
        build_encoding(tokenizer)
        tokenizer["special_tokens"][END_OF_TEXT]
        return tokenizer
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise SystemExit(f"{path} falta, está danificado ou não é um vocabulário do tipo do GPT-2 "
                         f"({type(error).__name__}: {error}).")


def to_pretrained_tokenizer(tokenizer):
    """O contrário de read_pretrained_tokenizer: o conteúdo de tokenizer.json."""
    letters = byte_letters()
    lines = (line.split() for line in tokenizer["vocab"].splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = tokenizer["special_tokens"]

    def write(token):
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # refaz as fusões anteriores, até as duas partes deste token
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([write(part) for part in parts])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": number, "content": token, "special": True} | flags
                         for token, number in special.items()],
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "merges": merges, "vocab": special | {
            write(token): rank for token, rank in ranks.items()}}}


# ------------------------------------------------------------------------------------------------
# O texto: de arquivos a documentos, de documentos a treino e validação

CORPUS = Path(__file__).with_name("data") / "contos.txt"
READABLE = (".txt", ".md", ".jsonl", ".json")
LONGEST = 64 * 1024  # em caracteres: um documento maior que isto é cortado em vários
MIN_TEXT = 1000  # em caracteres: menos que isto não ensina nada
SAMPLE = 20e6  # em caracteres: o vocabulário se aprende com o começo do texto, até este tamanho
SEPARATOR = regex.compile(rf"(?<=^[ \t]*){regex.escape(END_OF_TEXT)}[ \t]*\n", regex.MULTILINE)


def find_files(inputs):
    """Os arquivos pedidos, e os que se sabe ler nas pastas pedidas, em ordem de nome."""
    files = []
    known = (*READABLE, *(suffix + ".gz" for suffix in READABLE), ".zip")
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(known))
            if not found:
                raise SystemExit(f"A pasta {path} não tem nenhum arquivo {', '.join(READABLE)}, "
                                 ".gz ou .zip.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise SystemExit(f"Não achei {path}. Confira o caminho dado em --input.")
    return list(dict.fromkeys(files))  # o mesmo arquivo, pedido duas vezes, entra uma vez só


class Corpus:
    """Os documentos de alguns arquivos, lidos um por vez: nunca o texto todo na memória.

    Num texto, uma linha que só tem <|endoftext|> separa documentos, e o fim do arquivo também; num
    .jsonl, cada linha é um. Um documento com mais de LONGEST caracteres sai em vários, cortado de
    preferência em fins de parágrafo. options: encoding, text_field, max_mb e source (de SOURCES).
    """

    def __init__(self, files, options):
        self.files, self.options = files, options
        self.total = sum(path.stat().st_size for path in files)

    def __iter__(self):
        """Gera pares (documento, hash); self.share diz que fração do texto já foi lida."""
        before, size, limit = 0, 0, self.options.max_mb * 1e6
        for path in self.files:
            with open(path, "rb") as raw:
                for text in self.texts(path, raw):
                    for piece in cut(text):
                        data = piece.strip("\n").encode(errors="replace")
                        if data:
                            size += len(data)
                            self.share = max((before + raw.tell()) / self.total, size / limit)
                            yield data.decode(), content_hash(data)
                        if size >= limit:
                            return
            before += path.stat().st_size

    def texts(self, path, raw):
        """Gera os textos de um arquivo, descomprimido, ou de cada membro de um .zip."""
        try:
            if path.suffix.lower() == ".zip":
                wanted = self.options.source.get("members", "")
                with zipfile.ZipFile(raw) as archive:
                    for name in sorted(archive.namelist()):
                        if name.lower().endswith(READABLE) and regex.match(wanted, name):
                            with archive.open(name) as file:
                                yield from self.read(f"{path}/{name}", file)
            elif regex.search(r"\.gz(\.part)?$", path.name.lower()):
                with gzip.open(raw) as file:
                    yield from self.read(str(path), file)
            else:
                yield from self.read(str(path), raw)
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError) as error:
            if path.suffix != ".part":  # um download que parou onde se pediu acaba no meio
                raise SystemExit(f"{path} está danificado ou tem senha ({error}).")

    def read(self, name, file):
        """Gera os textos de um arquivo aberto, inteiros ou em trechos."""
        encoding, clean = self.options.encoding, self.options.source.get("clean")
        if regex.search(r"\.jsonl?(\.gz)?(\.part)?$", name.lower()):
            yield from self.read_json(name, file)
        elif clean:
            yield clean(file.read().decode(encoding, errors="replace"))
        else:
            text = ""
            for chunk in decode(name, file, encoding):
                *documents, text = SEPARATOR.split(text + chunk)
                yield from documents
                *pieces, text = cut(text)
                yield from pieces
            yield from SEPARATOR.split(text + "\n")

    def read_json(self, name, file):
        """Gera os textos de um .jsonl: o campo text_field do objeto JSON de cada linha."""
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line.decode(self.options.encoding))[self.options.text_field] + ""
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n") and line.strip() or not name.endswith(".part"):
                    raise SystemExit(
                        f"{name}, linha {number}: não é um objeto JSON com um texto no campo "
                        f"{self.options.text_field!r}. Diga o nome do campo com --text_field.")


def decode(name, file, encoding):
    """Gera o texto de um arquivo em bytes, em trechos de 1 MiB; \\r\\n vira \\n."""
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    while chunk := file.read(2**20):
        before = len(decoder.getstate()[0])  # o começo de uma letra cortada entre dois trechos
        if offset == 0 and chunk.startswith(codecs.BOM_UTF8):  # a marca que o Windows põe
            chunk, offset = chunk[3:], 3
        try:
            final = len(chunk) < 2**20 - 3 and not name.endswith(".part")
            yield newlines.decode(decoder.decode(chunk, final))
        except UnicodeDecodeError as error:
            raise SystemExit(
                f"{name} não está em {encoding}: o byte na posição {offset - before + error.start} "
                "não faz sentido. Textos antigos do Windows pedem --encoding cp1252.")
        offset += len(chunk)


def cut(text):
    """Corta um texto longo em trechos de até LONGEST caracteres; o último fica com o resto."""
    start = 0
    while len(text) - start > LONGEST:
        end = find_break(text, start, start + LONGEST)
        yield text[start:end]
        start = end
    yield text[start:]


def find_break(text, start, limit):
    """Onde cortar: o último fim de parágrafo, linha, frase ou palavra pouco antes de `limit`."""
    for mark in ("\n\n", "\n", ". ", " "):
        position = text.rfind(mark, start + (limit - start) * 4 // 5, limit)
        if position >= 0:
            return position + len(mark)
    return limit


def content_hash(data):
    """Um número inteiro de 0 a 2**64 - 1, sempre o mesmo para os mesmos bytes."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def read_sample(corpus, val_fraction):
    """Lê o começo do texto: devolve (documentos de treino, limite do hash para a validação).

    Um documento é de validação se o seu hash fica abaixo do limite, um sorteio que sempre dá o
    mesmo resultado: o documento fica do mesmo lado ainda que outros entrem ou saiam, e duas cópias
    nunca se separam. Num texto pequeno, para que nenhum lado fique vazio, o limite vai até o
    documento mais próximo. Um limite None quer dizer que há um documento só.
    """
    sample, size, limit = [], 0, int(val_fraction * 2**64)
    for document, number in corpus:
        sample.append((document, number))
        size += len(document)
        if size > SAMPLE:
            break
    else:
        if size < MIN_TEXT:
            raise SystemExit(f"O texto tem só {size} caracteres; são precisos pelo menos "
                             f"{MIN_TEXT}.")
        numbers = [number for _, number in sample]
        if min(numbers) == max(numbers):
            limit = None
        else:
            limit = min(max(limit, min(numbers) + 1), max(numbers))
    parts = split_documents(sample, limit, val_fraction)
    return [document for part, document in parts if part == "train"], limit


def split_documents(documents, limit, val_fraction):
    """Gera pares (parte, documento), em que a parte é "train" ou "val"."""
    for document, number in documents:
        if limit is None:  # um documento só: o fim dele vira a validação
            end = find_break(document, 0, int(len(document) * (1 - val_fraction)))
            yield "train", document[:end].strip("\n")
            yield "val", document[end:].strip("\n")
        else:
            yield "val" if number < limit else "train", document


def write_tokens(files, corpus, limit, val_fraction, encoding):
    """Grava os tokens de cada documento, com um <|endoftext|> no fim, no arquivo da sua parte.

    files: {"train": arquivo, "val": arquivo}. Devolve o que meta.json diz de cada parte.
    """
    keys = ("documents", "characters", "bytes", "tokens")
    splits = {part: dict.fromkeys(keys, 0) for part in files}
    documents, began = split_documents(corpus, limit, val_fraction), time.perf_counter()

    def encode(batch):  # um "<|endoftext|>" no meio do texto é texto, não o token especial
        return [encoding.encode_to_numpy(text, disallowed_special=()) for _, text in batch]

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # um lote para cada núcleo, e mais na fila
        waiting = deque()
        while (batch := list(islice(documents, 200))) or waiting:
            if batch:
                waiting.append((batch, pool.submit(encode, batch)))
                if len(waiting) < 3 * os.cpu_count():
                    continue
            batch, encoded = waiting.popleft()
            for (part, text), ids in zip(batch, encoded.result()):
                files[part].write(np.append(ids, encoding.eot_token).astype("<u2").tobytes())
                for key, amount in zip(keys, (1, len(text), len(text.encode()), len(ids) + 1)):
                    splits[part][key] += amount
            size, seconds = splits["train"]["bytes"] / 1e6, time.perf_counter() - began
            show_progress(f"{size:.0f} MB em tokens | {size / seconds:.1f} MB/s | faltam "
                          f"{duration(seconds / corpus.share - seconds)}")
    return splits


def token_sample(path):
    """Os tokens de um .bin que servem para conferi-lo: todos ou, acima de 256 MB, os das pontas."""
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if tokens.nbytes <= 256 * 2**20:
        return tokens
    return np.concatenate((tokens[: 2**19], tokens[-(2**19) :]))  # o primeiro e o último MiB


def read_meta(folder):
    """Lê o que prepare.py gravou em `folder`: devolve meta.json e o tokenizador completo."""
    if folder.name in SOURCES:
        options = f" --dataset {folder.name}"
    else:
        options = "" if folder.name == "contos" else f" --input TEXTO --name {quote(folder.name)}"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        vocab = (folder / "vocab.tiktoken").read_text(encoding="utf-8")
        tokenizer = meta["tokenizer"] | {"vocab": vocab}
        build_encoding(tokenizer)
    except FileNotFoundError as error:
        raise SystemExit(
            f"Não achei {error.filename}: rode `python prepare.py{options}` primeiro.")
    except (ValueError, TypeError, KeyError, AssertionError):
        raise SystemExit(
            f"meta.json ou vocab.tiktoken, em {folder}, está danificado: rode "
            f"`python prepare.py{options}` de novo.")
    return meta, tokenizer


# ------------------------------------------------------------------------------------------------
# Arquivos que aparecem inteiros ou não aparecem: escreve-se ao lado e troca-se o nome no fim


@contextmanager
def whole_file(path):
    """Abre para escrita, em bytes, um arquivo que só ganha o nome `path` quando está completo."""
    if path.exists() and not path.is_file():
        raise SystemExit(f"{path} já existe e não é um arquivo: dê outro nome.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # no disco de verdade, antes de trocar o nome
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # com o disco cheio, torch.save dá RuntimeError
        reason = getattr(error, "strerror", None) or "o disco encheu?"
        raise SystemExit(f"Não consegui gravar {path} ({reason}). O que já existia está intacto.")
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # a troca de nome também vai para o disco (o Windows não tem isto)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# ------------------------------------------------------------------------------------------------
# Downloads: retomados de onde pararam, conferidos, e só com o nome certo quando inteiros

CACHE = Path("data", ".cache")
WAIT = 1  # em segundos, antes de tentar de novo; dobra a cada vez


def clean_machado(text):
    """Junta as linhas de cada parágrafo e tira o cabeçalho, que acaba ao citar a edição."""
    paragraphs = [" ".join(part.split()) for part in regex.split(r"\n\s*\n", text)]
    heading = regex.compile(r"Texto-fonte|Obra Completa|Publicad[oa]s? originalmente", regex.I)
    last = max((i for i, part in enumerate(paragraphs[:12]) if heading.search(part)), default=-1)
    return "\n\n".join(part for part in paragraphs[last + 1 :] if part)


SOURCES = {
    "machado": {
        "about": "romances e contos de Machado de Assis, 6 MB; domínio público",
        "url": "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/machado.zip",
        "md5": "d186f7d6715479a8bec48b8b8030858e", "encoding": "cp1252",
        "members": "machado/(romance|contos)/", "clean": clean_machado},
    "mc4": {
        "about": "textos da web em português, em 1024 partes (--shards); ODC-BY",
        "url": "https://huggingface.co/datasets/allenai/c4/resolve/main/multilingual/"
               "c4-pt.tfrecord-{:05d}-of-01024.json.gz", "shards": 1024},
}


def download(url, path, md5=None, limit=math.inf):
    """Baixa um arquivo uma vez só e devolve onde ficou: path ou, se parou em limit bytes, o .part.

    Enquanto não está inteiro e conferido, chama-se .part; um download interrompido continua dele.
    O que não dá certo encerra o programa com uma mensagem.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(6):  # cinco tentativas; a última volta só confere
        if path.exists():
            return path
        done = part.stat().st_size if part.exists() else 0
        if done >= limit:
            print(f"Usei só o começo de {url}: {part} não foi conferido.")
            return part
        if attempt == 5:
            break
        try:
            fetch(url, part, done, limit)
            if part.stat().st_size < limit:
                if md5 and hashlib.md5(part.read_bytes()).hexdigest() != md5:
                    part.unlink()
                    raise SystemExit(f"{url} veio estragado (o MD5 não bate). Rode de novo.")
                os.replace(part, path)
        except requests.RequestException as error:
            reason = type(error).__name__
            show_progress(f"Não consegui baixar {path.name} ({reason}): tento de novo em "
                          f"{WAIT * 2**attempt} s", plain=True)
            time.sleep(WAIT * 2**attempt)
    raise SystemExit(f"Não consegui baixar {url} ({reason}). Confira a rede e rode de novo: "
                     "continua de onde parou. Sem rede, `python prepare.py` e --input funcionam.")


def fetch(url, part, done, limit):
    """Baixa o que falta de um .part; o que vale tentar de novo sai como RequestException."""
    headers = {"Range": f"bytes={done}-", "Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as reply:
        if reply.status_code == 416:  # já veio inteiro, ou mudou: começa de novo
            part.unlink()
        if reply.status_code >= 500 or reply.status_code in (408, 416, 429):
            raise requests.HTTPError(reply.status_code)
        if reply.status_code >= 400:
            raise Missing(f"{url} não existe ou não é público (erro {reply.status_code}).")
        if "html" in reply.headers.get("Content-Type", ""):
            raise SystemExit(f"{url} é uma página da web, e não um arquivo de texto.")
        if reply.status_code != 206:  # o servidor não sabe continuar: mandou tudo
            done = 0
        total = done + int(reply.headers.get("Content-Length", 0))
        began, start = time.perf_counter(), done
        with open(part, "ab" if done else "wb") as file:
            for chunk in reply.iter_content(2**14):  # o que se perde numa queda
                file.write(chunk)
                done += len(chunk)
                speed = (done - start) / (time.perf_counter() - began)
                left = duration((min(total, limit) - done) / speed) if total else "?"
                show_progress(f"{done / 1e6:.1f} de {min(total, limit) / 1e6:.1f} MB | "
                              f"{speed / 1e6:.1f} MB/s | faltam {left}")
                if done >= limit:
                    break
        if done < min(total, limit):
            raise requests.ConnectionError("acabou antes da hora")


HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


class Missing(SystemExit):
    """O servidor respondeu que o arquivo não existe."""


def fetch_pretrained(name):
    """A pasta de um modelo do tipo GPT-2: a que se deu, ou a de um modelo publicado, baixado.

    name: uma pasta, gpt2 (ou gpt2-medium, gpt2-large, gpt2-xl), ou DONO/NOME no Hugging Face.
    """
    if Path(name).is_dir():
        return Path(name)
    if not regex.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", name):
        raise SystemExit(f"Não achei {name}: use uma pasta, gpt2, gpt2-medium, gpt2-large, gpt2-xl "
                         "ou DONO/NOME, de um modelo publicado no Hugging Face.")
    folder = CACHE / name.replace("/", "--")
    # de cada linha, basta o primeiro que exista
    for choices in (["config.json"], ["model.safetensors", "pytorch_model.bin"],
                    ["tokenizer.json", "vocab.json"]):
        if any((folder / file).exists() for file in choices):
            continue
        for file in choices:
            try:
                download(f"{HUB}/{name}/resolve/main/{file}", folder / file)
                break
            except Missing:
                if file == choices[-1]:
                    raise
    if (folder / "vocab.json").exists():
        download(f"{HUB}/{name}/resolve/main/merges.txt", folder / "merges.txt")
    return folder


def fetch_inputs(options):
    """Os arquivos a ler: os de --input, os baixados de --url ou --dataset, ou as histórias."""
    if not options.url and not options.dataset:
        return find_files(options.input or [CORPUS])
    urls, source = options.url, options.source
    if options.dataset:
        urls = [source["url"].format(number) for number in range(options.shards)]
    paths = []
    for url in urls:
        path = CACHE / regex.sub(r"[^\w.-]+", "_", url.partition("://")[2])
        # o texto que cabe num .gz é ao menos o dobro do tamanho; um .zip só se lê inteiro
        limit = options.max_mb * 1e6 / (2 if path.suffix == ".gz" else 1)
        limit -= sum(file.stat().st_size for file in paths)
        if limit > 0:
            paths.append(download(url, path, source.get("md5"),
                                  math.inf if path.suffix == ".zip" else limit))
    return paths


# ------------------------------------------------------------------------------------------------
# A linha de comando em português, que train.py e sample.py também usam

PORTUGUESE = {  # o argparse fala inglês, mas passa cada frase por uma função de tradução
    "usage: ": "uso: ",
    "options": "opções",
    "positional arguments": "argumentos",
    "show this help message and exit": "mostra esta ajuda e termina",
    "%(prog)s: error: %(message)s\n": "%(prog)s: erro: %(message)s\n",
    "argument %(argument_name)s: %(message)s": "%(argument_name)s: %(message)s",
    "expected one argument": "falta o valor",
    "expected at least one argument": "falta ao menos um valor",
    "invalid %(type)s value: %(value)r": "%(value)r não é do tipo %(type)s",
    "not allowed with argument %s": "não combina com %s",
    "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r não existe; use %(choices)s",
}
argparse._ = lambda text: PORTUGUESE.get(text, text)


def parse_arguments(parser, arguments=None):
    """O parser.parse_args, que sugere o nome mais parecido quando não conhece uma opção."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        names = regex.findall(r"--(\w+)", parser.format_help())
        parser.error(f"não conheço {unknown[0]!r}{suggest(name, names)}")
    return options


def suggest(name, names):
    """O nome mais parecido: suggest("batchsize", ["batch_size"]) -> ". Seria batch_size?"."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f". Seria {nearest[0]}?" if nearest else ""


def quote(text):
    """Um nome para a linha de comando: entre aspas, se tem espaços ou sinais."""
    return text if regex.fullmatch(r"[\w./-]+", text) else f'"{text}"'


def show_progress(text, end="", plain=False):
    """Num terminal, reescreve sempre a mesma linha; num arquivo, só escreve se plain."""
    if sys.stdout.isatty():
        print(f"\r{text[:79]:<79}", end=end, flush=True)
    elif plain:
        print(text, flush=True)


def run(main):
    """Roda o main de um programa: saída em UTF-8, e erros do sistema em uma linha."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrompido.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # quem lia a saída foi embora, como em `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        raise SystemExit("Faltou memória: peça menos de uma vez.")
    except OSError as error:  # disco cheio, permissão negada...
        raise SystemExit(f"Erro do sistema: {error}")


# ------------------------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Transforma textos em tokens, na pasta data/NOME/.", allow_abbrev=False)
    add = parser.add_argument
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--input", nargs="+", metavar="CAMINHO",
        help="arquivos .txt, .md ou .jsonl, também .gz ou em .zip, ou pastas com eles; sem isto, "
        "as histórias do projeto")
    sources.add_argument("--url", nargs="+", metavar="URL", help="arquivos assim, para baixar")
    sources.add_argument(
        "--dataset", choices=SOURCES, metavar="NOME", help="uma coleção para baixar: " + "; ".join(
            f"{name} ({source['about']})" for name, source in SOURCES.items()))
    add("--shards", type=int, default=1, metavar="N", help="quantas partes de mc4 baixar [1]")
    add("--max_mb", type=float, default=math.inf, metavar="X", help="usar no máximo X MB de texto")
    add("--encoding", metavar="NOME",
        help="como os textos foram gravados: cp1252 nos antigos do Windows [utf-8]")
    add("--text_field", default="text", metavar="NOME",
        help="o campo do .jsonl em que está o texto [text]")
    add("--name", metavar="NOME", help="o nome do conjunto; sem isto, o da coleção ou do arquivo")
    add("--vocab_size", type=int, default=4096, metavar="N",
        help="quantos tokens tem o vocabulário [%(default)s]")
    add("--val_fraction", type=float, default=0.05, metavar="F",
        help="a fração do texto que fica para a validação [%(default)s]")
    add("--tokenizer", default="bpe", metavar="QUAL",
        help="bpe: um vocabulário aprendido neste texto; gpt2: o do GPT-2, aprendido em inglês; "
        "data/NOME: o de outro conjunto; ou a pasta ou o DONO/NOME de um modelo do Hugging Face")
    options = parse_arguments(parser, arguments)
    options.source = SOURCES.get(options.dataset, {})
    options.encoding = options.encoding or options.source.get("encoding", "utf-8")
    first = (options.input or options.url or [CORPUS])[0]
    options.name = options.name or options.dataset or Path(first).resolve().name.split(".")[0]
    folder = Path("data", options.name)
    check_options(options, folder)
    if options.tokenizer == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif Path(options.tokenizer, "meta.json").exists():
        _, tokenizer = read_meta(Path(options.tokenizer))
    elif options.tokenizer != "bpe":
        tokenizer = read_pretrained_tokenizer(fetch_pretrained(options.tokenizer))

    files = fetch_inputs(options)
    corpus = Corpus(files, options)
    sample, limit = read_sample(corpus, options.val_fraction)
    if options.tokenizer == "bpe":  # o que está na validação não pode influir no vocabulário
        tokenizer = make_vocabulary(sample, options.vocab_size)
    encoding = build_encoding(tokenizer)

    with whole_file(folder / "train.bin") as train, whole_file(folder / "val.bin") as val:
        splits = write_tokens({"train": train, "val": val}, corpus, limit, options.val_fraction,
                              encoding)
        if not splits["train"]["tokens"] or not splits["val"]["tokens"]:
            raise SystemExit(f"--val_fraction {options.val_fraction} deixa um dos lados vazio.")
        # meta.json é apagado antes da troca e gravado por último: um conjunto pela metade não o tem
        (folder / "meta.json").unlink(missing_ok=True)
    for part, split in splits.items():
        split["sha256"] = hashlib.sha256(token_sample(folder / f"{part}.bin")).hexdigest()
    with whole_file(folder / "vocab.tiktoken") as file:
        file.write(tokenizer["vocab"].encode())
    described = {key: value for key, value in tokenizer.items() if key != "vocab"}
    meta = {"source": [file.name for file in files], "val_fraction": options.val_fraction,
            "tokenizer": described, "splits": splits}
    with whole_file(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode())
    report(folder, splits, encoding, sample[0])


def check_options(options, folder):
    """Confere as opções antes de qualquer trabalho; a que não serve encerra o programa."""
    if not 257 <= options.vocab_size <= 65_536:
        raise SystemExit(
            f"--vocab_size {options.vocab_size} não serve: use de 257 (os 256 bytes e o "
            f"{END_OF_TEXT}) a 65536 (cada token ocupa 2 bytes).")
    if not 0 < options.val_fraction < 1:
        raise SystemExit(f"--val_fraction {options.val_fraction} não serve: use algo entre 0 e 1.")
    if not options.max_mb > 0:
        raise SystemExit(f"--max_mb {options.max_mb} não serve: use mais que 0.")
    if not 1 <= options.shards <= options.source.get("shards", 1):
        raise SystemExit(f"--shards {options.shards} não serve: mc4 tem de 1 a 1024 partes, e as "
                         "outras fontes, uma só.")
    if folder.parent != Path("data") or folder.name.startswith("."):
        raise SystemExit(f"--name {options.name!r} não serve: use um nome simples, sem barras.")
    try:
        codecs.lookup(options.encoding)
    except LookupError:
        raise SystemExit(f"--encoding {options.encoding!r} não existe: tente utf-8 ou cp1252.")


def report(folder, splits, encoding, example):
    """Mostra o que foi feito: os números, os tokens mais longos e um trecho cortado em tokens."""
    train, val = splits["train"], splits["val"]
    total = {key: train[key] + val[key] for key in ("documents", "characters", "bytes", "tokens")}
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    ordinary = (i for i in range(len(tokens)) if not encoding.is_special_token(i))
    longest = sorted(ordinary, key=lambda i: len(tokens[i]), reverse=True)[:8]
    tokens = [token.decode(errors="backslashreplace").replace("\n", "↵") for token in tokens]
    start = example[:60].rpartition(" ")[0] or example[:60]
    cut = [tokens[i] for i in encoding.encode_ordinary(start)]
    name, out = quote(folder.name), quote(f"out/{folder.name}")
    options = "" if folder.name == "contos" else f" --dataset={name} --out_dir={out}"
    show_progress("", end="\r")
    print(f"""\
documentos       {group(total["documents"])} ({group(val["documents"])} ficam para a validação)
caracteres       {group(total["characters"])}
tokens           {group(total["tokens"])}, de um vocabulário de {group(encoding.n_vocab)}
bytes por token  {total["bytes"] / total["tokens"]:.2f}
os mais longos   {"|".join(tokens[i] for i in longest)}
um exemplo       {"|".join(cut)}

Pronto: {folder}/ tem train.bin, val.bin, vocab.tiktoken e meta.json. Agora treine:
    python train.py config/tiny.py{options}""")


def group(number):
    """Um número grande em grupos de três algarismos: group(1234567) -> "1 234 567"."""
    return f"{number:,}".replace(",", " ")


def duration(seconds):
    """Um tempo fácil de ler: duration(200) -> "3min20s"."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}min{seconds:02}s"
    return f"{minutes // 60}h{minutes % 60:02}min"


if __name__ == "__main__":
    run(main)
