"""Llama 3 with Lighthouse attention, registered with torchtitan as ``llama3_lighthouse``."""

from torchtitan.components.optimizer import build_optimizers
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .data.staged import build_staged_dataloader
from .data.tokenizer import build_tokenizer
from .infra.parallelize import parallelize_lighthouse
from .infra.pipeline import pipeline_lighthouse
from .lr_schedule import build_lr_schedulers
from .metrics import build_metrics_processor
from .model.flavors import flavors
from .model.loss import build_loss
from .model.model import LighthouseTransformer
from .model.state_dict_adapter import LighthouseStateDictAdapter
from .validate import build_validator


def get_train_spec() -> TrainSpec:
    """The parts that torchtitan's trainer builds a run from."""
    return TrainSpec(
        model_cls=LighthouseTransformer,
        model_args=flavors,
        parallelize_fn=parallelize_lighthouse,
        pipelining_fn=pipeline_lighthouse,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_staged_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics_processor,
        state_dict_adapter=LighthouseStateDictAdapter,
    )


register_train_spec("llama3_lighthouse", get_train_spec())
