"""`SavePrefixCallback`: the prefixes of a model beside each checkpoint of a `Trainer`."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .prefix_files import save_prefix


class SavePrefixCallback(TrainerCallback):
    """Writes the prefixes of `attach_prefix` into each checkpoint of a `Trainer`, as the file of `save_prefix`.

    A checkpoint holds the whole model with the parameters of the prefixes among its weights: `Trainer` resumes from it,
    but `from_pretrained` makes a model without prefixes of it. After that `load_prefix(model, folder / FILE)` brings
    them back.
    """

    FILE = "prefix.safetensors"

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            save_prefix(model, folder / self.FILE)
