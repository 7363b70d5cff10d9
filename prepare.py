"""De texto a tokens: aprende um vocabulário e grava os números que o modelo vai ler.

É o passo 3 do *LLM do Zero* (dados e tokenização). Um modelo não lê letras, lê números. Este
programa junta os textos, separa uma parte para a validação, aprende com o resto quais pedaços de
palavra merecem um número (o vocabulário) e grava tudo em data/NOME/:

    train.bin, val.bin   os números dos tokens, 2 bytes cada um (uint16, little-endian)
    vocab.tiktoken       o vocabulário: os bytes de cada token em base64 e o número dele
    meta.json            como o texto foi cortado, os tamanhos e uma soma SHA-256 de cada .bin

Como rodar:

    python prepare.py                              prepara as histórias que vêm com o projeto
    python prepare.py --input livro.txt poemas/    prepara os seus textos (UTF-8)
"""

import argparse
import base64
import difflib
import hashlib
import heapq
import json
import os
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import regex
import tiktoken

# ------------------------------------------------------------------------------------------------
# A lição: tokenização
#
# BPE (byte pair encoding; Sennrich et al. 2016) começa com 256 tokens, um por byte. Depois repete:
# acha o par de tokens vizinhos mais frequente e faz dele um token novo. "qu", "ção" e " casa"
# viram um número cada, e nenhum texto fica de fora: o que não se aprendeu continua em bytes.

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


def make_tokenizer(kind, ranks):
    """Descreve um tokenizador só com tipos simples, para viajar em meta.json e nos checkpoints.

    `vocab` é o texto do arquivo vocab.tiktoken; vocab_size conta também o <|endoftext|>.
    """
    vocab = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    return {"kind": kind, "pattern": PATTERN, "special_tokens": {END_OF_TEXT: len(ranks)},
            "vocab_size": len(ranks) + 1, "vocab": vocab}


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


def gpt2_ranks():
    """O vocabulário do GPT-2 (50.256 tokens, aprendidos em inglês), baixado pelo tiktoken."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # sem rede
        raise SystemExit(
            f"Não consegui baixar o vocabulário do GPT-2 ({type(error).__name__}). Use um "
            "próprio (--tokenizer bpe), ou aponte TIKTOKEN_CACHE_DIR para uma pasta que o tenha.")
    return {encoding.decode_single_token_bytes(i): i for i in range(encoding.eot_token)}


# ------------------------------------------------------------------------------------------------
# O texto: de arquivos a documentos, de documentos a treino e validação

CORPUS = Path(__file__).with_name("data") / "contos.txt"
LONGEST = 64 * 1024  # em caracteres: um documento maior que isto é cortado em vários
MIN_TEXT = 1000  # em caracteres: menos que isto não ensina nada


def find_files(inputs):
    """Os arquivos pedidos, e os .txt das pastas pedidas, em ordem de nome."""
    files = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() == ".txt")
            if not found:
                raise SystemExit(f"A pasta {path} não tem nenhum arquivo .txt.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise SystemExit(f"Não achei {path}. Confira o caminho dado em --input.")
    return list(dict.fromkeys(files))  # o mesmo arquivo, pedido duas vezes, entra uma


def read_documents(files):
    """Lê os textos e gera os documentos, um por vez, sem as linhas vazias das pontas.

    Uma linha que só tem <|endoftext|> separa documentos; o fim do arquivo também. Um documento com
    mais de LONGEST caracteres sai em vários, cortado de preferência em fins de parágrafo.
    """
    for path in files:
        for document in read_file(path):
            document = document.strip("\n")
            if document:
                yield document


def read_file(path):
    """Gera os documentos de um arquivo; no máximo dois trechos de LONGEST ficam na memória."""
    text = ""
    try:
        # utf-8-sig aceita a marca (BOM) que o Windows põe no começo; \r\n é lido como \n
        with open(path, encoding="utf-8-sig") as file:
            while line := file.readline(LONGEST):
                if line.strip() == END_OF_TEXT and text[-1:] in ("", "\n"):
                    yield text
                    text = ""
                    continue
                text += line
                while len(text) > LONGEST:
                    end = find_break(text, LONGEST)
                    yield text[:end]
                    text = text[end:]
    except UnicodeDecodeError:
        raise SystemExit(
            f"{path} não está em UTF-8: o byte na posição {bad_byte(path)} não faz sentido. "
            "Abra-o num editor de texto e salve-o como UTF-8.")
    yield text


def find_break(text, limit):
    """Onde cortar: o último fim de parágrafo, linha, frase ou palavra pouco antes de `limit`."""
    for mark in ("\n\n", "\n", ". ", " "):
        position = text.rfind(mark, limit * 4 // 5, limit)
        if position >= 0:
            return position + len(mark)
    return limit


def bad_byte(path):
    """A posição do primeiro byte de um arquivo que não é UTF-8, contada desde 0."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)


