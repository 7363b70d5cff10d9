"""Dar vida ao modelo: ele lê um começo e escreve o resto, um token de cada vez.

É o passo 6 do *LLM do Zero*. O modelo dá uma nota a cada token do vocabulário; as notas viram
probabilidades; um sorteio escolhe o próximo token; ele entra no texto, e tudo se repete.

Como rodar, depois de um treino:

    python sample.py --start "O gato"
    python sample.py --start "O gato" --temperature 1.2 --num_samples 3
    python sample.py --init_from gpt2 --start "The cat"     o GPT-2 publicado, baixado
    python sample.py --export modelo                        grava no formato do Hugging Face
    python sample.py --attention "O gato viu o rato e _ele_ fugiu."    para onde o modelo olha

O texto sai em stdout e as informações em stderr: `python sample.py > conto.txt` guarda só o texto.
"""

import argparse
import codecs
import html
import json
import sys
import time
import unicodedata
from pathlib import Path

import regex

from model import (  # antes do torch: model.py ajusta o ambiente dele
    GPT, GPTConfig, choose_device, choose_dtype, load_weights, read_checkpoint, read_pretrained,
    to_pretrained, write_safetensors)
from prepare import (
    END_OF_TEXT, build_encoding, fetch_pretrained, parse_arguments, read_pretrained_tokenizer, run,
    to_pretrained_tokenizer, whole_file)

import torch
from torch.nn import functional as F


def find_checkpoint(out_dir):
    """O best.pt da pasta dada ou, sem pasta, o do treino mais recente em out/."""
    if out_dir:
        return Path(out_dir, "best.pt")
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("Não há treino em out/. Rode `python train.py config/tiny.py` primeiro.")
    print(f"[modelo: {found[-1]}]", file=sys.stderr)
    return found[-1]


def load_model(path):
    """Lê um .pt, uma pasta ou um modelo publicado: devolve o modelo e o tokenizador, descrito."""
    if str(path).endswith(".pt"):
        checkpoint = read_checkpoint(path)
    else:
        folder = fetch_pretrained(path)
        checkpoint = read_pretrained(folder)
        checkpoint["tokenizer"] = read_pretrained_tokenizer(folder)
    tokenizer = checkpoint["tokenizer"]
    with torch.device("meta"):  # só as formas: os pesos vêm do arquivo, não de um sorteio
        model = GPT(GPTConfig(**checkpoint["model_config"]))
    load_weights(model, checkpoint["model"], path)
    if model.config.vocab_size != tokenizer["vocab_size"]:
        raise SystemExit(f"{path}: o modelo dá notas a {model.config.vocab_size} tokens, e o "
                         f"vocabulário tem {tokenizer['vocab_size']}.")
    return model.eval(), tokenizer


def sampling_dtype(model, device, name="auto"):
    """A precisão para gerar: a que o chip faz melhor, ou a do nome dado."""
    if name == "auto" and device.type == "cpu" and model.num_params() < 25e6:
        return torch.float32  # um modelo pequeno: há pouca leitura da memória a poupar
    return choose_dtype(device, name)


def export(folder, model, tokenizer):
    """Grava o modelo no formato do Hugging Face: AutoModelForCausalLM e AutoTokenizer o abrem."""
    folder = Path(folder)
    if folder.exists():
        raise SystemExit(f"{folder} já existe: dê a --export uma pasta nova.")
    config, weights = to_pretrained(model)
    end = tokenizer["special_tokens"][END_OF_TEXT]
    ends = {"bos_token_id": end, "eos_token_id": end}
    names = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    contents = {
        "generation_config.json": ends | {"do_sample": True, "temperature": 0.8, "top_k": 20},
        "tokenizer.json": to_pretrained_tokenizer(tokenizer),
        "tokenizer_config.json": names | {"tokenizer_class": "PreTrainedTokenizerFast",
                                          "model_max_length": model.config.block_size},
        "config.json": config | ends}
    with whole_file(folder / "model.safetensors") as file:
        write_safetensors(file, weights)
    for name, content in contents.items():
        with whole_file(folder / name) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=2).encode())
    print(f"Pronto: {folder}/ abre com AutoModelForCausalLM.from_pretrained({str(folder)!r}).")


