"""De texto a tokens (passo 3 do *LLM do Zero*): aprende um vocabulário e grava os números dele.

Um modelo não lê letras, lê números. Este programa separa uma parte dos textos, que o modelo não
verá no treino (a validação), aprende com o resto quais pedaços de palavra (os tokens) merecem um
número e grava em data/NOME/ os tokens (train.bin e val.bin, em uint16), vocab.tiktoken e meta.json.

    python prepare.py                              prepara as histórias que vêm com o projeto
    python prepare.py --input livro.txt poemas/    prepara os seus textos
    python prepare.py --dataset machado            baixa e prepara Machado de Assis
"""

import argparse
import base64
import difflib
import glob
import gzip
import hashlib
import heapq
import io
import json
import os
import sys
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import regex
import requests
import tiktoken

# BPE (byte pair encoding; Sennrich et al. 2016) começa com 256 tokens, um por byte. Depois repete:
# acha o par de tokens vizinhos mais frequente e faz dele um token novo (uma fusão). "qu", "ção" e
# " casa" viram um número cada, e nenhum texto fica de fora: o que não se aprendeu fica em bytes.
END_OF_TEXT = "<|endoftext|>"  # o token que fecha cada documento
# O corte do GPT-2 em "palavras", que as fusões nunca atravessam: contrações do inglês; letras,
# algarismos ou sinais, cada grupo com o espaço que vem antes; e por fim os espaços que sobram.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(word_counts, size):
    """Aprende até `size` tokens com as palavras e o número de vezes que cada uma aparece.

    Devolve {bytes do token: número}, na ordem em que foram aprendidos. Funde-se sempre o par mais
    frequente e, no empate, o de números menores; termina antes se nenhum aparece duas vezes.

        train_bpe({"casa": 3, "asa": 2}, 258) -> os 256 bytes, b"as": 256, b"asa": 257
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokens = list(ranks)  # o caminho de volta: número -> bytes
    words = [list(word.encode()) for word in word_counts]  # cada palavra, em números de tokens
    times = list(word_counts.values())
    pair_counts, where = Counter(), defaultdict(set)  # where: em que palavras cada par apareceu
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += times[i]
            where[pair].add(i)
    # a fila entrega o par mais frequente; uma contagem que já mudou é ignorada ao sair
    queue = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(queue)
    while queue and len(tokens) < size:
        count, best = heapq.heappop(queue)
        if -count < 2 or -count != pair_counts[best]:
            continue
        merged = tokens[best[0]] + tokens[best[1]]
        new = ranks.setdefault(merged, len(tokens))  # raro: dois pares formam os mesmos bytes
        if new == len(tokens):
            tokens.append(merged)
        changes = Counter()  # só as palavras que contêm o par são refeitas
        for i in where.pop(best):
            for pair in zip(words[i], words[i][1:]):
                changes[pair] -= times[i]
            words[i] = merge(words[i], best, new)
            for pair in zip(words[i], words[i][1:]):
                changes[pair] += times[i]
                where[pair].add(i)
        for pair, change in changes.items():
            pair_counts[pair] += change
            heapq.heappush(queue, (-pair_counts[pair], pair))
    return ranks


def merge(ids, pair, new):
    """Troca cada ocorrência do par pelo token novo: merge([1, 2, 3, 1], (1, 2), 9) -> [9, 3, 1]."""
    result = []
    for token in ids:
        if result and (result[-1], token) == pair:
            result[-1] = new
        else:
            result.append(token)
    return result


def make_tokenizer(kind, ranks, special_tokens):
    """Descreve um tokenizador (ranks: {bytes: número}) só com tipos simples, para o checkpoint."""
    vocab = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    return {"kind": kind, "pattern": PATTERN, "special_tokens": special_tokens,
            "vocab_size": len(ranks) + len(special_tokens), "vocab": vocab}


def build_encoding(tokenizer):
    """Monta o tiktoken.Encoding, que transforma texto em números e números em texto, depressa."""
    lines = map(str.split, tokenizer["vocab"].splitlines())
    return tiktoken.Encoding(
        tokenizer["kind"], pat_str=tokenizer["pattern"], special_tokens=tokenizer["special_tokens"],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        explicit_n_vocab=tokenizer["vocab_size"])


def open_tokenizer(name):
    """O tokenizador de data/NOME, ou o de um GPT-2 publicado: gpt2, DONO/NOME ou uma pasta."""
    if Path(name, "meta.json").exists():
        return read_meta(Path(name))[1]
    # um caminho nosso que não existe (data/x, pasta/a.bin) não é DONO/NOME
    known = regex.fullmatch(r"gpt2(-\w+)?|(?!data/|out/)[\w.-]+/[\w.-]+(?<!\.bin|\.pt)", name)
    if not Path(name).is_dir() and (not known or Path(name.split("/")[0]).is_dir()):
        raise SystemExit(f"Não achei {name}: use gpt2, gpt2-medium..., DONO/NOME ou uma pasta.")
    try:
        if "/" not in name and not Path(name).is_dir():  # gpt2...: o tiktoken já o conhece
            theirs = tiktoken.get_encoding("gpt2")
            ranks = {theirs.decode_single_token_bytes(i): i for i in range(theirs.eot_token)}
            return make_tokenizer("gpt2", ranks, {END_OF_TEXT: theirs.eot_token})
        from transformers import AutoTokenizer
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        theirs = AutoTokenizer.from_pretrained(name)
        byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}  # lá, "Ġ" é o 32
        special, vocab = theirs.get_added_vocab(), theirs.get_vocab()
        ordinary = sorted(vocab.keys() - special.keys(), key=vocab.get)
        ranks = {bytes(map(byte_of.get, token)): vocab[token] for token in ordinary}
        special[END_OF_TEXT] = special.pop(theirs.eos_token)
        ours = make_tokenizer("gpt2", ranks, special)
        text = " don't 12\n".join(token.decode(errors="ignore") for token in ranks)  # a prova
        ids = theirs.encode(text, add_special_tokens=False, verbose=False)
        if ours["vocab_size"] > 65_536 or build_encoding(ours).encode_ordinary(text) != ids:
            raise ValueError("corta os textos de outro modo, ou tem tokens demais")
        return ours
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SystemExit(f"Não consegui abrir {name} como um vocabulário do GPT-2 ({reason}). "
                         "Há também prepare.py --tokenizer bpe.")


# o que se lê de uma pasta ou de um .zip: textos, e nada escondido (.nome, __MACOSX)
READABLE = regex.compile(r"(?i)(?!(.*/)?(\.|__MACOSX)).*\.(txt|md|jsonl|zip|(txt|md|jsonl)\.gz)")


def normalize(text):
    """A forma única de um texto: "ã" numa letra só (NFC), \\n no fim das linhas, UTF-8 válido."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode(errors="replace").decode()
    return unicodedata.normalize("NFC", text)