def val_limit(documents, val_fraction):
    """O limite do hash abaixo do qual um documento é de validação; None se há um documento só.

    Para que nenhum lado fique vazio, o limite vai, se preciso, até o documento mais próximo.
    """
    lowest, highest, size = 2**64, -1, 0
    for document in documents:
        number = content_hash(document)
        lowest, highest, size = min(lowest, number), max(highest, number), size + len(document)
    if size < MIN_TEXT:
        raise SystemExit(f"O texto tem só {size} caracteres; são precisos pelo menos {MIN_TEXT}.")
    if lowest == highest:
        return None
    return min(max(int(val_fraction * 2**64), lowest + 1), highest)


def split_documents(documents, limit, val_fraction):
    """Gera pares (parte, documento), em que a parte é "train" ou "val".

    Quem decide é um hash do conteúdo, um sorteio que sempre dá o mesmo resultado: um documento fica
    do mesmo lado mesmo que outros entrem ou saiam, e duas cópias dele nunca se separam.
    """
    for document in documents:
        if limit is None:  # um documento só: o fim dele vira a validação
            end = find_break(document, int(len(document) * (1 - val_fraction)))
            yield "train", document[:end].strip("\n")
            yield "val", document[end:].strip("\n")
        else:
            yield "val" if content_hash(document) < limit else "train", document


