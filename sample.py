"""Dar vida ao modelo (passo 6 do *LLM do Zero*): ele lê um começo e escreve o resto.

O modelo dá uma nota a cada token do vocabulário; as notas viram probabilidades; um sorteio escolhe
o próximo token; ele entra no texto, e tudo se repete. Depois de um treino:

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
import os
import sys
import time
from pathlib import Path

import regex

# antes do torch: model.py ajusta o ambiente dele
from model import choose_device, choose_dtype, from_pretrained, read_checkpoint, to_pretrained
from prepare import (
    END_OF_TEXT, build_encoding, make_tokenizer, normalize, open_tokenizer, parse_arguments, run,
    whole_file)

import torch
from torch.nn import functional as F


def load_model(name):
    """Lê um .pt, uma pasta ou um modelo publicado: devolve o modelo e o dict do tokenizador."""
    if str(name).endswith(".pt"):
        checkpoint = read_checkpoint(name)
        model, tokenizer = checkpoint["model"], checkpoint["tokenizer"]
    else:
        tokenizer = open_tokenizer(name)
        model = from_pretrained(name)
    if model.config.vocab_size != tokenizer["vocab_size"]:
        raise SystemExit(f"{name}: o modelo e o vocabulário não têm o mesmo número de tokens.")
    return model, tokenizer


def find_checkpoint(out_dir):
    """O best.pt da pasta dada ou, sem pasta, o do treino mais recente em out/."""
    if out_dir:
        return Path(out_dir, "best.pt")
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("Não há treino em out/. Rode `python train.py config/tiny.py` primeiro.")
    print(f"[modelo: {found[-1]}]", file=sys.stderr)
    return found[-1]


def sampling_dtype(model, device, name="auto"):
    """A precisão para gerar: a que o chip faz melhor, ou a do nome dado."""
    if name == "auto" and device.type == "cpu" and model.num_params() < 25e6:
        return torch.float32  # um modelo pequeno: há pouca leitura da memória a poupar
    return choose_dtype(device, name)


def write(model, encoding, options, device):
    """Continua options.start, options.num_samples vezes; os textos vão para stdout."""
    start = normalize(options.start).removeprefix(END_OF_TEXT)
    # no treino, o <|endoftext|> fecha um documento; logo depois dele começa outro
    ids = [encoding.eot_token, *encoding.encode_ordinary(start)]
    idx = torch.tensor([ids], device=device).repeat(options.num_samples, 1)  # (B, T)
    columns = model.generate(
        idx, options.max_new_tokens, options.temperature, options.top_k, encoding.eot_token,
        torch.Generator(device).manual_seed(options.seed))
    # uma letra como "ã" tem dois bytes, e pode estar cortada entre dois tokens: o decodificador
    # guarda o começo dela até que o resto chegue
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(len(idx))]
    texts, count, began = [start] * len(idx), 0, time.perf_counter()
    print(start if len(idx) == 1 else "", end="", flush=True)  # um só aparece enquanto se escreve
    for column in columns:  # (B,): um token de cada texto; os que já acabaram repetem o do fim
        for i, token in enumerate(column.tolist()):
            if token != encoding.eot_token:
                piece = decoders[i].decode(encoding.decode_single_token_bytes(token))
                texts[i], count = texts[i] + piece, count + 1
                print(piece if len(idx) == 1 else "", end="", flush=True)
    print("" if len(idx) == 1 else "\n---------------\n".join(texts))
    speed = count / (time.perf_counter() - began)
    print(f"[{count} tokens, {speed:.0f} tokens/s]", file=sys.stderr)


def split_words(sentence, tokenizer):
    """Separa uma frase em [(palavra, tokens dela), ...] e dá o índice da escolhida: a que vem entre
    sublinhados (_ela_) ou a última. Começa pelo <|endoftext|>, como os textos do treino."""
    before, *rest = regex.split(r"( ?)(?<!\w)_([^_]+)_(?!\w)", normalize(sentence))
    marked, after = ["".join(rest[:2])] if rest else [], "".join(rest[2:3])  # [" ", "ela", resto]
    if len(rest) > 3 or regex.search(r"(?<!\w)_|_(?!\w)", before + after):
        raise SystemExit("Marque uma palavra só, entre dois sublinhados, como _ela_.")
    # as fusões do BPE não atravessam palavras: cada uma por si dá os mesmos tokens que a frase
    first, last = (regex.findall(tokenizer["pattern"], part) for part in (before, after))
    pieces, encoding = first + marked + last, build_encoding(tokenizer)
    choices = [i for i, piece in enumerate(pieces, 1) if regex.search(r"[\p{L}\p{N}]", piece)]
    if not marked and not choices:
        raise SystemExit("--attention pede uma frase, com ao menos uma palavra.")
    words = [(regex.sub(r"\p{C}", "␣", piece.strip()) or "␣", encoding.encode_ordinary(piece))
             for piece in pieces]
    return [("(começo)", [encoding.eot_token]), *words], len(first) + 1 if marked else choices[-1]


@torch.inference_mode()
def word_attention(model, words):
    """Quanto cada palavra (linha) olha para cada uma (coluna): (L, nh, W, W), de W palavras.

    De uma palavra de vários tokens, somam-se as parcelas que eles recebem e tira-se a média das que
    eles dão (Clark et al. 2019, "What Does BERT Look At?", seção 4): cada linha soma 1.
    """
    ids = torch.tensor([[token for _, tokens in words for token in tokens]])  # (1, T)
    if ids.size(1) > model.config.block_size:
        raise SystemExit(f"{ids.size(1)} tokens, e não cabem mais que {model.config.block_size}.")
    weights = []  # de cada camada, (1, nh, T, T)
    model(ids.to(model.wte.weight.device), weights=weights)
    owner = [i for i, (_, tokens) in enumerate(words) for _ in tokens]  # a palavra de cada token
    member = F.one_hot(torch.tensor(owner)).float()  # (T, W)
    # (W, T) @ (L, nh, T, T) @ (T, W) -> (L, nh, W, W)
    return (member / member.sum(0)).T @ torch.cat(weights).float().cpu() @ member


def show_attention(options, model, tokenizer):
    """Mostra para que palavras a palavra escolhida olha, e grava a figura, se foi pedida."""
    words, asked = split_words(options.attention, tokenizer)
    shares = {f"camada {layer}, cabeça {head}": share  # (W, W)
              for layer, heads in enumerate(word_attention(model, words), 1)
              for head, share in enumerate(heads, 1)
              if options.layer in (None, layer) and options.head in (None, head)}
    if not shares:
        raise SystemExit(f"--layer: 1 a {model.config.n_layer}; --head: 1 a {model.config.n_head}.")
    rows = torch.stack([share[asked] for share in shares.values()])  # (cabeças, W)
    mean, names = rows.mean(0), list(shares)
    print(f"Para onde olha «{words[asked][0]}»: "
          + (names[0] if len(names) == 1 else f"a média de {len(names)} cabeças") + "\n")
    width = max(len(word) for word, _ in words[: asked + 1])
    for i in mean[: asked + 1].argsort(descending=True).tolist():
        best = rows[:, i].argmax().item()
        bar = "█" * round(30 * (mean[i] / mean.max()).item())
        note = f" a que mais olha: {names[best]}, {rows[best, i]:.0%}" if len(names) > 1 else ""
        print(f"{words[i][0]:>{width}} {mean[i]:6.1%} {bar:<30}{note}".rstrip())
    print("\nÉ para onde o modelo olha, e não o certo. Se nada lhe serve, ele olha para o começo.")
    if options.image:
        with whole_file(Path(options.image)) as file:
            file.write(draw_attention(shares, [html.escape(word) for word, _ in words]).encode())


def draw_attention(shares, words, cell=14, columns=3):
    """Um SVG com um mapa de calor por cabeça; shares: {nome: (W, W)}. A linha é a palavra que olha,
    e a coluna, a olhada: quanto mais escuro, mais."""
    side = len(words) * cell  # em pixels
    step, parts = side + 7 * max(map(len, words)) + 12, []
    for k, (name, share) in enumerate(shares.items()):
        left, top = (k % columns + 1) * step - side, k // columns * step + 24
        parts.append(f'<g transform="translate({left} {top})" text-anchor="end">'
                     f'<text y="-5" text-anchor="start">{name}</text>'
                     f'<path d="M0 0h{side}v{side}h-{side}z" fill="none" stroke="#999"/>')
        for i, word in enumerate(words):
            middle = (i + 0.8) * cell
            parts.append(f'<text x="-5" y="{middle}">{word}</text><text transform="'
                         f'translate({middle} {side + 5}) rotate(-90)">{word}</text>')
            parts += [f'<path d="M{j * cell} {i * cell}h{cell}v{cell}h-{cell}z" fill="#1b4f9c" '
                      f'fill-opacity="{value:.2f}"/>'
                      for j, value in enumerate(share[i].tolist()) if value >= 0.01]
        parts.append("</g>")
    width, height = min(columns, len(shares)) * step + 9, -(-len(shares) // columns) * step + 24
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="11">',
        '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def export(folder, model, tokenizer):
    """Grava o modelo e o tokenizador numa pasta nova, que a biblioteca transformers abre."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from tokenizers.processors import TemplateProcessing

    folder, special = Path(folder), tokenizer["special_tokens"]
    folder.mkdir(parents=True)
    to_pretrained(model, folder, special[END_OF_TEXT])
    extra = make_tokenizer("", {token.encode(): number for token, number in special.items()}, {})
    (folder / "vocab.tiktoken").write_text(tokenizer["vocab"] + extra["vocab"], encoding="utf-8")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # senão, leria a cópia de outro arquivo do mesmo nome
    fast = TikTokenConverter(str(folder / "vocab.tiktoken"), tokenizer["pattern"],
                             extra_special_tokens=special).converted()
    fast.post_processor = TemplateProcessing(  # um texto começa depois do fim de outro
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, special[END_OF_TEXT])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False, model_max_length=model.config.block_size)
    fast.save_pretrained(folder)
    print(f"Pronto: abra com AutoModelForCausalLM.from_pretrained({str(folder)!r}).")


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Escreve com um modelo.", allow_abbrev=False)
    add, either = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--start", default="", help="o começo do texto, ou FILE:arquivo.txt")
    add("--num_samples", type=int, default=1, help="quantos textos escrever [1]")
    add("--max_new_tokens", type=int, default=500, help="quantos tokens, no máximo, cada um [500]")
    add("--temperature", type=float, default=0.8, help="quanto arriscar: 0 é nada [0.8]")
    add("--top_k", type=int, default=20, help="sortear só entre os K mais prováveis; 0: todos [20]")
    add("--seed", type=int, default=1337, help="a mesma semente dá o mesmo texto [1337]")
    add("--out_dir", help="a pasta do treino; sem isto, o mais recente em out/")
    add("--init_from", help="em vez dele, um .pt, ou do Hugging Face: gpt2, DONO/NOME, uma pasta")
    either("--attention", help="para onde olha, nesta frase, a palavra entre sublinhados (_ela_)")
    add("--layer", type=int, help="com --attention: só esta camada, de 1 em diante")
    add("--head", type=int, help="com --attention: só esta cabeça, de 1 em diante")
    add("--image", help="com --attention: um mapa de calor por cabeça, neste arquivo .svg")
    either("--export", help="só grava o modelo, nesta pasta nova, no formato do Hugging Face")
    add("--device", default="auto", help="auto, cuda, mps ou cpu [auto]")
    add("--dtype", default="auto", help="auto, float32, bfloat16 ou float16 [auto]")
    options = parse_arguments(parser, arguments)
    for name, least, most in (("num_samples", 1, 1000), ("max_new_tokens", 1, 2**32),
                              ("temperature", 0, 1e6), ("top_k", 0, 2**32), ("seed", 0, 2**32)):
        if not least <= (value := getattr(options, name)) < most:
            parser.error(f"--{name} {value} não serve: vai de {least} até menos de {most}")
    if options.attention is None and (options.layer or options.head or options.image):
        parser.error("--layer, --head e --image só valem com --attention")
    if options.image and not options.image.endswith(".svg"):
        parser.error(f"--image {options.image!r} não serve: a figura é um arquivo .svg")
    if options.start.startswith("FILE:"):
        options.start = Path(options.start[5:]).read_text(encoding="utf-8-sig", errors="replace")

    device = choose_device(options.device)
    model, tokenizer = load_model(options.init_from or find_checkpoint(options.out_dir))
    if options.export:
        return export(options.export, model, tokenizer)
    model = model.to(device, sampling_dtype(model, device, options.dtype))
    if options.attention is not None:
        return show_attention(options, model, tokenizer)
    write(model, build_encoding(tokenizer), options, device)


if __name__ == "__main__":
    run(main)
