"""A receita do GPT-2 (passo 4 do *LLM do Zero*): de números de tokens ao palpite do próximo.

Um modelo de linguagem faz uma só coisa: lê uma sequência de tokens e dá, para cada posição, uma
nota a cada token do vocabulário como candidato a ser o próximo. Tudo o mais (conversar, contar
histórias) nasce de repetir esse palpite. O caminho de um texto por dentro:

    números dos tokens ─► embeddings ─► bloco 1 ─► ... ─► bloco L ─► notas do próximo token
                                           │
              cada bloco: atenção (os tokens conversam) e MLP (cada token pensa sozinho)

As letras nos comentários, em que (B, T, C) é um tensor de três eixos, desses tamanhos:

    B   batch: quantas sequências andam juntas
    T   tempo: quantos tokens tem cada sequência, no máximo block_size
    C   canais: o tamanho do vetor que representa um token (n_embd)
    nh  quantas cabeças de atenção (n_head)
    hs  o tamanho de cada cabeça, C / nh (head size)
    V   o tamanho do vocabulário (vocab_size), e L, o número de blocos (n_layer)

Fontes: Vaswani et al. 2017, "Attention Is All You Need" (o Transformer); Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners" (o GPT-2, seção 2.3).
"""

import math
import os
import timeit
import zipfile
from dataclasses import dataclass

# Dois ajustes para o Linux, que só valem antes do import do torch: memória em páginas grandes; e a
# thread que espera por outra logo larga o processador, o que conta muito se ele é disputado.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch import nn
from torch.nn import functional as F


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
    ele entrega a quem o procura): (B, nh, T, hs). Devolve o resultado (B, nh, T, hs) e os pesos
    (B, nh, T, T): quanto cada token olha para os anteriores e para si mesmo; cada linha soma 1.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, nh, T, T): afinidades
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)  # o que vem depois de cada token
    weights = scores.masked_fill(future, -math.inf).softmax(-1)  # exp(-inf) = 0: ninguém o vê
    return weights @ v, weights  # (B, nh, T, T) @ (B, nh, T, hs) -> (B, nh, T, hs)


