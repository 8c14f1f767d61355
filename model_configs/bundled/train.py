"""Trains the bundled model on text that it generates itself, on a CPU.

    python model_configs/bundled/train.py --minutes 66 \
        --output model_configs/bundled/h2o-stories-q8_0.gguf

Recall is learnt by a curriculum (STAGES): short windows dense with facts first, then
longer ones with facts strewn into stories.  A stage ends when the answers of its forms
are right often enough, or when its share of the time is over.  Every five minutes, and
when SIGTERM ends the run, a checkpoint goes to --work and the file at --output is
renewed; started again, the script goes on from the checkpoint.  Time in which the
process was stopped is not counted.
"""

from __future__ import annotations

import argparse
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from cores import FreeCores
from corpus import CHAT, COPY, FORMS, FULL, HAS, IT, LIKES, PLACE, PLAIN, SIMPLE, Mix
from export import export
from model import Llama, Muon, Shape
from tokens import MASKED, Encoder, batch, build_tokenizer
from torch import Tensor

SEED = 1
BATCH_TOKENS = 4096
RATE, ADAM_RATE = 0.02, 0.003
WARM_STEPS = 40
DECAY_FROM = 0.6  # share of the time after which the learning rate falls
ANSWER_WEIGHT, COPY_WEIGHT = 10.0, 1.5
SAVE_SECONDS = 300.0


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum; it ends at `until` (share of the time) at the latest."""

    lengths: tuple[int, ...]
    mix: Mix
    gates: tuple[int, ...]
    until: float
    right: float = 0.95


STAGES = (
    Stage((64,), Mix({"repeat": 0.45, "dense": 0.5, "story": 0.05}, [PLAIN, LIKES]),
          (COPY, PLAIN, LIKES), 0.15),
    Stage((64, 128, 128), Mix({"repeat": 0.1, "dense": 0.75, "story": 0.15}, SIMPLE),
          (LIKES, HAS, PLACE), 0.35),
    Stage((256, 256, 128),
          Mix({"repeat": 0.05, "dense": 0.3, "strewn": 0.4, "quoted": 0.07, "chat": 0.1,
               "story": 0.08}, SIMPLE, 0.35),
          (PLACE, IT), 0.5),
    Stage((512, 512, 512, 256), FULL, (PLACE, IT, CHAT), 0.75, 0.97),
    Stage((1024, 512, 512), FULL, (), 1.0),
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    entered: int = 0
    loss: float = 0.0
    right: list[float] = field(default_factory=lambda: [0.0] * len(FORMS))


class Trainer:
    """The network, its optimiser and the state of the run."""

    def __init__(self, minutes: float, work: Path, output: Path, threads: int) -> None:
        torch.manual_seed(SEED)
        self.limit, self.work, self.output = minutes * 60, work, output
        self.shape, self.progress = Shape(), Progress()
        self.model = Llama(self.shape)
        self.optimiser = Muon(self.model, RATE, ADAM_RATE)
        self.tokenizer = build_tokenizer(SEED, self.shape.vocabulary)
        self.encoder = Encoder(self.tokenizer)
        self.weights = torch.ones(256)
        self.weights[1 : len(FORMS) + 1] = ANSWER_WEIGHT
        self.weights[COPY + 1] = COPY_WEIGHT
        self.weights[MASKED] = 0.0
        self.stopping = False
        signal.signal(signal.SIGTERM, self.stop)
        self.checkpoint = work / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()
        self.cores = FreeCores(threads)
        inductor.cpp.dynamic_threads = True
        for block in self.model.blocks:
            block.compile(dynamic=False)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Ends the run after the current step, with a checkpoint."""
        self.stopping = True

    def load(self) -> None:
        """Takes up the run that the checkpoint holds."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load(state["optimiser"])
        self.tokenizer = state["tokenizer"]
        self.encoder = Encoder(self.tokenizer)
        self.progress = Progress(**state["progress"])

    def save(self) -> None:
        """Writes the checkpoint and renews the GGUF file."""
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state(),
            "tokenizer": self.tokenizer,
            "progress": vars(self.progress),
        }
        fresh = self.checkpoint.with_suffix(".tmp")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)
        export(self.model.state_dict(), self.shape, self.tokenizer, self.output)

    def rate(self) -> float:
        """The learning rate's factor: a short rise, a plateau, a fall to nothing."""
        done = self.progress.seconds / self.limit
        rise = (self.progress.step + 1) / WARM_STEPS
        return max(0.02, min(1.0, rise, (1.0 - done) / (1.0 - DECAY_FROM)))

    def loss(self, tokens: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss, and which targets were predicted right."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(tokens[:, :-1])
        flat, targets = logits.float().flatten(0, 1), tokens[:, 1:].flatten()
        weights = self.weights[marks[:, 1:].flatten().long()]
        losses = F.cross_entropy(flat, targets, reduction="none")
        with torch.no_grad():
            right = flat.argmax(-1) == targets
        return (losses * weights).sum() / weights.sum(), right

    def note(self, marks: Tensor, right: Tensor, loss: float) -> None:
        """Running means of the loss and of the right answers of every form."""
        now = self.progress
        now.loss = loss if now.step == 0 else 0.95 * now.loss + 0.05 * loss
        flat = marks[:, 1:].flatten()
        for form in range(len(FORMS)):
            hits = right[flat == form + 1]
            if hits.numel():
                share = min(0.1, hits.numel() / 1000)
                now.right[form] += share * (hits.float().mean().item() - now.right[form])

    def step(self) -> None:
        """One batch."""
        now = self.progress
        rng = random.Random(f"{SEED} {now.step}")
        stage = STAGES[now.stage]
        length = rng.choice(stage.lengths)
        arrays = batch(rng, self.encoder, stage.mix, BATCH_TOKENS // length, length)
        tokens, marks = (torch.from_numpy(array) for array in arrays)
        loss, right = self.loss(tokens, marks)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step(self.rate(), 0.85 + 0.1 * min(1.0, now.step / 300))
        self.note(marks, right, loss.item())
        now.step += 1
        now.tokens += BATCH_TOKENS
        self.advance(stage)

    def advance(self, stage: Stage) -> None:
        """Goes to the next stage when this one is learnt or its time is over."""
        now = self.progress
        learnt = stage.gates and min(now.right[form] for form in stage.gates) > stage.right
        over = now.seconds / self.limit > stage.until
        if now.stage + 1 < len(STAGES) and (over or (learnt and now.step > now.entered + 100)):
            now.stage += 1
            now.entered = now.step
            print(f"stage {now.stage} from step {now.step}", flush=True)

    def report(self, speed: float) -> None:
        """Prints a line about the state of the run."""
        now = self.progress
        forms = " ".join(f"{name} {100 * x:.0f}" for name, x in zip(FORMS, now.right, strict=True))
        left = (self.limit - now.seconds) / 60
        print(
            f"step {now.step} stage {now.stage} tokens {now.tokens / 1e6:.2f}M "
            f"loss {now.loss:.3f} | recall % {forms} | {speed:.0f} tokens/s "
            f"({torch.get_num_threads()} threads), {left:.1f} min left",
            flush=True,
        )

    def run(self) -> None:
        """Trains until the time is over."""
        saved = self.progress.seconds
        usual = 0.0
        while self.progress.seconds < self.limit and not self.stopping:
            torch.set_num_threads(self.cores.count())
            start = time.monotonic()
            self.step()
            took = time.monotonic() - start
            took = min(took, 3 * usual) if usual else took
            usual = 0.95 * usual + 0.05 * took if usual else took
            self.progress.seconds += took
            if self.progress.step % 20 == 0:
                self.report(BATCH_TOKENS / usual)
            if self.progress.seconds - saved > SAVE_SECONDS:
                saved = self.progress.seconds
                self.save()
        self.save()


def main() -> None:
    """Reads the arguments and trains."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=66.0, help="time for training")
    parser.add_argument("--output", type=Path, default=Path("h2o-stories-q8_0.gguf"))
    parser.add_argument("--work", type=Path, default=Path("train"), help="folder of checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="at most; fewer on a busy machine")
    options = parser.parse_args()
    Trainer(options.minutes, options.work, options.output, options.threads).run()


if __name__ == "__main__":
    main()
