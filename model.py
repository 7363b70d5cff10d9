"""A receita do GPT-2: o modelo inteiro, de números de tokens ao palpite do próximo token.

É o passo 4 do *LLM do Zero*. Um modelo de linguagem faz uma só coisa: lê uma sequência de tokens e
dá, para cada posição, uma nota a cada token do vocabulário como candidato a ser o próximo. Tudo o
mais (conversar, contar histórias) nasce de repetir esse palpite. O caminho de um texto por dentro:

    números dos tokens ─► embeddings ─► bloco 1 ─► ... ─► bloco L ─► notas do próximo token
                                           │
              cada bloco: atenção (os tokens conversam) e MLP (cada token pensa sozinho)

As letras nos comentários, em que (B, T, C) é um tensor de três eixos, desses tamanhos:

    B   batch: quantas sequências andam juntas
    T   tempo: quantos tokens tem cada sequência, no máximo block_size
    C   canais: o tamanho do vetor que representa um token (n_embd)
    nh  quantas cabeças de atenção (n_head)
    hs  o tamanho de cada cabeça, C / nh (head size)
    V   o tamanho do vocabulário (vocab_size)

Fontes: Vaswani et al. 2017, "Attention Is All You Need" (o Transformer); Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners" (o GPT-2, seção 2.3).

Este arquivo não é para rodar: train.py treina o modelo e sample.py escreve com ele.
"""

import json
import math
import mmap
import os
import timeit
import zipfile
from dataclasses import dataclass

# Dois ajustes para o Linux, que só valem se feitos antes de carregar o torch. Memória em páginas
# grandes: os tensores que nascem e morrem a cada passo custam menos.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Um núcleo que espera por outro gira em falso, e só larga o processador depois de tantas voltas. O
# padrão, 300 mil, torna tudo dez vezes mais lento se outros programas ocupam os núcleos.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------------
# A receita


@dataclass
class GPTConfig:
    """As medidas de um GPT-2; os valores abaixo são os do menor modelo publicado (124M)."""

    block_size: int = 1024  # quantos tokens o modelo enxerga de uma vez
    vocab_size: int = 50257  # quantos tokens existem
    n_layer: int = 12  # quantos blocos, um depois do outro
    n_head: int = 12  # quantas cabeças de atenção em cada bloco
    n_embd: int = 768  # o tamanho do vetor de cada token
    dropout: float = 0.0  # fração dos valores apagada ao acaso no treino, contra a memorização
    bias: bool = True  # somar um viés em cada Linear e LayerNorm, como faz o GPT-2


def attention(q, k, v):
    """A atenção escrita por extenso: softmax(q·kᵀ / √hs)·v (Vaswani et al. 2017, seção 3.2.1).

    q (a consulta: o que cada token procura), k (a chave: o que cada um oferece) e v (o valor: o que
    entrega a quem o procura): (B, nh, T, hs). Devolve o resultado (B, nh, T, hs) e os pesos
    (B, nh, T, T): quanto cada token olha para os anteriores e para si mesmo; cada linha soma 1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, T): afinidades
    past = k.size(2) - q.size(2)  # com o KVCache, abaixo, k tem também os já lidos
    future = torch.ones_like(scores, dtype=torch.bool).triu(past + 1)  # o que vem depois de cada q
    weights = scores.masked_fill(future, -math.inf).softmax(-1)  # exp(-inf) = 0: ninguém o vê
    return weights @ v, weights  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs)


class KVCache:
    """As chaves e os valores já calculados de uma camada, para não recalculá-los a cada token.

    Um token novo só precisa da sua própria consulta (q): as chaves e os valores dos anteriores
    não mudam, porque nenhum token vê o futuro.
    """

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0  # quantos tokens já estão guardados

    def append(self, kv):
        """Guarda k e v dos tokens novos, juntos (2, B, nh, T, hs); devolve os de todos."""
        if self.length == 0:  # o espaço todo é reservado de uma vez: crescer aos poucos copiaria
            self.kv = kv.new_empty(*kv.shape[:3], self.block_size, kv.size(4))
        old, self.length = self.length, self.length + kv.size(3)
        self.kv[:, :, :, old : self.length] = kv
        return self.kv[:, :, :, : self.length]


class CausalSelfAttention(nn.Module):
    """A atenção com várias cabeças: cada token recolhe informação dos anteriores."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        # consulta, chave e valor das nh cabeças saem de uma única multiplicação
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, weights=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # cada cabeça com a sua fatia: (3, B, nh, T, hs)
        q, k, v = qkv if cache is None else (qkv[0], *cache.append(qkv[1:]))
        # q, k e v: (B, nh, T, hs); com o cache, k e v têm também os tokens já lidos
        if weights is not None:
            y, layer_weights = attention(q, k, v)
            weights.append(layer_weights)
        elif not self.training:  # a mesma conta, sem montar a matriz (T, T) inteira na memória
            # um token só, o mais novo, pode ver todos: não há futuro a esconder
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:
            if x.device.type == "cpu":  # na CPU, o gradiente da atenção em bfloat16 é lento
                q, k, v = q.float(), k.float(), v.float()
            with torch.autocast("cpu", enabled=False):  # (para que fique em float32)
                y = F.scaled_dot_product_attention(q, k, v, None, self.dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # as cabeças lado a lado: -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Duas camadas lineares com uma curva (a GELU) no meio: cada token trabalha o que recolheu."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # GELU na forma com tanh (Hendrycks e Gimpel 2016), a que o GPT-2 usou
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Um bloco: a atenção e o MLP, cada um somado ao caminho principal (a conexão residual)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, weights=None):
        # a LayerNorm (Ba et al. 2016) põe os C números de cada token na mesma escala (média 0,
        # desvio 1); vem antes de cada parte, para deixar livre o caminho principal
        x = x + self.attn(self.ln_1(x), cache, weights)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


