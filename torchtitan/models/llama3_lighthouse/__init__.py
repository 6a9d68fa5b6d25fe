"""Llama 3 with Lighthouse attention, as a torchtitan model named ``llama3_lighthouse``."""

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .datasets import build_dataloader
from .infra.cpu import use_cpu_without_accelerator
from .infra.parallelize import parallelize_lighthouse
from .infra.pipeline import pipeline_lighthouse
from .loss import build_loss
from .metrics import build_metrics_processor
from .model import LighthouseModelArgs, LighthouseTransformer
from .state_dict_adapter import LighthouseStateDictAdapter
from .tokenizer import PADDED_VOCABULARY_SIZE, build_tokenizer
from .validate import build_validator

__all__ = ["LighthouseModelArgs", "LighthouseTransformer", "flavors", "get_train_spec"]

# Vocabulary of upstream's Llama 3; the paper keeps it although its tokens are bytes.
LLAMA3_VOCABULARY_SIZE = 128256

# The paper's decoder; its FFN width of 1536 is 0.5625 of upstream's 2/3 of 4 times dim.
PAPER = dict(
    dim=1024,
    n_layers=30,
    n_heads=8,
    ffn_dim_multiplier=0.5625,
    multiple_of=256,
    rope_theta=500000,
)

# What the studies in docs/ train.
STUDIED = dict(
    dim=384,
    n_layers=8,
    n_heads=6,
    multiple_of=256,
    vocab_size=PADDED_VOCABULARY_SIZE,
    rope_theta=500000,
)

flavors = {
    "debugmodel": LighthouseModelArgs(
        dim=256,
        n_layers=6,
        n_heads=4,
        n_kv_heads=2,
        multiple_of=64,
        vocab_size=PADDED_VOCABULARY_SIZE,
        rope_theta=500000,
    ),
    "15M": LighthouseModelArgs(**STUDIED),
    "17M": LighthouseModelArgs(**STUDIED, ffn_dim_multiplier=1.25),
    "270M": LighthouseModelArgs(**PAPER, vocab_size=PADDED_VOCABULARY_SIZE),
    "530M": LighthouseModelArgs(**PAPER, vocab_size=LLAMA3_VOCABULARY_SIZE),
    "8B": LighthouseModelArgs(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.3,
        multiple_of=1024,
        vocab_size=LLAMA3_VOCABULARY_SIZE,
        rope_theta=500000,
    ),
}


def get_train_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=LighthouseTransformer,
        model_args=flavors,
        parallelize_fn=parallelize_lighthouse,
        pipelining_fn=pipeline_lighthouse,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=LighthouseStateDictAdapter,
    )


use_cpu_without_accelerator()
register_train_spec("llama3_lighthouse", get_train_spec())