def find_files(inputs):
    """Gera os arquivos pedidos, baixados se é preciso, e os textos das pastas, em ordem de nome."""
    for name in inputs:
        found = [download(name)] if "://" in str(name) else []
        # o Prompt do Windows não expande livros/*.txt
        for path in map(Path, [name] if Path(name).exists() else sorted(glob.glob(str(name)))):
            found += [path] if path.is_file() else sorted(
                file for file in path.rglob("*")
                if READABLE.fullmatch(file.relative_to(path).as_posix()) and file.is_file())
        if not found:
            raise SystemExit(f"Não achei {name}: nem arquivo, nem pasta com .txt, .md ou .jsonl. "
                             "Um endereço da web começa com https://.")
        yield from found


def read_documents(inputs, options, max_mb):
    """Gera os documentos, um por vez, sem guardar o texto todo nem baixar o que não vai usar."""
    for path in find_files(inputs):
        try:
            if path.suffix.lower() == ".zip":
                archive = zipfile.ZipFile(path)
                files = ((f"{path}/{n}", archive.open(n)) for n in sorted(archive.namelist())
                         if READABLE.fullmatch(n) and not n.lower().endswith((".zip", ".gz")))
            else:
                opener = gzip.open if path.suffix.lower() == ".gz" else open
                files = [(str(path), opener(path, "rb"))]
            for name, file in files:
                for text in split_documents(name, file, options):
                    if text := normalize(text).strip("\n"):
                        yield text
                        max_mb -= len(text.encode()) / 1e6
                    if max_mb <= 0:
                        return
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, RuntimeError) as error:
            raise SystemExit(f"{path} está danificado ou tem senha ({error}).")


