# O GPT-2 de 124 milhões de parâmetros, numa placa de 24 GB ou mais, ou em várias:
#     torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py --dataset=NOME
# Pede gigabytes de texto, preparados com --tokenizer gpt2 ou com --vocab_size 50257.

# o modelo: o publicado em 2019
n_layer = 12  # quantos blocos
n_head = 12  # cabeças de 64 canais
n_embd = 768  # o vetor de cada token
block_size = 1024  # a janela

# um passo: 491.520 tokens, perto do meio milhão do GPT-3 deste tamanho
batch_size = 12  # o que cabe em 24 GB
gradient_accumulation_steps = 40  # divisível por 8 placas: cada uma faz 5
max_iters = 20000  # 10 bilhões de tokens, umas 80 vezes os parâmetros

# o otimizador: o do GPT-3, que quase todos copiam
optimizer = "adamw"  # o de referência, para comparar com o que se publica
learning_rate = 6e-4  # a do GPT-3 deste tamanho
min_lr = 6e-5  # um décimo dela
warmup_iters = 700  # uma partida lenta
weight_decay = 0.1  # o usual

# acompanhar
eval_interval = 500  # de quantos em quantos passos avaliar
save_interval = 500  # se a máquina cair, perdem-se no máximo estes passos
