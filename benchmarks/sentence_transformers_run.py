"""Train a small transformer on text pairs twice through sentence-transformers' trainer: with its loss, and with ours.

    python -m benchmarks.sentence_transformers_run [--steps 50] [--batch-size 64]

The model is built from a configuration; both runs begin with the same weights and see the same batches. The pairs
are the summary and the body of docstrings of Python's standard library. Prints the losses of both, the largest
difference, and time and memory of the loss. Needs sentence-transformers, datasets and accelerate.
"""

import argparse
import inspect
import pkgutil
import sys
import tempfile
import time

import torch

import ssl_kernels
from ssl_kernels.recipes.memory import peak_memory


def text_pairs(count):
    """(summary, body) of docstrings, the first `count` in the order of their modules' names."""
    pairs = []
    for name in sorted(
        module.name for module in pkgutil.iter_modules() if module.name in sys.stdlib_module_names
    ):
        if name.startswith("_") or name in (
            "antigravity",
            "this",
            "idlelib",
            "turtledemo",
            "test",
            "tkinter",
            "turtle",
        ):
            continue
        try:
            module = __import__(name)
        except Exception:  # not on this system
            continue
        for _, member in sorted(vars(module).items(), key=lambda item: item[0]):
            if not (inspect.isclass(member) or inspect.isfunction(member)):
                continue
            summary, _, body = (inspect.getdoc(member) or "").partition("\n\n")
            if len(summary.split()) > 3 and len(body.split()) > 8:
                pairs.append((summary.replace("\n", " "), body.replace("\n", " ")))
        pairs = list(dict.fromkeys(pairs))
        if len(pairs) >= count:
            break
    return pairs[:count]


def make_model(texts, folder):
    """A BERT of two layers with a vocabulary of the words of `texts`, under torch's seed."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({word for text in texts for word in text.lower().split() if word.isalpha()})
    letters = sorted({letter for text in texts for letter in text.lower() if not letter.isspace()})
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{each}" for each in letters),
        *words,
    ]
    path = f"{folder}/vocabulary.txt"
    with open(path, "w") as file:
        file.write("\n".join(dict.fromkeys(tokens)))
    tokenizer = BertTokenizerFast(vocab_file=path)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = models.Transformer(folder, max_seq_length=64)
    return SentenceTransformer(modules=[transformer, models.Pooling(128)], device="cpu")


def run(make_loss, pairs, steps, batch_size, seed=0):
    """Loss of each step, and seconds of training."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import TrainerCallback

    losses = []

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        model = make_model([text for pair in pairs for text in pair], folder)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        data = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=data, loss=make_loss(model), callbacks=[Record()]
        )
        start = time.perf_counter()
        trainer.train()
        return losses, time.perf_counter() - start


def loss_classes():
    """(sentence-transformers' loss, the same over ours)."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    class Ours(MultipleNegativesRankingLoss):
        def compute_loss_from_embeddings(self, embeddings, labels):
            return ssl_kernels.multiple_negatives_ranking_loss(
                *embeddings,
                scale=self.scale,
                directions=self.directions,
                partition_mode=self.partition_mode,
                hardness_mode=self.hardness_mode,
                hardness_strength=self.hardness_strength,
            )

    return MultipleNegativesRankingLoss, Ours


def compare(steps, batch_size):
    """[(losses, seconds) of theirs, of ours]."""
    pairs = text_pairs(4 * batch_size)
    return [run(loss, pairs, steps, batch_size) for loss in loss_classes()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50, help="of each training (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per step (%(default)s)")
    arguments = parser.parse_args()
    (theirs, their_time), (ours, our_time) = compare(arguments.steps, arguments.batch_size)
    difference = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    print(
        f"{len(theirs)} steps, loss {theirs[0]:.4f} to {theirs[-1]:.4f} and {ours[0]:.4f} to {ours[-1]:.4f}"
    )
    print(f"largest difference {difference:.1e}; {their_time:.1f} s with theirs, {our_time:.1f} s with ours")
    embeddings = [torch.randn(2048, 384, requires_grad=True) for _ in range(2)]
    for loss in loss_classes():
        made = loss(torch.nn.Module())
        used = peak_memory(lambda made=made: made.compute_loss_from_embeddings(embeddings, None).backward())
        print(f"loss of 2048 pairs of width 384, {loss.__name__}: {used / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