def embedding(rows, size):
    """Uma tabela com um vetor por linha, ainda sem valores: init_weights os sorteia."""
    return nn.Embedding.from_pretrained(torch.empty(rows, size), freeze=False)


class GPT(nn.Module):
    """O GPT-2 completo. Os nomes das partes são os do modelo publicado (wte, wpe, h, ln_f)."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise SystemExit(
                f"n_embd = {config.n_embd} não é divisível por n_head = {config.n_head}: "
                "cada cabeça leva uma fatia igual do vetor. Mude um dos dois."
            )
        self.config = config
        self.wte = embedding(config.vocab_size, config.n_embd)  # o vetor de cada token
        self.wpe = embedding(config.block_size, config.n_embd)  # o vetor de cada posição
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        if not self.wte.weight.is_meta:  # (no dispositivo "meta" só há formas, e nada a sortear)
            self.init_weights()

    def init_weights(self):
        """Pesos iniciais do GPT-2: matrizes de desvio 0,02; vieses em 0, LayerNorm em 1."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # 2·n_layer parcelas se somam no caminho principal: cada uma entra menor, para
                # que a soma não cresça com a profundidade (Radford et al. 2019, seção 2.3)
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer if residual else 1))

    def num_params(self):
        """Quantos números o treino ajusta."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None, weights=None):
        """Dá as notas (logits) do próximo token e, se houver targets, a loss.

        idx: (B, T) números de tokens. targets: (B, T), o token que vem depois de cada um.
        cache: lista de n_layer KVCache, já com os tokens anteriores a idx; a primeira passada
        leva o texto todo, e cada uma das seguintes um token só.
        weights: uma lista vazia, que recebe os pesos de atenção (B, nh, T, T) de cada camada.

        Com targets devolve logits (B, T, V) e a loss: a entropia cruzada média, em nats por
        token (-ln da probabilidade dada ao token certo).
        Sem targets devolve logits (B, 1, V), só os da última posição, e None.
        """
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens não cabem em block_size = {self.config.block_size}")
        # o que o token é, mais onde ele está: (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(self.wte(idx) + self.wpe.weight[start:end])
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None, weights)
        x = self.ln_f(x)
        if targets is None:
            x = x[:, -1:]  # para continuar o texto basta a última posição: (B, 1, C)
        # a mesma tabela que leu os tokens dá as notas: (B, T, C) @ (C, V) -> (B, T, V)
        logits = F.linear(x, self.wte.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, stop_token=None,
                 generator=None, use_cache=True):
        """Continua os textos de idx (B, T), um token por vez: um gerador de tensores (B,).

        temperature: abaixo de 1 o modelo arrisca menos, acima arrisca mais; 0 toma sempre o token
        mais provável. top_k: sorteia só entre os k mais prováveis; 0 não limita.
        stop_token: o token que encerra um texto; um texto encerrado só o repete, e a geração
        termina quando todos se encerram.
        generator: o torch.Generator dos sorteios. use_cache=False refaz todas as contas a cada
        token: mais lento e com o mesmo resultado, serve para conferir o cache.
        """
        block_size = self.config.block_size
        idx = idx[:, -block_size:]
        cache = []
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)  # (B,)
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size:
                # As posições do GPT-2 são aprendidas e não deslizam: esquece-se a metade mais
                # velha, e o resto é relido desde a posição 0.
                idx = idx[:, idx.size(1) // 2 :]
                cache = []
            if cache:
                logits, _ = self(idx[:, -1:], cache=cache)
            else:
                cache = [KVCache(block_size) for _ in self.h] if use_cache else []
                logits, _ = self(idx, cache=cache)
            token = sample_token(logits[:, -1], temperature, top_k, generator)  # (B, V) -> (B,)
            if stop_token is not None:
                token[done] = stop_token
                done |= token == stop_token
                if done.all():
                    return
            yield token
            idx = torch.cat((idx, token[:, None]), dim=1)  # (B, T) -> (B, T + 1)


def sample_token(logits, temperature=1.0, top_k=0, generator=None):
    """Escolhe um token por linha: notas (B, V) -> números (B,); argumentos como em generate."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:  # as notas dos k mais prováveis, e os números deles: (B, k)
        logits, tokens = logits.topk(min(top_k, logits.size(-1)))
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # a maior vira 0: não estoura
    choice = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)
    return (tokens.gather(1, choice) if top_k else choice)[:, 0]


