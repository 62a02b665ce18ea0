"""Pretraining recipes and the evaluation of what they train. They need scikit-learn, matplotlib, tqdm and torchvision.

simclr      the training loop, with checkpoints
data        the image sets and their two augmented views
encoders    the networks
evaluation  nearest neighbours and linear probes on frozen features
baseline    NT-Xent as plain PyTorch code has it, to compare with
memory      peak memory of a function
contention  whether other work had the cores
files       files that are there whole or not at all
experiment  one whole comparison, from data to report
report      its table, figures and numbers
processes   the same training over several processes
pretrain    the command line over it
"""