class CausalSelfAttention(nn.Module):
    """A atenção com várias cabeças: cada token recolhe informação dos anteriores."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        # consulta, chave e valor das nh cabeças saem de uma única multiplicação
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, past=0, weights=None):  # são os de GPT.forward
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # cada cabeça com a sua fatia: (3, B, nh, T, hs)
        if x.device.type == "mps":  # lá, a atenção do PyTorch 2.10 e 2.11 erra com fatias
            qkv = qkv.contiguous()  # (github.com/pytorch/pytorch/issues/181133)
        q, k, v = qkv  # (B, nh, T, hs)
        if cache is not None:  # (2, B, nh, block_size, hs): k e v; os `past` primeiros já lidos
            cache[:, :, :, past : past + T] = qkv[1:]
            k, v = cache[:, :, :, : past + T]  # (B, nh, past + T, hs)
        if weights is not None:
            y, layer_weights = attention(q, k, v)
            weights.append(layer_weights)
        elif not self.training:  # a mesma conta, sem montar a matriz (T, T) inteira na memória
            # um token só, o mais novo, pode ver todos: não há futuro a esconder
            y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:
            if x.device.type == "cpu":  # na CPU, o gradiente da atenção em bfloat16 é lento
                q, k, v = q.float(), k.float(), v.float()
            with torch.autocast("cpu", enabled=False):  # (na CPU, para que fique em float32)
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
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

    def forward(self, x, cache=None, past=0, weights=None):
        # a LayerNorm (Ba et al. 2016) põe os C números de cada token na mesma escala (média 0,
        # desvio 1); vem antes de cada parte, para deixar livre o caminho principal
        x = x + self.attn(self.ln_1(x), cache, past, weights)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """O GPT-2 completo. Os nomes das partes são os do modelo publicado (wte, wpe, h, ln_f)."""

    def __init__(self, config, state_dict=None):
        """state_dict: os pesos (nome -> tensor); sem eles, são sorteados."""
        super().__init__()
        if config.n_embd % config.n_head:
            raise SystemExit(f"n_embd = {config.n_embd} não é divisível por n_head = "
                             f"{config.n_head}: cada cabeça leva uma fatia igual do vetor.")
        self.config, C = config, config.n_embd
        with torch.device("meta"):  # só as formas: os valores vêm logo abaixo
            # (from_pretrained não sorteia: um sorteio em meta importa muito mais do torch, 1,4 s)
            wte, wpe = torch.empty(config.vocab_size, C), torch.empty(config.block_size, C)
            self.wte = nn.Embedding.from_pretrained(wte, freeze=False)  # o vetor de cada token
            self.wpe = nn.Embedding.from_pretrained(wpe, freeze=False)  # o vetor de cada posição
            self.drop = nn.Dropout(config.dropout)
            self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(C, bias=config.bias)
        self.load_state_dict(state_dict or self.initial_weights(), assign=True)

    def initial_weights(self):
        """Os pesos iniciais do GPT-2: matrizes de desvio 0,02; vieses em 0, LayerNorm em 1."""
        weights = {}
        for name, p in self.named_parameters():
            if p.dim() == 1:
                weights[name] = torch.full(p.shape, float(name.endswith("weight")))
            else:
                # 2·n_layer parcelas se somam no caminho principal: cada uma entra menor, para
                # que a soma não cresça com a profundidade (Radford et al. 2019, seção 2.3)
                parts = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
                weights[name] = torch.normal(0.0, 0.02 / math.sqrt(parts), p.shape)
        return weights

    def num_params(self):
        """Quantos números o treino ajusta."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx, targets=None, cache=None, past=0, weights=None):
        """Dá as notas (logits) do próximo token e, se houver targets, a loss.

        idx: (B, T) números de tokens. targets: (B, T), o que vem depois de cada um; -100 não conta.
        cache: (n_layer, 2, B, nh, block_size, hs), com k e v dos `past` tokens anteriores a idx; a
        primeira passada leva o texto todo, e cada uma das seguintes um token só.
        weights: uma lista vazia, que recebe os pesos de atenção (B, nh, T, T) de cada camada.

        Com targets devolve logits (B, T, V) e a loss: a entropia cruzada média, em nats por token
        (-ln da probabilidade dada ao certo). Sem eles, logits (B, 1, V), só os do fim, e None.
        """
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens não cabem em block_size = {self.config.block_size}")
        # o que o token é, mais onde ele está: (B, T, C) + (T, C) -> (B, T, C)
        x = self.drop(self.wte(idx) + self.wpe.weight[past:end])
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], past, weights)
        x = self.ln_f(x)
        # a mesma tabela que leu os tokens dá as notas: (B, T, C) @ (C, V) -> (B, T, V)
        if targets is None:  # para continuar o texto basta a última posição
            return F.linear(x[:, -1:], self.wte.weight), None
        logits = F.linear(x, self.wte.weight)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, stop_token=None,
                 generator=None):
        """Continua os textos de idx (B, T), um token por vez: um gerador de tensores (B,).

        temperature: abaixo de 1 o modelo arrisca menos, acima arrisca mais; 0 toma sempre o token
        mais provável. top_k: sorteia só entre os k mais prováveis; 0 não limita.
        stop_token: o token que encerra um texto; um texto encerrado só o repete, e a geração
        termina quando todos se encerram. generator: o torch.Generator dos sorteios.
        """
        c = self.config
        # k e v de cada token não mudam, porque nenhum vê o futuro: guardam-se, em vez de refazê-los
        shape = (c.n_layer, 2, idx.size(0), c.n_head, c.block_size, c.n_embd // c.n_head)
        cache = self.wte.weight.new_empty(shape)
        past, idx = 0, idx[:, -c.block_size :]
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)  # (B,)
        for _ in range(max_new_tokens):
            if idx.size(1) > c.block_size:
                # As posições do GPT-2 são aprendidas e não deslizam: esquece-se a metade mais
                # velha, e o resto é relido desde a posição 0.
                past, idx = 0, idx[:, idx.size(1) // 2 :]
            logits, _ = self(idx[:, past:], cache=cache, past=past)  # só o que ainda não foi lido
            past = idx.size(1)
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
    if temperature < 1e-6:  # dividir por tão pouco daria infinito: fica o mais provável
        return logits.argmax(-1)
    if top_k:  # as notas dos k mais prováveis, e os números deles: (B, k)
        logits, tokens = logits.topk(min(top_k, logits.size(-1)))
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # a maior vira 0: não estoura
    choice = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # (B, 1)
    return (tokens.gather(1, choice) if top_k else choice)[:, 0]


# A máquina (passo 2): onde calcular, e com que precisão
def choose_device(name="auto"):
    """Escolhe onde calcular, um torch.device; 'auto' procura cuda, depois mps (Mac), depois cpu."""
    for candidate in ["cuda", "mps", "cpu"] if name == "auto" else [name]:
        try:
            device = torch.device(candidate)
            # só vale se calcula: o PyTorch já não traz o código das placas antigas
            (torch.ones(1, device=device) + 1).item()
            return device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            if candidate == "cuda" and name == "auto" and torch.cuda.is_available():
                print(f"A placa de vídeo não pôde ser usada ({reason}); sigo sem ela.")
    raise SystemExit(f"device = {name!r} não funciona aqui ({reason}). Tente --device=cpu.")


def choose_dtype(device, name="auto"):
    """Escolhe a precisão das contas, um torch.dtype; 'auto' é a que o chip faz melhor."""
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    if name != "auto":
        raise SystemExit(f"dtype = {name!r} não existe. Use auto, float32, bfloat16 ou float16.")
    if device.type == "cuda":  # as placas NVIDIA mais antigas só aceleram float16
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        # há processadores que têm as instruções e não ganham com elas: uma corrida decide
        matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
        time32, time16 = (min(timeit.repeat(lambda: m @ m, number=1, repeat=10)) for m in matrices)
        if time32 > 1.2 * time16:
            return torch.bfloat16  # metade dos bytes, e o mesmo alcance do float32
    return torch.float32


# O modelo em disco: o nosso checkpoint e, mais abaixo, o formato do Hugging Face
def read_checkpoint(path, *needed):
    """Lê um checkpoint .pt: o dicionário que train.py guardou, com "model" já montado, um GPT.

    Só entram tensores e tipos simples: um arquivo alheio não executa nada. O que está danificado,
    ou sem as partes pedidas em needed, encerra o programa com uma mensagem.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # um .pt é um zip, e cada parte tem a sua soma
            if damaged := archive.testzip():
                raise ValueError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"model", "model_config", "tokenizer", *needed} - checkpoint.keys():
            raise ValueError(f"falta {', '.join(sorted(missing))}")
        if not all(weight.isfinite().all() for weight in checkpoint["model"].values()):
            raise ValueError("há pesos que não são números")
        config = GPTConfig(**checkpoint["model_config"])
        return checkpoint | {"model": GPT(config, checkpoint["model"]).eval()}
    except FileNotFoundError:
        raise SystemExit(f"Não achei {path}. Treine primeiro: python train.py config/tiny.py")
    except Exception as error:  # um arquivo estragado pode falhar em qualquer ponto da leitura
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"{path} está danificado ou não é um checkpoint deste projeto ({reason}).")


# o GPT-2 publicado guarda estas matrizes como (entrada, saída); a nn.Linear, como (saída, entrada)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# campos da configuração em que um valor que não o usual faz outro modelo, que aqui não se abre
RECIPE = ("model_type", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
          "scale_attn_by_inverse_layer_idx", "add_cross_attention", "tie_word_embeddings")


def from_pretrained(name):
    """Abre um GPT-2 do Hugging Face (uma pasta, gpt2, gpt2-medium..., DONO/NOME): um GPT."""
    from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

    try:
        config, usual = AutoConfig.from_pretrained(name), GPT2Config()
        for key in RECIPE:
            if (value := getattr(config, key, None)) != getattr(usual, key):
                raise ValueError(f"não é a receita do GPT-2: {key} = {value!r}")
        theirs, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"faltam pesos: {sorted(report['missing_keys'])}")
        weights = {key: weight.T.contiguous() if key.endswith(TRANSPOSED) else weight
                   for key, weight in theirs.float().transformer.state_dict().items()}
        return GPT(GPTConfig(config.n_positions, config.vocab_size, config.n_layer, config.n_head,
                             config.n_embd), weights).eval()
    except Exception as error:  # sem rede, sem esse nome, arquivo estragado: são muitos os tipos
        raise SystemExit(f"Não consegui abrir {name}: {' '.join(str(error).split())[:300]}")


def to_pretrained(model, folder, end):
    """O contrário: grava o modelo numa pasta que a transformers abre; end: o <|endoftext|>."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    c, ends = model.config, {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size,
                             n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, **ends))
    weights = {name: weight.T if name.endswith(TRANSPOSED) else weight
               for name, weight in model.state_dict().items()}
    theirs.transformer.load_state_dict(weights, strict=False)  # um viés que falta é zero
    theirs.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_k=20, max_length=c.block_size, **ends)
    theirs.save_pretrained(folder)
