"""Pretraining recipes and the evaluation of what they train. They need scikit-learn, matplotlib, tqdm and torchvision.

methods     what each method is: one short file each, the code to copy
engine      the training loop, with checkpoints
checkpoints, files, logs    what a training writes, whole or not at all
optimizers  LARS beside torch's, and the schedule
ranks       the processes that train together
timing      the time of a loss within a step
collapse    whether embeddings collapse
data, views the image sets, their augmented views and crops
encoders    the networks
presets     epochs, batch sizes and rates for each image set
evaluation  nearest neighbours and linear probes on frozen features
baseline    losses as plain PyTorch code has them, to compare with
memory      peak memory of a function
contention  whether other work had the cores
experiment  one whole comparison, from data to report
report      its table, figures and numbers; drawing the figures
processes   the same training over several processes beside one
trained     a method as a checkpoint holds it
finetuning  training on from an encoder with a part of the labels
pretrain, evaluate, plot    the commands; arguments is what they share
"""
