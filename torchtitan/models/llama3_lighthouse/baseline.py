"""The baseline: torchtitan's own dense Llama 3, in our sizes and on our data."""

import dataclasses

from torchtitan.protocols.train_spec import register_train_spec

from torchtitan.models import llama3

from .data.packing import build_dataloader
from .data.tokenizer import build_tokenizer
from .model.flavors import flavors

NAME = "llama3_upstream"


def register_baseline() -> None:
    """Register upstream's model, in all our flavors, as ``model.name = "llama3_upstream"``."""
    keys = [field.name for field in dataclasses.fields(llama3.TransformerModelArgs)]
    plain = {
        flavor: llama3.TransformerModelArgs(**{key: getattr(args, key) for key in keys})
        for flavor, args in flavors.items()
    }
    spec = dataclasses.replace(
        llama3.get_train_spec(),
        model_args=plain,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
    )
    register_train_spec(NAME, spec)