def read_start(start):
    """O começo do texto: o que foi escrito na linha de comando, ou FILE:caminho, de um arquivo."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SystemExit(f"Não achei {path}, pedido em --start.")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} não está em UTF-8 (byte {error.start}). Salve-o como UTF-8.")


def text_pieces(ids, encoding):
    """Transforma números de tokens em pedaços de texto, conforme chegam.

    Uma letra como "ã" tem dois bytes e pode estar cortada entre dois tokens: o decodificador guarda
    o começo dela até que o resto chegue.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        yield decoder.decode(encoding.decode_single_token_bytes(i))


# ------------------------------------------------------------------------------------------------
# Um olhar sobre a atenção: para que palavras o modelo olha


def split_words(text, tokenizer):
    """Separa uma frase em [(palavra, tokens dela), ...] e diz qual é a escolhida.

    A escolhida vem entre sublinhados (_ela_); sem eles, é a última. A frase começa pelo
    <|endoftext|>, como os textos do treino. As fusões do BPE não atravessam palavras: codificar
    cada uma por si dá os mesmos tokens que codificar a frase.
    """
    text = unicodedata.normalize("NFC", text)  # "ã" numa letra só, como nos textos do treino
    before, *marked = regex.split(r"(?<!\w)_([^_]+)_(?!\w)", text)
    if len(marked) > 2 or regex.search(r"(?<!\w)_|_(?!\w)", before + "".join(marked[1:])):
        raise SystemExit("Marque uma palavra só, entre dois sublinhados, como _ela_.")
    start, end = len(before), len(before + "".join(marked[:1]))  # onde está o que foi marcado
    encoding = build_encoding(tokenizer)
    words, asked = [("(começo)", [encoding.eot_token])], 0
    for match in regex.finditer(tokenizer["pattern"], before + "".join(marked)):
        word, tokens = match[0], encoding.encode_ordinary(match[0])
        inside = match.end() > start and match.start() < end
        if inside and asked:  # o que foi marcado tem mais de um pedaço, como guarda-chuva
            first, first_tokens = words.pop()
            word, tokens = first + word, first_tokens + tokens
        words.append((regex.sub(r"\p{C}", "␣", word.strip()) or "␣", tokens))
        if inside or not marked and regex.search(r"[\p{L}\p{N}]", word):
            asked = len(words) - 1
    if not asked:
        raise SystemExit("--attention pede uma frase, com ao menos uma palavra.")
    return words, asked


@torch.inference_mode()
def word_attention(model, words):
    """Quanto cada palavra (linha) olha para cada uma (coluna): (L, nh, W, W), em L camadas.

    De uma palavra de vários tokens, somam-se as parcelas que eles recebem e tira-se a média das que
    eles dão (Clark et al. 2019, "What Does BERT Look At?", seção 4): cada linha soma 1.
    """
    ids = torch.tensor([[token for _, tokens in words for token in tokens]])  # (1, T)
    if ids.size(1) > model.config.block_size:
        raise SystemExit(f"A frase tem {ids.size(1)} tokens, e este modelo enxerga no máximo "
                         f"{model.config.block_size}: encurte a frase.")
    weights = []  # de cada camada, (1, nh, T, T)
    model(ids.to(model.wte.weight.device), weights=weights)
    owner = [i for i, (_, tokens) in enumerate(words) for _ in tokens]  # a palavra de cada token
    member = F.one_hot(torch.tensor(owner)).float()  # (T, W)
    # (W, T) @ (L, nh, T, T) @ (T, W) -> (L, nh, W, W)
    return (member / member.sum(0)).T @ torch.cat(weights).float().cpu() @ member