def content_hash(text):
    """Um número inteiro de 0 a 2**64 - 1, sempre o mesmo para o mesmo texto."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_tokens(files, documents, encoding):
    """Grava os tokens de cada documento, com um <|endoftext|> no fim, no arquivo da sua parte.

    files: {"train": arquivo, "val": arquivo}; documents: pares (parte, documento).
    Devolve o que meta.json diz de cada parte.
    """
    keys = ("documents", "characters", "bytes", "tokens")
    splits = {part: dict.fromkeys(keys, 0) for part in files}
    documents = iter(documents)
    while batch := list(islice(documents, 200)):  # o tiktoken reparte cada lote entre os núcleos
        # encode_ordinary: um "<|endoftext|>" no meio do texto é texto, não o token especial
        texts = [text for _, text in batch]
        encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        for (part, text), ids in zip(batch, encoded):
            data = np.array([*ids, encoding.eot_token], dtype="<u2").tobytes()
            files[part].write(data)
            for key, amount in zip(keys, (1, len(text), len(text.encode()), len(ids) + 1)):
                splits[part][key] += amount
        show_progress(f"{splits['train']['bytes'] / 1e6:.0f} MB em tokens")
    return splits


def token_sample(path):
    """Os tokens de um .bin que servem para conferi-lo: todos ou, acima de 256 MB, os das pontas."""
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if tokens.nbytes <= 256 * 2**20:
        return tokens
    return np.concatenate((tokens[: 2**19], tokens[-(2**19) :]))  # o primeiro e o último MiB


def read_meta(folder):
    """Lê o que prepare.py gravou em `folder`: devolve meta.json e o tokenizador completo."""
    options = "" if folder.name == "contos" else f" --input SEU_TEXTO --name {quote(folder.name)}"
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
    add("--input", nargs="+", metavar="CAMINHO",
        help="arquivos de texto em UTF-8, ou pastas de .txt; sem isto, as histórias do projeto")
    add("--name", metavar="NOME", help="o nome do conjunto; sem isto, o do primeiro --input")
    add("--vocab_size", type=int, default=4096, metavar="N",
        help="quantos tokens tem o vocabulário [%(default)s]")
    add("--val_fraction", type=float, default=0.05, metavar="F",
        help="a fração do texto que fica para a validação [%(default)s]")
    add("--tokenizer", choices=["bpe", "gpt2"], default="bpe",
        help="bpe: um vocabulário aprendido neste texto; gpt2: o do GPT-2, aprendido em inglês")
    options = parse_arguments(parser, arguments)
    inputs = options.input or [CORPUS]
    name = options.name or Path(inputs[0]).resolve().stem
    folder = Path("data", name)
    check_options(options, folder)

    files = find_files(inputs)
    limit = val_limit(read_documents(files), options.val_fraction)

    def documents():
        return split_documents(read_documents(files), limit, options.val_fraction)

    if options.tokenizer == "gpt2":
        ranks = gpt2_ranks()
    else:
        counts = Counter()
        for part, text in documents():
            if part == "train":  # o que está na validação não pode influir em nada
                counts.update(regex.findall(PATTERN, text))
        size = options.vocab_size - 1  # o último lugar é do <|endoftext|>
        ranks = train_bpe(counts, size, lambda n: show_progress(f"{n} de {size} tokens aprendidos"))
        if len(ranks) < size:
            print(f"O texto é pequeno: só rendeu {len(ranks) + 1} tokens, "
                  f"e não os {options.vocab_size} pedidos.")
    tokenizer = make_tokenizer(options.tokenizer, ranks)
    encoding = build_encoding(tokenizer)

    with whole_file(folder / "train.bin") as train, whole_file(folder / "val.bin") as val:
        splits = write_tokens({"train": train, "val": val}, documents(), encoding)
        # meta.json é apagado antes da troca e gravado por último: um conjunto pela metade não o tem
        (folder / "meta.json").unlink(missing_ok=True)
    for part, split in splits.items():
        split["sha256"] = hashlib.sha256(token_sample(folder / f"{part}.bin")).hexdigest()
    with whole_file(folder / "vocab.tiktoken") as file:
        file.write(tokenizer.pop("vocab").encode())
    meta = {"source": [file.name for file in files], "val_fraction": options.val_fraction,
            "tokenizer": tokenizer, "splits": splits}
    with whole_file(folder / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode())
    report(folder, splits, encoding, next(read_documents(files)))


def check_options(options, folder):
    """Confere as opções antes de qualquer trabalho; o que não serve encerra com mensagem."""
    if not 257 <= options.vocab_size <= 65_536:
        raise SystemExit(
            f"--vocab_size {options.vocab_size} não serve: use de 257 (os 256 bytes e o "
            f"{END_OF_TEXT}) a 65536 (cada token ocupa 2 bytes).")
    if not 0 < options.val_fraction < 1:
        raise SystemExit(f"--val_fraction {options.val_fraction} não serve: use algo entre 0 e 1.")
    if folder.parent != Path("data") or folder.name.startswith("."):
        raise SystemExit(f"--name {options.name!r} não serve: use um nome simples, sem barras.")


def report(folder, splits, encoding, example):
    """Mostra o que foi feito: os números, os tokens mais longos e um trecho cortado em tokens."""
    train, val = splits["train"], splits["val"]
    total = {key: train[key] + val[key] for key in ("documents", "characters", "bytes", "tokens")}
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    longest = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)[:8]
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