def split_documents(name, file, options):
    """Gera os documentos de um arquivo: num .jsonl, um por linha; num texto, cada um acaba numa
    linha terminada em <|endoftext|>. Os de mais de options.longest caracteres são cortados."""
    utf16 = file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")  # o começo que o Windows põe
    lines, size, number = [], 0, 0
    try:
        for number, line in enumerate(
                io.TextIOWrapper(file, "utf-16" if utf16 else options.encoding), 1):
            if regex.search(r"\.jsonl?(\.gz)?$", name.lower()):
                line = json.loads(line)[options.text_field] + END_OF_TEXT if line.strip() else ""
            ends = line.rstrip().endswith(END_OF_TEXT)
            lines.append(line.rstrip().removesuffix(END_OF_TEXT) if ends else line)
            size += len(line)
            if ends or size > options.longest:
                pieces = cut("".join(lines), options.longest)
                lines = [] if ends else [pieces.pop()]
                size = len(lines[0]) if lines else 0
                yield from pieces
        yield "".join(lines)
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, UnicodeDecodeError):  # falhou num trecho depois das linhas lidas
            number += error.object[: error.start].count(b"\n") + 1
        raise SystemExit(f"{name}, linha {number}: não consegui ler ({type(error).__name__}). Veja "
                         "--encoding (cp1252 no Windows antigo) e, num .jsonl, --text_field.")


def cut(text, longest):
    """Corta um texto em trechos de cerca de `longest` caracteres, se possível entre parágrafos."""
    long, short = f".{{{longest * 4 // 5},{longest}}}", f".{{1,{longest}}}"
    return regex.findall(rf"(?s){short}\Z|{long}\n\n|{long}\n|{long}\. |{long} |{short}", text)


def content_hash(text):
    """Um número de 0 a 2**64 - 1, sempre o mesmo para o mesmo texto."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


SOURCES = {  # as coleções que se podem baixar: os endereços e a codificação
    "machado": (["https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/"
                 "machado.zip"], "cp1252"),
    "mc4": (["https://huggingface.co/datasets/allenai/c4/resolve/main/multilingual/"
             f"c4-pt.tfrecord-{part:05d}-of-01024.json.gz" for part in range(1024)], "utf-8")}


def download(url):
    """Baixa um arquivo, uma vez só, e devolve onde ficou; o que parou no meio continua."""
    name = f"{content_hash(url):016x}-{Path(regex.sub('[?#].*', '', url)).name[-60:]}"
    path, part = (Path("data", ".cache", name + suffix) for suffix in ("", ".part"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # só tem este nome quando está inteiro
        return path
    for wait in (1, 2, 0):
        done = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={done}-", "Accept-Encoding": "identity"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as reply:
                if reply.status_code == 416:  # o .part não serve: já está inteiro, ou é de outro
                    part.unlink(missing_ok=True)
                reply.raise_for_status()
                if "html" in reply.headers.get("Content-Type", ""):
                    raise SystemExit(f"{url} é uma página da web, e não um arquivo de texto.")
                done = done if reply.status_code == 206 else 0  # 200: o servidor mandou tudo
                total = done + int(reply.headers.get("Content-Length", 0))
                with open(part, "ab" if done else "wb") as file:
                    for chunk in reply.iter_content(2**16):
                        done += file.write(chunk)
                        show_progress(f"{path.name}: {done / 1e6:.1f} de {total / 1e6:.1f} MB")
            if done < total:
                raise requests.ConnectionError("acabou antes da hora")
            return part.replace(path)
        except requests.RequestException as error:
            reason = error
            time.sleep(wait)
    raise SystemExit(f"Não consegui baixar {url} ({reason}). Rode de novo: continua de onde parou.")


def write_tokens(folder, documents, limit, encoding):
    """Grava em val.bin os documentos de content_hash abaixo de limit, em train.bin os outros."""
    splits = {"train": Counter(), "val": Counter()}
    with whole_file(folder / "train.bin") as train, whole_file(folder / "val.bin") as val:
        while batch := list(islice(documents, 100)):
            for text, ids in zip(batch, encoding.encode_ordinary_batch(batch)):
                part, file = ("val", val) if content_hash(text) < limit else ("train", train)
                file.write(np.array([*ids, encoding.eot_token], dtype="<u2").tobytes())
                splits[part].update(  # num Counter, soma
                    documents=1, characters=len(text), bytes=len(text.encode()),
                    tokens=len(ids) + 1, markers=text.count("<|"), nulls=text.count("\0"))
            show_progress(f"{splits['train']['bytes'] / 1e6:.0f} MB em tokens")
        # meta.json é apagado antes da troca e gravado por último: um conjunto pela metade não o tem
        (folder / "meta.json").unlink(missing_ok=True)
    return splits


def read_meta(folder):
    """Lê o que prepare.py gravou em `folder`: devolve meta.json e o tokenizador completo."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        vocab = (folder / "vocab.tiktoken").read_text(encoding="utf-8")
        tokenizer = meta["tokenizer"] | {"vocab": vocab}  # meta.json o guarda sem o vocab
        build_encoding(tokenizer)  # só para ver se está inteiro
        return meta, tokenizer
    except (OSError, ValueError, TypeError, KeyError, AssertionError):
        flags = "--dataset" if folder.name in SOURCES else "--input TEXTO --name"
        flags = "" if folder.name == "contos" else f" {flags} {folder.name}"
        raise SystemExit(f"{folder} falta ou está danificado: rode `python prepare.py{flags}`.")


