"""Hugging Face Trainer: a small GPT-2 learns the letters of this repository's documentation, stops, and resumes.

Needs optserve[examples,server,torch]: `python examples/trainer_characters.py`. Weights begin at random.
"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from optserve import optim
from optserve.torch import RemoteOptimizer
from optserve_server import Config, Server

LENGTH, WIDTH = 48, 64


def text() -> list[dict[str, torch.Tensor]]:
    """Pieces of the documentation; the model moves the labels by one character itself."""
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    characters = torch.tensor(list("".join(page.read_text() for page in pages).encode("ascii", "replace")))
    return [{"input_ids": piece, "labels": piece} for piece in characters.split(LENGTH)[:-1]]


def network() -> GPT2LMHeadModel:
    """Says which character comes next, from those before it."""
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))


def train(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, folder: str, steps: int, *, stop: int) -> Trainer:
    """Train up to a step, from the last checkpoint in the folder; one is made when half of all steps are done."""
    torch.set_num_threads(1)  # of so small a network, more of them would wait for each other
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        save_steps=steps // 2,
        logging_steps=max(1, steps // 10),
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=text(), optimizers=(optimizer, None))
    if stop < steps:
        trainer.add_callback(Stop(stop))
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    return trainer


class Stop(TrainerCallback):
    """Ends the training early, as a machine does that fails."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def main(steps: int = 100) -> tuple[float, float]:
    """Train half of the steps on a server, and the rest on another; returns the loss at the beginning and at the end."""
    with tempfile.TemporaryDirectory() as folder:
        for stop in (steps // 2, steps):
            with Server(Config(listen="127.0.0.1:0")) as server:
                model = network()
                optimizer = RemoteOptimizer(model.named_parameters(), server.address, "gpt", optim.AdamW(lr=3e-3))
                trainer = train(model, optimizer, folder, steps, stop=stop)
                position, rate = optimizer.weights.describe().position, optimizer.receipt.learning_rate
                print(f"stopped after update {position.version}; its learning rate was {rate:.1e}")
                optimizer.close()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.2f}, after {steps} steps {losses[-1]:.2f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