def show_attention(options, model, tokenizer):
    """Mostra para que palavras a palavra escolhida olha, e grava a figura, se foi pedida."""
    words, asked = split_words(options.attention, tokenizer)
    shares = word_attention(model, words)  # (L, nh, W, W)
    numbers = []  # as camadas e as cabeças escolhidas, contadas a partir de 1
    for name, count in (("layer", shares.size(0)), ("head", shares.size(1))):
        chosen = getattr(options, name)
        if chosen is not None and not 1 <= chosen <= count:
            raise SystemExit(f"--{name} {chosen} não existe: este modelo tem de 1 a {count}.")
        numbers.append([chosen] if chosen else list(range(1, count + 1)))
    layers, heads = numbers
    shares = shares[layers[0] - 1 : layers[-1], heads[0] - 1 : heads[-1]]
    names = [f"camada {layer}, cabeça {head}" for layer in layers for head in heads]
    shares = shares.flatten(0, 1)  # (cabeças, W, W)
    rows = shares[:, asked]  # (cabeças, W): o olhar da palavra escolhida
    mean = rows.mean(0)
    print(f"Para onde olha «{words[asked][0]}»: "
          + (names[0] if len(names) == 1 else f"a média de {len(names)} cabeças") + "\n")
    width = max(len(word) for word, _ in words[: asked + 1])
    for i in mean[: asked + 1].argsort(descending=True).tolist():
        best = rows[:, i].argmax().item()
        bar = "█" * round(30 * (mean[i] / mean.max()).item())
        note = f" a que mais olha: {names[best]}, {rows[best, i]:.0%}" if len(names) > 1 else ""
        print(f"{words[i][0]:>{width}} {mean[i]:6.1%} {bar:<30}{note}".rstrip())
    print("\nIsto mostra para onde este modelo olha, e não o que é certo. O que uma cabeça não "
          "acha em\nlugar nenhum costuma ir para o começo.")
    if options.image:
        columns = len(heads) if len(layers) > 1 else min(3, len(heads))
        drawing = draw_attention(shares, [word for word, _ in words], asked, names, columns)
        with whole_file(Path(options.image)) as file:
            file.write(drawing.encode())
        print(f"A figura está em {options.image}.")


def draw_attention(shares, words, asked, names, columns):
    """Desenha um mapa de calor por cabeça: o texto de um SVG; shares: (cabeças, W, W).

    Em cada mapa, a linha é a palavra que olha, e a coluna, a olhada; quanto mais escuro, mais.
    """
    cell, gap, margin = 14, 24, 7 * max(map(len, words)) + 12  # em pixels
    side = len(words) * cell
    width = margin + columns * (side + gap)
    height = -(-len(names) // columns) * (side + gap) + margin
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="sans-serif" font-size="11" fill="#222">',
             '<rect width="100%" height="100%" fill="#fff"/>']  # legível também em página escura
    labels = [html.escape(word) for word in words]
    for k, name in enumerate(names):
        left, top = margin + k % columns * (side + gap), k // columns * (side + gap) + gap
        parts.append(f'<text x="{left}" y="{top - 5}">{name}</text>')
        for i, label in enumerate(labels):
            weight = ' font-weight="bold"' if i == asked else ""
            middle = (i + 0.8) * cell
            if k % columns == 0:
                parts.append(f'<text x="{left - 5}" y="{top + middle}" text-anchor="end"{weight}>'
                             f"{label}</text>")
            if k + columns >= len(names):  # o último da sua coluna
                x, y = left + middle, top + side + 5
                parts.append(f'<text x="{x}" y="{y}" text-anchor="end" '
                             f'transform="rotate(-90 {x} {y})"{weight}>{label}</text>')
            for j, share in enumerate(shares[k, i].tolist()):
                if share >= 0.01:
                    parts.append(f'<rect x="{left + j * cell}" y="{top + i * cell}" width="{cell}" '
                                 f'height="{cell}" fill="#1b4f9c" fill-opacity="{share:.2f}"/>')
        parts.append(f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="none" '
                     'stroke="#999"/>')
        parts.append(f'<rect x="{left}" y="{top + asked * cell}" width="{side}" height="{cell}" '
                     'fill="none" stroke="#d33"/>')
    return "\n".join([*parts, "</svg>\n"])