@contextmanager
def whole_file(path):
    """Abre para escrita, em bytes, um arquivo que só ganha o nome `path` quando está completo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # no disco de verdade, antes de trocar o nome
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # com o disco cheio, torch.save dá RuntimeError
        reason = getattr(error, "strerror", "disco cheio?")
        raise SystemExit(f"Não consegui gravar {path} ({reason}). O que já existia está intacto.")
    finally:
        temporary.unlink(missing_ok=True)


PORTUGUESE = {  # o argparse fala inglês, mas passa cada frase por uma função de tradução
    "usage: ": "uso: ", "options": "opções", "positional arguments": "argumentos",
    "show this help message and exit": "mostra esta ajuda e termina",
    "%(prog)s: error: %(message)s\n": "%(prog)s: erro: %(message)s\n",
    "argument %(argument_name)s: %(message)s": "%(argument_name)s: %(message)s",
    "expected one argument": "falta o valor", "not allowed with argument %s": "não combina com %s",
    "invalid %(type)s value: %(value)r": "%(value)r não é do tipo %(type)s",
    "invalid choice: %(value)r (choose from %(choices)s)": "%(value)r não existe; use %(choices)s"}
argparse._ = lambda text: PORTUGUESE.get(text, text)


def parse_arguments(parser, arguments=None):
    """O parser.parse_args, que sugere o nome mais parecido quando não conhece uma opção."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = regex.findall(r"--\w+", parser.format_help())
        nearest = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        parser.error(f"não conheço {unknown[0]!r}" + (f". Seria {nearest[0]}?" if nearest else ""))
    return options


def show_progress(text, plain=False):
    """Num terminal, reescreve sempre a mesma linha; num arquivo, só escreve se plain."""
    if sys.stdout.isatty():
        print(f"\r{text[:79]:<79}", end="\r", flush=True)
    elif plain:
        print(text, flush=True)


