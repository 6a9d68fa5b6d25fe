"""Checks of a run's text: the folders that hold it, and its tokenizer against its model."""

from torchtitan.components.tokenizer import BaseTokenizer

from ..checkpoints.model_folder import model_arguments_of, named_model
from ..data.text_folder import read_folder
from ..errors import UserValueError
from ..job_config import JobConfig, sections_of_text


def check_vocabulary(config: JobConfig, tokenizer: BaseTokenizer) -> None:
    """Check that the model has an embedding for each id of the tokenizer.

    Raises:
        ValueError: it has fewer.
    """
    ids, rows = tokenizer.get_vocab_size(), model_arguments_of(config).vocab_size
    if ids > rows:
        raise UserValueError(
            f"the tokenizer has {ids} ids but {named_model(config)} has {rows} embeddings; choose "
            "another model or lighthouse.tokenizer"
        )


def check_folders(config: JobConfig) -> None:
    """Check that folders of text are there and may be read on this machine. Opens no file.

    Raises:
        ValueError, OSError: as ``read_folder`` and ``TextFolder.files``.
    """
    for key, section in sections_of_text(config).items():
        if section.dataset == "c4_local":
            split = "train" if key == "training" else key
            read_folder(section.dataset_path, key).files(split, key)
