# Um modelo que aprende a contar histórias em cinco a dez minutos, com dois núcleos.
# Os valores foram escolhidos medindo os bits por byte na validação de data/contos, no mesmo tempo.
# O vocabulário, também: com 2.048 tokens, em vez de 4.096, o passo é mais rápido, mas ensina menos.

# o modelo: 2,6 milhões de parâmetros
n_layer = 4  # quatro blocos bastam para a gramática; mais blocos, menos passos no mesmo tempo
n_embd = 192  # com 128 o passo é mais rápido, com 256 ensina mais; no mesmo tempo, 192 ganhou
n_head = 6  # cabeças de 32 canais
block_size = 128  # quase uma história inteira, que tem em média 153 tokens; com 256, ficou atrás

# um passo
batch_size = 16  # 2.048 tokens por passo: com 8, e o dobro de passos, ficou atrás
gradient_accumulation_steps = 1  # tudo cabe na memória de uma vez
max_iters = 1600  # nove voltas no texto; muito mais, e o modelo mais decora que aprende

# o otimizador
optimizer = "muon"  # no mesmo tempo, chega mais longe que o AdamW
muon_learning_rate = 0.02  # a dos autores do Muon; 0.03 foi pior
learning_rate = 1e-2  # a dos embeddings e vieses, com AdamW; 3e-3, 6e-3 e 2e-2 foram piores
min_lr = 0.0  # as taxas descem até zero: o fim do treino é o acabamento
warmup_iters = 50  # poucos passos para partir com cuidado
weight_decay = 0.5  # alto, porque o texto é pouco: com 0.1 o modelo decora mais

# acompanhar
eval_interval = 200  # um texto novo a cada minuto, mais ou menos
eval_iters = 40  # o bastante para toda a validação
save_interval = 200  # se a máquina cair, perdem-se no máximo estes passos