def run(main):
    """Roda o main de um programa: saída em UTF-8, e os erros do sistema em uma linha."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # num notebook, a saída é de outro tipo
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl+C, ou quem lia a saída foi embora
        os._exit(130)
    except ModuleNotFoundError as error:
        raise SystemExit(f"Isto pede mais uma biblioteca: pip install {error.name}")
    except (MemoryError, OSError) as error:  # permissão negada...
        raise SystemExit(f"Erro do sistema: {error or 'faltou memória'}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Transforma textos em tokens, na pasta data/NOME/.", allow_abbrev=False)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    source("--input", nargs="+", default=[Path(__file__).with_name("data") / "contos.txt"],
           help="arquivos ou pastas: .txt, .md, .jsonl, .gz, .zip [as histórias do projeto]")
    source("--url", nargs="+", help="arquivos assim, para baixar")
    source("--dataset", choices=SOURCES, help="uma coleção para baixar: machado (a obra de Machado "
           "de Assis; domínio público) ou mc4 (textos da web; ODC-BY)")
    add("--max_mb", type=float, default=float("inf"), help="usar no máximo estes MB de texto")
    add("--encoding", help="a dos textos: cp1252 nos antigos do Windows [utf-8]")
    add("--text_field", default="text", help="o campo em que está o texto, num .jsonl [text]")
    add("--name", help="o nome do conjunto; sem isto, o da coleção ou do primeiro arquivo")
    add("--vocab_size", type=int, default=4096, help="quantos tokens aprender [4096]")
    add("--val_fraction", type=float, default=0.05, help="a fração para a validação [0.05]")
    add("--tokenizer", default="bpe", help="bpe (aprendido neste texto), data/NOME (o de outro "
        "conjunto), gpt2, ou o de um modelo publicado: DONO/NOME, ou a pasta [bpe]")
    options = parse_arguments(parser, arguments)
    inputs, encoding = SOURCES.get(options.dataset, (options.url or options.input, "utf-8-sig"))
    options.encoding, options.longest = options.encoding or encoding, 64 * 1024  # em caracteres
    first = min(glob.glob(str(inputs[0])), default=regex.sub("[?#].*", "", str(inputs[0])))
    options.name = options.name or options.dataset or regex.sub(
        r"(\.(txt|md|jsonl?|zip|gz))+$", "", Path(first).resolve().name)
    folder = Path("data", options.name)
    if not (257 <= options.vocab_size <= 65_536 and 0 < options.val_fraction < 1):
        parser.error("--vocab_size vai de 257 a 65536, e --val_fraction fica entre 0 e 1")
    if folder.parent != Path("data") or options.name.startswith("."):
        parser.error(f"--name {options.name!r} não serve: use um nome simples, sem barras")
    tokenizer = None if options.tokenizer == "bpe" else open_tokenizer(options.tokenizer)

    # o vocabulário se aprende com o começo do texto, até 20 MB
    sample = list(read_documents(inputs, options, min(20, options.max_mb)))
    if len(set(sample)) == 1:  # um documento só: cortado em 20, há o que validar
        options.longest = max(1, len(sample[0]) // 20)
        sample = list(read_documents(inputs, options, min(20, options.max_mb)))
    hashes = sorted(map(content_hash, sample))
    if sum(map(len, sample)) < 1000 or hashes[0] == hashes[-1]:
        raise SystemExit(f"{inputs[0]}: {sum(map(len, sample))} caracteres são pouco texto.")
    # abaixo do limite é validação; num texto pequeno, nenhum lado fica vazio
    limit = min(max(int(options.val_fraction * 2**64), hashes[0] + 1), hashes[-1])
    if not tokenizer:  # a validação não pode influir no vocabulário
        words = (word for text in sample if content_hash(text) >= limit
                 for word in regex.findall(PATTERN, text) if len(word) < 100)
        ranks = train_bpe(Counter(words), options.vocab_size - 1)  # mais o <|endoftext|>
        tokenizer = make_tokenizer("bpe", ranks, {END_OF_TEXT: len(ranks)})
    encoding = build_encoding(tokenizer)
    splits = write_tokens(folder, read_documents(inputs, options, options.max_mb), limit, encoding)
    with whole_file(folder / "vocab.tiktoken") as file:
        file.write(tokenizer.pop("vocab").encode())
    meta = {"source": [Path(x).name for x in inputs], "tokenizer": tokenizer, "splits": splits}
    with whole_file(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode())

    total = splits["train"] + splits["val"]
    longest = sorted(encoding.token_byte_values(), key=len, reverse=True)[:8]
    example = encoding.decode_tokens_bytes(encoding.encode_ordinary(sample[0][:60]))
    tokens = [t.decode(errors="backslashreplace").replace("\n", "↵") for t in longest + example]
    print(f"""\
documentos       {total["documents"]} ({splits["val"]["documents"]} ficam para a validação)
caracteres       {total["characters"]}
tokens           {total["tokens"]}, de um vocabulário de {encoding.n_vocab}
bytes por token  {total["bytes"] / total["tokens"]:.2f}
os mais longos   {"|".join(tokens[:8])}
um exemplo       {"|".join(tokens[8:])}\n""")
    if options.tokenizer == "bpe" and encoding.n_vocab < options.vocab_size:
        print(f"O texto é pequeno: não rendeu os {options.vocab_size} tokens pedidos.")
    if total["markers"] or total["nulls"]:
        print(f"Atenção: há no texto {total['markers']} marcas <|...|> (viram letras) e "
              f"{total['nulls']} caracteres nulos (talvez --encoding utf-16).")
    flags = f" --dataset={options.name} --out_dir=out/{options.name}"
    print(f"Pronto: {folder}/ tem train.bin, val.bin, vocab.tiktoken e meta.json. Agora treine:\n"
          f"    python train.py config/tiny.py{'' if options.name == 'contos' else flags}")


if __name__ == "__main__":
    run(main)