# ------------------------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Escreve textos com um modelo treinado.", allow_abbrev=False)
    add = parser.add_argument
    add("--start", default="", metavar="TEXTO", help="o começo do texto, ou FILE:arquivo.txt")
    add("--num_samples", type=int, default=1, metavar="N", help="quantos textos escrever [1]")
    add("--max_new_tokens", type=int, default=500, metavar="N",
        help="no máximo quantos tokens tem cada um [500]")
    add("--temperature", type=float, default=0.8, metavar="X",
        help="quanto arriscar: 0 fica com o mais provável, 1 segue as probabilidades [0.8]")
    add("--top_k", type=int, default=20, metavar="K",
        help="sortear só entre os K tokens mais prováveis; 0 não limita [20]")
    add("--seed", type=int, default=1337, metavar="N",
        help="a mesma semente dá o mesmo texto [1337]")
    add("--out_dir", metavar="PASTA", help="a pasta do treino; sem isto, o mais recente em out/")
    add("--init_from", metavar="MODELO",
        help="em vez de um treino seu: um .pt, gpt2 (gpt2-medium, gpt2-large, gpt2-xl), DONO/NOME "
        "no Hugging Face, ou uma pasta nesse formato")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--attention", metavar="FRASE",
        help="mostra para que palavras olha a que vier entre sublinhados (_ela_), ou a última")
    add("--layer", type=int, metavar="N", help="com --attention: só esta camada, de 1 em diante")
    add("--head", type=int, metavar="N", help="com --attention: só esta cabeça, de 1 em diante")
    add("--image", metavar="ARQUIVO.svg", help="com --attention: um mapa de calor por cabeça")
    one.add_argument(
        "--export", metavar="PASTA", help="só grava o modelo no formato do Hugging Face")
    add("--device", default="auto", metavar="NOME", help="auto, cuda, mps ou cpu [auto]")
    add("--dtype", default="auto", metavar="NOME", help="auto, float32, bfloat16 ou float16 [auto]")
    options = parse_arguments(parser, arguments)
    least = {"num_samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0}
    for name, limit in least.items():
        if not getattr(options, name) >= limit:
            raise SystemExit(f"--{name} {getattr(options, name)} não serve: o mínimo é {limit}.")
    if options.seed >= 2**32:
        raise SystemExit(f"--seed {options.seed} não serve: o máximo é {2**32 - 1}.")

    if options.attention is None and (options.layer, options.head, options.image) != (None,) * 3:
        parser.error("--layer, --head e --image só valem com --attention")
    if options.image is not None and not options.image.endswith(".svg"):
        raise SystemExit(f"--image {options.image!r} não serve: a figura é um arquivo .svg.")

    start = read_start(options.start)
    device = choose_device(options.device)
    model, tokenizer = load_model(options.init_from or find_checkpoint(options.out_dir))
    if options.export:
        return export(options.export, model, tokenizer)
    model = model.to(device, sampling_dtype(model, device, options.dtype))
    if options.attention is not None:
        return show_attention(options, model, tokenizer)
    encoding = build_encoding(tokenizer)
    # no treino, o <|endoftext|> fecha um documento; logo depois dele começa outro
    ids = [encoding.eot_token, *encoding.encode_ordinary(start)]
    idx = torch.tensor([ids] * options.num_samples, device=device)  # (B, T)
    random = torch.Generator(device).manual_seed(options.seed)
    began = time.perf_counter()
    tokens = model.generate(idx, options.max_new_tokens, options.temperature, options.top_k,
                            stop_token=encoding.eot_token, generator=random)
    if options.num_samples == 1:
        count = 0
        print(start, end="", flush=True)
        for count, piece in enumerate(text_pieces((token.item() for token in tokens), encoding), 1):
            print(piece, end="", flush=True)
        print()
    else:
        rows = [[] for _ in range(options.num_samples)]
        for column in tokens:  # (B,): um token de cada texto; os que já acabaram repetem o do fim
            for row, token in zip(rows, column.tolist()):
                if token != encoding.eot_token:
                    row.append(token)
        count = sum(map(len, rows))
        texts = [start + "".join(text_pieces(row, encoding)) for row in rows]
        print("\n---------------\n".join(texts))
    seconds = time.perf_counter() - began
    print(f"[{count} tokens, {count / seconds:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
