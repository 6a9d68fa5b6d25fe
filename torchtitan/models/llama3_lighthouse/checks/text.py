"""Checks of a run's tokenizer against its model."""

from torchtitan.components.tokenizer import BaseTokenizer

from ..checkpoints.model_folder import model_arguments_of, named_model
from ..errors import UserValueError
from ..job_config import JobConfig


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
