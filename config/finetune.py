# Ajuste fino: o GPT-2 publicado, de 124 milhões de parâmetros, aprende os seus textos numa placa de
# 8 GB ou mais. Antes: python prepare.py --input MEUS_TEXTOS --name meus --tokenizer gpt2
# Depois: python train.py config/finetune.py --dataset=meus

init_from = "gpt2"  # ou uma pasta, ou DONO/NOME; o mesmo vai em --tokenizer
n_layer = 12  # o formato do modelo de que se parte
n_head = 12  # o mesmo
n_embd = 768  # o mesmo
block_size = 512  # a janela: pode ser menor que a do modelo (1024), e gasta menos memória

# um passo: 16.384 tokens
batch_size = 4  # o que cabe em 8 GB
gradient_accumulation_steps = 8  # completa o passo sem gastar mais memória
max_iters = 500  # o modelo já sabe muito: poucos passos bastam, e mais fazem decorar

# o otimizador: correções pequenas, para não apagar o que o modelo já sabe
learning_rate = 3e-5  # vinte vezes menor que a de um treino do zero
min_lr = 3e-6  # um décimo dela
warmup_iters = 20  # uma partida suave
dropout = 0.1  # contra decorar um texto pequeno

# acompanhar
eval_interval = 50  # a loss de validação deixa de cair cedo: best.pt guarda o melhor momento
eval_iters = 50  # o bastante para comparar
save_interval = 50  # se a máquina cair, perdem-se no máximo estes passos
