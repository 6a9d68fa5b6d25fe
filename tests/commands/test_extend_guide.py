"""The commands of docs/guides/extend.md, one after the other, at a size that takes seconds."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from llamas import loaded, written
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from lighthouse_commands import main
from torchtitan.models.llama3_lighthouse.evaluation.inference import load_trained_model

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/guides/extend.md").read_text()
TRAINING = "./run_train.sh"
# Options that make each command small. The last value of an option counts.
SMALLER = {
    "train debug_cpu": "--training.steps 2",
    "train debug_extend_cpu": "--training.steps 2 --training.seq_len 2048 "
    "--lighthouse.schedule 'dense until=1 seq_len=1024 skip_positions=2048, dense'",
    "train under Lighthouse": "--training.steps 2 --training.seq_len 2048 "
    "--lighthouse.schedule 'lighthouse until=1, dense'",
    "evaluate loss": "--validation.seq_len 2048 --validation.steps 1",
    "evaluate distance": "--validation.seq_len 2048 --documents 1 --contexts 512 --distances 512",
    "evaluate niah": "--lengths 512 --depths 50 --trials 1",
}


def commands(heading: str) -> list[list[str]]:
    """The words of each command of a section, without the program that runs it."""
    section = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    blocks = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", section)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line]


def name_of(line: list[str]) -> str:
    if "--lighthouse.schedule" in line:
        return "train under Lighthouse"
    return f"{line[0]} {Path(line[1]).stem}"


def smaller(line: list[str]) -> list[str]:
    """A command in fewer steps and tokens."""
    name = name_of(line)
    return [*line, *shlex.split(SMALLER[name])] if name in SMALLER else line


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in the place of the clone's root."""
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    monkeypatch.chdir(tmp_path)
    # The command names itself there as the launcher, and no other launcher's processes may see it.
    with patch.dict(os.environ, {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}):
        yield tmp_path


HEADINGS = (
    "A model to extend", "Import", "Measure before, and choose a scaling", "Train",
    "Measure after", "Export",
)  # fmt: skip


def test_commands_parse() -> None:
    for heading in (*HEADINGS, "At full size"):
        for _, *line in commands(heading):
            if TRAINING not in line:
                assert main.parse(smaller(line))[0].module.__name__.startswith(
                    "lighthouse_commands"
                )


@pytest.mark.slow
def test_commands_of_the_guide(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [line for heading in HEADINGS for line in commands(heading)]
    assert len(lines) == 12 and {line[0] for line in lines} == {".venv/bin/lighthouse"}
    used = set()
    for _, *line in lines:
        used.add(name_of(line))
        monkeypatch.setattr(sys, "argv", ["lighthouse", *smaller(line)])
        try:
            main.main(smaller(line))
        except SystemExit as end:
            assert not end.code, (line, end.code, capfd.readouterr())
    assert used >= SMALLER.keys()

    place = clone / "outputs/extend"
    before, after = (json.loads((place / name / "config.json").read_text())
                     for name in ("model", "long"))  # fmt: skip
    scaling = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 2048}
    assert (before["rope_scaling"], before["max_position_embeddings"]) == (None, 2048)
    # Nothing else changes, as the guide says.
    assert after == before | {"rope_scaling": scaling, "max_position_embeddings": 8192}
    tokens = torch.randint(256, (1, 3000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(place / "long")(tokens).logits
        actual = load_trained_model(place / "run", max_seq_len=3000).model(tokens)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    for measured in ("loss_as_it_came", "loss_scaled"):
        assert (place / measured / "losses.csv").is_file()
    for moment in ("", "_before"):
        assert (place / f"distance{moment}/distance.csv").is_file()
        assert (place / f"niah{moment}/results.csv").is_file()


def words_of_training() -> list[str]:
    """The configuration keys of the guide's training at full size."""
    (line,) = (line for line in commands("At full size") if TRAINING in line)
    return line[line.index(TRAINING) + 1 :]


@pytest.mark.parametrize("qwen", [False, True])
def test_full_size_reads_what_was_imported(
    clone: Path, capfd: pytest.CaptureFixture[str], qwen: bool
) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_theta": 500000.0, "max_position_embeddings": 8192,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
    }  # fmt: skip
    changed = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16,
        "max_position_embeddings": 40960,
    }  # fmt: skip
    (clone / "models").mkdir()
    folder = written(clone / "models/Llama-3-8B", config | (changed if qwen else {}))
    words = {word: number for number, word in enumerate(["<s>", "</s>", "?", "a", "b"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (clone / "FOLDER").mkdir()
    (clone / "FOLDER/a.txt").write_text("a b " * 10)
    (clone / "FOLDER/b.txt").write_text("b a " * 10)
    lines = [words for words in commands("At full size") if words[0] == ".venv/bin/lighthouse"]
    (_, *imported), (_, *described) = lines[:2]
    main.main(imported)
    keys = words_of_training()
    selecting = ["--lighthouse.schedule", "lighthouse until=700, dense"]
    assert f'--lighthouse.schedule "{selecting[1]}"' in GUIDE
    if qwen:
        with pytest.raises(SystemExit) as refused:
            main.main([*described, *selecting])
        assert "scorer = 'norm' ranks" in f"{refused.value.code} {capfd.readouterr().err}"
        # As the guide's table and its section on training say.
        table = "yarn factor=F original_max_position_embeddings=32768"
        assert f"| Qwen 3 without a scaling | `{table}`" in GUIDE
        assert "For Qwen 3 add `--lighthouse.scorer gla`" in GUIDE
        keys += ["--model.rope_scaling", table.replace("=F", "=3")]
        selecting += ["--lighthouse.scorer", "gla"]
    schedule = "dense until=14 seq_len=8192 skip_positions=98304, dense"
    assert f'--training.steps 20 --lighthouse.schedule "{schedule}"' in GUIDE
    spread = "8,192 tokens spread over 98,304 positions under YaRN of"
    for more, stage in (
        ([], f"dense in steps 1 to 700: 384 sequences of {spread}"),
        (
            ["--training.steps", "20", "--lighthouse.schedule", schedule],
            f"dense in steps 1 to 14: 384 sequences of {spread}",
        ),
        (selecting, "Lighthouse in steps 1 to 700: 32 sequences of 98,304 tokens under YaRN of"),
    ):
        main.main([*described, *keys, *more])
        found = " ".join(capfd.readouterr().out.split())
        assert stage in found and "FOLDER" in found
        assert ("S = 18,432, window of 256" in found) == (more is selecting)