# ------------------------------------------------------------------------------------------------
# A máquina: onde calcular e com que precisão


def choose_device(name="auto"):
    """Escolhe onde calcular: 'auto' procura cuda, depois mps (Mac), depois cpu.

    Devolve um torch.device. Um nome que não existe ou não funciona aqui encerra o programa.
    """
    candidates = ["cuda", "mps", "cpu"] if name == "auto" else [name]
    for candidate in candidates:
        try:
            device = torch.device(candidate)
            # só vale se um cálculo pequeno funciona: as versões atuais do PyTorch já não
            # trazem o código de placas antigas, e isso só se descobre ao usá-las
            (torch.ones(1, device=device) + 1).item()
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            if candidate == "cuda" and name == "auto" and torch.cuda.is_available():
                print(f"A placa de vídeo não pôde ser usada ({reason}); sigo sem ela.")
    raise SystemExit(f"device = {name!r} não funciona aqui ({reason}). Tente --device=cpu.")


def choose_dtype(device, name="auto", native_bf16=None):
    """Escolhe a precisão das contas: 'auto', 'float32', 'bfloat16' ou 'float16'.

    native_bf16: se o chip ganha tempo com bfloat16; None pergunta ao próprio chip.
    Devolve um torch.dtype. Um nome desconhecido encerra o programa com uma mensagem.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in names:
            raise SystemExit(f"dtype = {name!r} não existe. Use auto, {', '.join(names)}.")
        return names[name]
    if native_bf16 is None:
        native_bf16 = has_native_bf16(device)
    if native_bf16:
        return torch.bfloat16  # metade dos bytes, e o mesmo alcance do float32
    # placas NVIDIA mais antigas aceleram float16; no resto, float32 é o mais rápido e o mais exato
    return torch.float16 if device.type == "cuda" else torch.float32


def has_native_bf16(device):
    """Diz se o chip ganha tempo com bfloat16 (emulado, ele seria mais lento)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    times = []  # há processadores que têm as instruções e não ganham com elas: uma corrida decide
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        times.append(min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=10)))
    return times[0] > 1.5 * times[1]


# ------------------------------------------------------------------------------------------------
# O checkpoint: o modelo guardado em disco


