"""Train a small Llama of Hugging Face's transformers, first under Lighthouse attention, then dense.

    .venv/bin/pip install -e '.[export]' accelerate
    .venv/bin/python examples/transformers_trainer.py

It takes about a minute on two CPU cores. The text is the source of Python's standard library, a
byte a token.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lighthouse import LighthouseConfig
from lighthouse.transformers import register

LENGTH = 512
# A window and four strata of 8 picks at each pooled level, for sequences of 512 tokens.
METHOD = LighthouseConfig(
    pooling_factor=2,
    top_k=32,
    picks_per_stratum=8,
    entry_score="first",
    combine="finest",
    window=64,
)


class StandardLibrary(Dataset):
    """Sequences of ``LENGTH`` bytes. None is padded, so there is no attention mask."""

    def __init__(self, sequences: int) -> None:
        files = sorted(Path(argparse.__file__).parent.glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[: sequences * LENGTH]
        self.rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).view(-1, LENGTH).long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model: LlamaForCausalLM, steps: int, output: str) -> list[float]:
    """Losses of ``steps`` steps of four sequences each."""
    arguments = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to=[], seed=0,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=StandardLibrary(4 * steps))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> tuple[list[float], list[float]]:
    """Losses under Lighthouse attention, and those of the dense steps after them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of each stage; default: 20")
    parser.add_argument("--output", default="outputs/transformers")
    options = parser.parse_args()
    register(METHOD, dense_layers=[0])
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        attn_implementation="lighthouse",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    first = train(model, options.steps, options.output)
    model.set_attn_implementation("sdpa")
    second = train(model, options.steps, options.output)
    model.save_pretrained(options.output)
    print(
        f"loss {first[0]:.3f} to {first[-1]:.3f} under Lighthouse, then to {second[-1]:.3f} dense"
    )
    return first, second


if __name__ == "__main__":
    main()
