# Para uma placa de 8 GB: um modelo dez vezes maior que o tiny, para alguns megabytes de texto seu.
# Prepare o texto com `python prepare.py --input ... --name NOME` e treine com --dataset=NOME.

# o modelo: 28 milhões de parâmetros, com um vocabulário de 4.096
n_layer = 8  # o dobro do tiny
n_head = 8  # cabeças de 64 canais, como no GPT-2
n_embd = 512  # dois terços do GPT-2 menor
block_size = 512  # uma página de texto

# um passo: 32.768 tokens
batch_size = 16  # o que cabe em 8 GB com folga
gradient_accumulation_steps = 4  # quatro vezes isso por passo: um gradiente menos ruidoso
max_iters = 5000  # 164 milhões de tokens

# o otimizador
optimizer = "muon"  # aprende mais por passo que o AdamW
muon_learning_rate = 0.02  # a dos autores do Muon
learning_rate = 3e-3  # embeddings e vieses: quanto maior o modelo, menor a taxa
min_lr = 0.0  # o fim do treino é o acabamento
warmup_iters = 200  # modelos maiores pedem uma partida mais lenta
weight_decay = 0.1  # o usual; com pouco texto, mais
dropout = 0.1  # para textos pequenos, lidos muitas vezes; com gigabytes, 0.0

# acompanhar
eval_interval = 250  # de quantos em quantos passos avaliar
save_interval = 250  # se a máquina cair, perdem-se no máximo estes passos
