"""What a training leaves to read: a CSV file and, if asked for, TensorBoard's."""

import contextlib
import csv
import io
import threading

from ssl_kernels.recipes.files import write_whole

COLUMNS = ("step", "epoch", "loss", "learning_rate", "loss_seconds", "step_seconds", "spread", "rank")


def write_csv(path, history, batches):
    """One line per step; spread and rank stand in the last line of their epoch. Written whole from the history, which a
    checkpoint holds: a resumed run leaves the log of an unbroken one.

    Args:
        batches: Steps an epoch.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    columns = (history.losses, history.rates, history.loss_seconds, history.step_seconds)
    for index, values in enumerate(zip(*columns, strict=True)):
        epoch, batch = divmod(index, batches)
        ends = batch == batches - 1 and epoch < len(history.spreads)
        health = (history.spreads[epoch], history.ranks[epoch]) if ends else ("", "")
        writer.writerow((index + 1, epoch + 1, *values, *health))
    write_whole(path, text.getvalue().encode())


class TensorBoard:
    """Scalars of each step for TensorBoard, in a folder.

    Raises:
        ImportError: The package tensorboard is not installed.
        OSError: The folder cannot be written to; it names it. So do `note` and `close`.
    """

    def __init__(self, folder, history):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._report = threading.excepthook
        threading.excepthook = self._leave_to_the_writer
        with self._naming_the_folder():
            self.writer = SummaryWriter(folder, purge_step=len(history.losses) + 1)

    def note(self, history):
        step = len(history.losses)
        with self._naming_the_folder():
            self.writer.add_scalar("loss", history.losses[-1], step)
            self.writer.add_scalar("learning rate", history.rates[-1], step)
            if history.spreads:
                self.writer.add_scalar("spread of the embeddings", history.spreads[-1], step)
                self.writer.add_scalar("rank of the embeddings", history.ranks[-1], step)

    def close(self):
        try:
            with self._naming_the_folder():
                self.writer.close()
        finally:
            threading.excepthook = self._report

    def _leave_to_the_writer(self, failure):
        """Its thread prints nothing of a file that cannot be written: the writer raises that again where it is used."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._report(failure)

    @contextlib.contextmanager
    def _naming_the_folder(self):
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder)) from error