def read_checkpoint(path, *needed):
    """Lê um checkpoint .pt e devolve o dicionário que train.py guardou, com os tensores na CPU.

    Um arquivo .pt é um zip: a soma de verificação (CRC) de cada parte é conferida antes. Só entram
    tensores e tipos simples (weights_only=True): um arquivo alheio não consegue executar nada.
    Um arquivo ausente, danificado ou sem as partes necessárias (o modelo e o que mais se pede em
    needed) encerra o programa com uma mensagem.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "model_config", *needed):
            if key not in checkpoint:
                raise ValueError(f"falta {key}")
        return checkpoint
    except FileNotFoundError:
        raise SystemExit(f"Não achei {path}. Treine primeiro: python train.py config/tiny.py "
                         f"--out_dir={os.path.dirname(path)}")
    except Exception as error:  # um arquivo estragado pode falhar em qualquer ponto da leitura
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(f"{path} está danificado ou não é um checkpoint deste projeto ({reason}).")


def load_weights(model, weights, path):
    """Põe no modelo os pesos de um checkpoint (nome -> tensor), depois de conferir um por um.

    path só serve às mensagens. Se um tensor falta, sobra, tem outro formato ou contém infinito ou
    NaN, o programa termina e diz o nome dele.
    """
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            problem = "falta"
        elif name not in expected:
            problem = "não pertence a este modelo"
        elif weights[name].shape != expected[name].shape:
            found, needed = tuple(weights[name].shape), tuple(expected[name].shape)
            problem = f"tem o formato {found}, e não {needed}"
        elif not weights[name].isfinite().all():
            problem = "tem valores que não são números"
        else:
            continue
        raise SystemExit(f"{path} não serve: {name} {problem}.")
    model.load_state_dict(weights, assign=True)


# ------------------------------------------------------------------------------------------------
# O formato do Hugging Face: os pesos publicados entram, os nossos saem

# O GPT-2 publicado guarda estas quatro matrizes como (entrada, saída), o jeito da sua Conv1D; a
# nn.Linear guarda (saída, entrada). O resto tem os mesmos nomes e formatos dos nossos.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "U8": torch.uint8, "BOOL": torch.bool}
# o que, em config.json, faria outro modelo que não este, e os valores que fazem este
SAME_RECIPE = {
    "model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "add_cross_attention": [False],
    "scale_attn_by_inverse_layer_idx": [False], "tie_word_embeddings": [True],
    "n_inner": [None]}


def read_safetensors(path):
    """Lê um .safetensors (nome -> tensor), mapeado na memória; nada se usa antes de conferido.

    O formato: 8 bytes com o tamanho do cabeçalho; o cabeçalho, em JSON, que diz de cada tensor o
    tipo, o formato e onde começa e acaba; e os tensores, um depois do outro.
    """
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors, expected = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in SAFETENSORS or begin != expected or not all(size >= 0 for size in shape):
            raise ValueError(f"{name}: {entry}")
        if end - begin != math.prod(shape) * SAFETENSORS[dtype].itemsize or start + end > len(data):
            raise ValueError(f"{name}: {entry}")
        tensors[name] = torch.frombuffer(
            data, dtype=SAFETENSORS[dtype], count=math.prod(shape), offset=start + begin
        ).view(shape)
        expected = end
    if start + expected != len(data):
        raise ValueError(f"{len(data)} bytes, e não {start + expected}")
    return tensors


def write_safetensors(file, tensors):
    """Escreve os tensores (float32) num arquivo aberto, no formato de read_safetensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors.values():
        file.write(tensor.contiguous().numpy().data)


def read_pretrained(folder):
    """Lê um GPT-2 no formato do Hugging Face: um dicionário como o de read_checkpoint.

    Outra arquitetura ou um arquivo danificado encerra o programa com uma mensagem.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, values in SAME_RECIPE.items():
            if config.get(key, values[0]) not in values:
                raise SystemExit(f"{path} não é de um GPT-2 como o deste projeto: {key} = "
                                 f"{config[key]!r}.")
        shape = {name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        shape["block_size"] = config["n_positions"]
        path = folder / "model.safetensors"
        if path.exists():
            found = read_safetensors(path)
        else:
            path = folder / "pytorch_model.bin"
            found = torch.load(path, map_location="cpu", weights_only=True)
        weights = {}
        for name, tensor in found.items():
            name = name.removeprefix("transformer.")
            # a máscara da atenção não é peso; lm_head é a própria wte
            if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "lm_head.weight":
                weights[name] = (tensor.T if name.endswith(TRANSPOSED) else tensor).float()
        return {"model": weights, "model_config": shape}
    except Exception as error:  # um arquivo estragado pode falhar em qualquer ponto da leitura
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise SystemExit(f"{path} falta, está danificado ou não é de um GPT-2 ({reason}).")


def to_pretrained(model):
    """O contrário de read_pretrained: devolve o conteúdo de config.json e os tensores."""
    config, weights = model.config, {}
    for name, tensor in model.state_dict().items():
        weights[f"transformer.{name}"] = tensor.T if name.endswith(TRANSPOSED) else tensor
        bias = name.replace("weight", "bias")
        if not config.bias and "wte" not in name and "wpe" not in name:  # sem viés é viés zero
            weights[f"transformer.{bias}"] = torch.zeros(tensor.size(0))
    recipe = {key: values[0] for key, values in SAME_RECIPE.items()}
    return recipe | {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_layer": config.n_layer, "n_head": config.n_head, "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "torch_dtype": "float32",
    }, weights
